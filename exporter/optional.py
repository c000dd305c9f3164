"""The one door to optional dependencies."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

from exporter.errors import MissingDependencyError

# ONNX Runtime 1.32 tells its makers of each use, from its import on, and keeps a number for the
# machine below the user's cache. It looks at this before anything of it can be called.
_NO_TELEMETRY = "ORT_DISABLE_TELEMETRY"


def require(module: str, *, extra: str) -> ModuleType:
    """Imports an optional module, or says which extra brings it.

    Args:
        module: Dotted name of the module, such as ``"onnxruntime"``.
        extra: The extra of the ``depthcut`` distribution that installs it.

    Raises:
        MissingDependencyError: When the module, or one it needs, is not installed.
    """
    os.environ.setdefault(_NO_TELEMETRY, "1")
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = (error.name or module).partition(".")[0]
        raise MissingDependencyError(
            f"{missing} is needed here and can't be imported ({error}).",
            f"Install the extra {extra}: pip install 'depthcut[{extra}]', "
            f"or in a clone: pip install '.[{extra}]'",
        ) from error
