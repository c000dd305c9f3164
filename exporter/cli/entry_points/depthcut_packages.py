"""Whether the packages that Python finds under depthcut's names are depthcut's."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_PACKAGES = ("exporter", "graph_passes")
_SIGNS = (Path(__file__).name, f"exporter/cli/entry_points/{Path(__file__).name}")
"""What lies beside such a package of depthcut's, where it is installed and in a checkout."""


def hidden_by() -> str | None:
    """Says which package stands in front of depthcut's own; None where none does."""
    for name in _PACKAGES:
        place = _place(name)
        if place is None:
            return f"depthcut's package {name} is not installed here. Install depthcut again."
        if not any((place.parent / sign).is_file() for sign in _SIGNS):
            return (
                f"The package {name} at {place} hides depthcut's package of the same name. Run "
                "this where that one can't be imported: from another folder, and without it on "
                "PYTHONPATH."
            )
    return None


def _place(name: str) -> Path | None:
    """The folder or the file that is imported, or was, under a name."""
    loaded = getattr(sys.modules.get(name), "__file__", None)
    spec = None if loaded else importlib.util.find_spec(name)
    origin = loaded or (spec.origin if spec else None)
    if origin is None:
        return None
    path = Path(origin).resolve()
    return path.parent if path.stem == "__init__" else path
