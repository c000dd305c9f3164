"""TensorRT and TensorRT-RTX: what differs between the two modules of one API."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal

from exporter.engines.build.cuda_versions import BINDINGS, refuse_old_driver
from exporter.engines.build.driver import Driver, ask_driver
from exporter.errors import EngineError, UsageError
from exporter.optional import require

if TYPE_CHECKING:  # the building process has no other use for what these need
    from exporter.engines.build.settings import BuildSettings

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
        oldest: The first version whose runtime has all that is asked of it.
        lengths_since: The first version whose attentions can be told lengths.
        cards: A pattern of the compute capabilities that NVIDIA names as supported.
    """

    backend: Backend
    module: str
    extra: str
    short: str
    builds_without_gpu: bool
    oldest: str
    lengths_since: tuple[int, int]
    cards: str = r"sm\d+"

    @property
    def extra_cuda12(self) -> str:
        """The extra that brings it for CUDA 12."""
        return f"{self.extra}-cu12"

    def supports(self, compute_capability: str) -> bool:
        """Whether it runs on such a card, such as ``sm89``."""
        return re.fullmatch(self.cards, compute_capability) is not None

    def has_lengths(self, version: str) -> bool:
        """Whether the attentions of a version, such as ``1.7.1.116``, can be told lengths."""
        return tuple(int(number) for number in version.split(".")[:2]) >= self.lengths_since

    @property
    def has_timing_cache(self) -> bool:
        """TensorRT-RTX chooses its kernels on the card, when the engine is loaded."""
        return not self.builds_without_gpu

    @property
    def compiles_on_card(self) -> bool:
        """TensorRT-RTX compiles kernels when a context is made, and makes CUDA graphs by itself."""
        return self.builds_without_gpu


LIBRARIES: dict[str, EngineLibrary] = {
    "tensorrt": EngineLibrary(
        "tensorrt", "tensorrt", "gpu", "trt", builds_without_gpu=False,
        oldest="10.15", lengths_since=(11, 0),
    ),
    "tensorrt-rtx": EngineLibrary(
        "tensorrt-rtx", "tensorrt_rtx", "rtx", "rtx", builds_without_gpu=True,
        oldest="1.6", lengths_since=(1, 7), cards=r"sm(75|86|89|12\d)",
    ),
}  # fmt: skip


def usual_backend(
    asked: Backend | None = None, compute_capabilities: Sequence[str] = ()
) -> Backend:
    """Which library builds: the one that is asked for, or the one that serves the card.

    That is TensorRT-RTX where there is no card, where engines are for other cards than the one
    here, and where it supports the card; else TensorRT.
    """
    if asked is not None:
        return asked
    cards = () if compute_capabilities else ask_driver().devices
    served = all(LIBRARIES["tensorrt-rtx"].supports(each.compute_capability) for each in cards[:1])
    return "tensorrt-rtx" if served else "tensorrt"


def load(library: EngineLibrary) -> ModuleType:
    """Imports a library's module.

    Raises:
        MissingDependencyError: It is not installed, or too old.
        EngineError: Its libraries can't be loaded.
    """
    try:
        return require(library.module, extra=library.extra, oldest=library.oldest)
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
        BackendError: The driver is too old for it.
        UsageError: An option that this library has not.
    """
    library = LIBRARIES[backend]
    _refuse_foreign_options(library, settings, timing_cache)
    refuse_without_driver(library)


def refuse_without_driver(library: EngineLibrary) -> None:
    """Keeps a library that needs a driver from being touched where there is none for it.

    Raises:
        EngineError: There is none.
        BackendError: It is too old.
    """
    if library.builds_without_gpu:
        return
    driver = ask_driver()
    if driver.problem:
        raise EngineError(
            f"{library.backend} can't be used here: {driver.problem}.",
            "Take tensorrt-rtx instead: it builds without a GPU.",
            code="no-driver",
        )
    refuse_old_driver(driver, library.backend, library.extra_cuda12)


def refuse_driver_for_running(library: EngineLibrary, driver: Driver) -> None:
    """Refuses a driver that is too old for what runs engines.

    Raises:
        BackendError: It is.
    """
    for package in (library.backend, BINDINGS):
        refuse_old_driver(driver, package, library.extra_cuda12)


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
