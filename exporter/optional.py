"""The one door to optional dependencies."""

from __future__ import annotations

import importlib
import os
import re
from types import ModuleType

from exporter.errors import MissingDependencyError

# ONNX Runtime 1.32 tells its makers of each use, from its import on, and keeps a number for the
# machine below the user's cache. It looks at this before anything of it can be called.
_NO_TELEMETRY = "ORT_DISABLE_TELEMETRY"


def require(module: str, *, extra: str, oldest: str | None = None) -> ModuleType:
    """Imports an optional module, or says which extra brings it."""
    os.environ.setdefault(_NO_TELEMETRY, "1")
    hint = (
        f"Install the extra {extra}: pip install 'depthcut[{extra}]', "
        f"or in a clone: pip install '.[{extra}]'"
    )
    try:
        module_type = importlib.import_module(module)
    except ImportError as error:
        missing = (error.name or module).partition(".")[0]
        raise MissingDependencyError(
            f"{missing} is needed here and can't be imported ({error}).", hint
        ) from error
    if oldest is not None and _numbers(module_type.__version__) < _numbers(oldest):
        raise MissingDependencyError(
            f"{module} {module_type.__version__} is too old here: {oldest} or later is needed.",
            hint,
            code="too-old",
        )
    return module_type


def _numbers(version: str) -> list[int]:
    """The first two numbers of a version."""
    return [int(number) for number in re.findall(r"\d+", version)[:2]]
