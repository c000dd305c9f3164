"""The cards that an engine can be built for ahead of time."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

from exporter.errors import EngineError

_NO_CARD = frozenset({"NONE", "CURRENT"})


def refuse_unknown_targets(module: ModuleType, names: Sequence[str]) -> None:
    """Refuses cards that a library doesn't build for.

    Args:
        module: ``tensorrt_rtx``; the other library has no such choice.
        names: Compute capabilities such as ``sm89``.

    Raises:
        EngineError: One is not known.
    """
    if not names:
        return
    known = set(module.ComputeCapability.__members__) - _NO_CARD
    wrong = [name for name in names if name.upper() not in known]
    if wrong:
        raise unknown_targets(module, wrong)


def unknown_targets(module: ModuleType, wrong: Sequence[str]) -> EngineError:
    """The error for cards that a library doesn't build for.

    Args:
        module: The library.
        wrong: Their compute capabilities.
    """
    known = set(module.ComputeCapability.__members__) - _NO_CARD
    cards = sorted((name.lower() for name in known), key=lambda name: (len(name), name))
    return EngineError(
        f"{module.__name__} {module.__version__} does not build for {', '.join(wrong)}.",
        f"It knows {', '.join(cards)}.",
    )
