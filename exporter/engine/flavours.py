"""TensorRT and TensorRT-RTX: what differs between the two modules of one API."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Literal

from exporter.errors import EngineError
from exporter.optional import require

Backend = Literal["tensorrt", "tensorrt-rtx"]


@dataclass(frozen=True)
class Flavour:
    """One of the two.

    Attributes:
        backend: Its name on the command line.
        module: The Python module.
        extra: The extra that brings it.
        short: Its name in an engine's file name.
        builds_without_gpu: Whether it builds for cards that are not here. The other one's builder
            can only be made where there is a driver.
    """

    backend: Backend
    module: str
    extra: str
    short: str
    builds_without_gpu: bool

    @property
    def has_timing_cache(self) -> bool:
        """TensorRT-RTX chooses its kernels on the card, when the engine is loaded."""
        return not self.builds_without_gpu

    @property
    def compiles_on_card(self) -> bool:
        """TensorRT-RTX compiles kernels when a context is made, and makes CUDA graphs by itself."""
        return self.builds_without_gpu


FLAVOURS: dict[str, Flavour] = {
    "tensorrt": Flavour("tensorrt", "tensorrt", "gpu", "trt", builds_without_gpu=False),
    "tensorrt-rtx": Flavour("tensorrt-rtx", "tensorrt_rtx", "rtx", "rtx", builds_without_gpu=True),
}


def load(flavour: Flavour) -> ModuleType:
    """Imports a flavour's module.

    Raises:
        MissingDependencyError: It is not installed.
        EngineError: Its libraries can't be loaded.
    """
    try:
        return require(flavour.module, extra=flavour.extra)
    except (OSError, RuntimeError) as error:  # the bindings are there, the libraries are not
        raise EngineError(
            f"{flavour.module} is installed, but its libraries can't be loaded ({error}).",
            "Install them again; see depthcut doctor.",
        ) from error
