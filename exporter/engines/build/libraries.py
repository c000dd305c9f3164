"""TensorRT and TensorRT-RTX: what differs between the two modules of one API."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

from exporter.engines.build.driver import ask_driver
from exporter.engines.build.settings import BuildSettings
from exporter.errors import EngineError, UsageError
from exporter.optional import require

Backend = Literal["tensorrt", "tensorrt-rtx"]


@dataclass(frozen=True)
class EngineLibrary:
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


LIBRARIES: dict[str, EngineLibrary] = {
    "tensorrt": EngineLibrary("tensorrt", "tensorrt", "gpu", "trt", builds_without_gpu=False),
    "tensorrt-rtx": EngineLibrary(
        "tensorrt-rtx", "tensorrt_rtx", "rtx", "rtx", builds_without_gpu=True
    ),
}


def load(library: EngineLibrary) -> ModuleType:
    """Imports a library's module.

    Raises:
        MissingDependencyError: It is not installed.
        EngineError: Its libraries can't be loaded.
    """
    try:
        return require(library.module, extra=library.extra)
    except (OSError, RuntimeError) as error:  # the bindings are there, the libraries are not
        raise EngineError(
            f"{library.module} is installed, but its libraries can't be loaded ({error}).",
            "Install them again; see depthcut doctor.",
        ) from error


def refuse_unbuildable(
    backend: Backend, settings: BuildSettings, timing_cache: Path | None = None
) -> None:
    """Refuses what can be told without a graph: a build takes long.

    Raises:
        EngineError: It can't build here.
        UsageError: An option that this library has not.
    """
    library = LIBRARIES[backend]
    _refuse_foreign_options(library, settings, timing_cache)
    refuse_without_driver(library)
    _refuse_refit_without_driver(library, settings)


def refuse_without_driver(library: EngineLibrary) -> None:
    """Keeps a library that needs a driver from being touched where there is none.

    Raises:
        EngineError: There is none.
    """
    driver = ask_driver()
    if not library.builds_without_gpu and driver.problem:
        raise EngineError(
            f"{library.backend} can't be used here: {driver.problem}.",
            "Take tensorrt-rtx instead: it builds without a GPU.",
            code="no-driver",
        )


def _refuse_foreign_options(
    library: EngineLibrary, settings: BuildSettings, timing_cache: Path | None
) -> None:
    if library.builds_without_gpu:
        # Measured with 1.7: the builder fails deep inside, for want of a driver or a lean runtime.
        asked = {
            "hardware_compatibility": settings.hardware_compatibility != "none",
            "version_compatible": settings.version_compatible,
            "--timing-cache": timing_cache is not None,
        }
    else:
        asked = {"--compute-capability": bool(settings.compute_capabilities)}
    other = next(name for name in LIBRARIES if name != library.backend)
    for option, given in asked.items():
        if given:
            raise UsageError(
                f"{library.backend} has no {option}.",
                f"Leave it out, or build with {other}.",
                code="unsupported-option",
            )


def _refuse_refit_without_driver(library: EngineLibrary, settings: BuildSettings) -> None:
    """Measured with 1.7: the builder dies inside where a refittable engine needs a driver."""
    asked = {"--strip-weights": settings.strip_weights, "--refittable": settings.refittable}
    option = next((name for name, given in asked.items() if given), None)
    if option and (problem := ask_driver().problem):
        raise EngineError(
            f"{library.backend} needs a GPU to build with {option}: {problem}.",
            "Leave it out, or build on a machine with a card.",
            code="needs-gpu",
        )
