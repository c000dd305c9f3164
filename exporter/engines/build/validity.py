"""Asks TensorRT-RTX whether an engine fits this machine, by the engine's first bytes.

To be asked before an engine is loaded: loading one that doesn't fit can end the process. TensorRT
has no such call.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from exporter.engines.build.libraries import LIBRARIES
from exporter.errors import OUT_OF_MEMORY, EngineError


class _Reason(NamedTuple):
    code: str
    message: str
    hint: str


# By the library's own names, the most telling first: an engine for another card often has more.
_REASONS = {
    "MALFORMED_ENGINE": _Reason(
        "malformed-engine", "is not an engine that the library can read", "Build it again."
    ),
    "VERSION_MISMATCH": _Reason(
        "other-version",
        "was built by another version of the library",
        "Build it again with the version that is installed here.",
    ),
    "OLD_CUDA_DRIVER": _Reason(
        "driver-too-old",
        "needs a newer NVIDIA driver",
        "Update the driver; depthcut doctor shows which CUDA it takes.",
    ),
    "OLD_CUDA_RUNTIME": _Reason(
        "runtime-too-old", "needs a newer CUDA runtime", "Install the extra rtx again."
    ),
    "CUDA_ERROR": _Reason(
        "cuda-broken",
        "can't be asked about: CUDA does not start",
        "Check the driver's installation; see depthcut doctor.",
    ),
    "UNSUPPORTED_CC": _Reason(
        "unsupported-card",
        "does not run on this GPU",
        "Build it with --compute-capability for this card, or with --engine tensorrt on it.",
    ),
    "INSUFFICIENT_GPU_MEMORY": _Reason(
        OUT_OF_MEMORY,
        "needs more GPU memory than is free",
        "Stop other programs on the GPU, or build for a smaller batch or a shorter context.",
    ),
}


def refuse_invalid(module: ModuleType, runtime: Any, path: Path) -> None:
    """Refuses an engine that the library calls invalid here.

    Args:
        module: ``tensorrt`` or ``tensorrt_rtx``.
        runtime: Its ``Runtime``.
        path: The engine.

    Raises:
        EngineError: It is invalid; the code tells why.
    """
    if module.__name__ != LIBRARIES["tensorrt-rtx"].module:
        return
    with path.open("rb") as file:
        header = file.read(runtime.engine_header_size)
    validity, told = runtime.get_engine_validity(header)
    if validity != module.EngineValidity.INVALID:
        return
    library = f"{module.__name__} {module.__version__}"
    flags = module.EngineInvalidityDiagnostics
    for name, reason in _REASONS.items():
        if int(told) & int(getattr(flags, name)):
            said = f"{path} {reason.message}: {library} says {name}."
            raise EngineError(said, reason.hint, code=reason.code)
    raise EngineError(f"{path} is not valid here: {library} gives no reason.", code="invalid")
