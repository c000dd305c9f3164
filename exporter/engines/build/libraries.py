"""TensorRT and TensorRT-RTX: what differs between the two modules of one API."""

from __future__ import annotations

import ctypes
import functools
import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from types import ModuleType
from typing import Any, Literal

from exporter.errors import BackendError, EngineError, UsageError
from exporter.optional import require

_LIBRARY = "libcuda.so.1"
_NAME_BYTES, _UUID_BYTES = 256, 16
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR


@dataclass(frozen=True)
class Device:
    """One NVIDIA GPU."""

    name: str
    compute_capability: str
    memory_bytes: int
    uuid: str = ""


@dataclass(frozen=True)
class Driver:
    """What the driver says."""

    problem: str
    cuda_version: str = ""
    devices: tuple[Device, ...] = ()


def ask_driver(library: str = _LIBRARY) -> Driver:
    """Loads the driver's library and asks it; never raises."""
    try:
        cuda = ctypes.CDLL(library)
    except OSError:
        return Driver("no NVIDIA driver")
    try:
        if (code := cuda.cuInit(0)) != 0:
            return Driver(f"the NVIDIA driver can't start (cuInit says {code})")
        version, count = _number(cuda.cuDriverGetVersion), _number(cuda.cuDeviceGetCount)
        devices = tuple(_device(cuda, number) for number in range(count))
    except AttributeError as error:  # a stub, or a library of another kind
        return Driver(f"{library} is no NVIDIA driver ({error})")
    text = f"{version // 1000}.{version % 1000 // 10}"
    return Driver("" if devices else "the NVIDIA driver finds no GPU", text, devices)


def _number(call: Callable[..., int], *arguments: Any, kind: Any = ctypes.c_int) -> int:
    """What a call writes to where its first argument points."""
    value = kind(0)
    call(ctypes.byref(value), *arguments)
    return int(value.value)


def _device(cuda: ctypes.CDLL, number: int) -> Device:
    handle = _number(cuda.cuDeviceGet, number)
    name = ctypes.create_string_buffer(_NAME_BYTES)
    cuda.cuDeviceGetName(name, _NAME_BYTES, handle)
    parts = [_number(cuda.cuDeviceGetAttribute, which, handle) for which in (_MAJOR, _MINOR)]
    memory = _number(cuda.cuDeviceTotalMem_v2, handle, kind=ctypes.c_size_t)
    array = ctypes.create_string_buffer(_UUID_BYTES)
    ask = getattr(cuda, "cuDeviceGetUuid_v2", None)
    known = ask is not None and ask(array, handle) == 0
    return Device(
        name.value.decode(errors="replace"),
        "sm" + "".join(map(str, parts)),
        memory,
        f"GPU-{uuid.UUID(bytes=array.raw)}" if known else "",
    )


BINDINGS, ONNX_RUNTIME = "cuda-bindings", "onnxruntime-gpu"
_RUNTIME = re.compile(r"nvidia-cuda-runtime(?:-cu\d+)?\s*[~=<>]=?\s*(\d+)")


def version_of(package: str) -> str | None:
    """The installed version of a package, or of its form for one CUDA; None where there is none.

    ``tensorrt`` may be installed as ``tensorrt-cu12`` alone.
    """
    versions = (one.version for name, one in _installed() if _form(name, package) is not None)
    return next(versions, None)


@functools.cache
def _installed() -> list[tuple[str, metadata.Distribution]]:
    """All packages by their names; reading these takes a tenth of a second."""
    return [(one.name, one) for one in metadata.distributions()]


def built_for_cuda(package: str) -> int | None:
    """The major version of CUDA that a package was built for; None where that is not known.

    NVIDIA's packages have it in their names: ``tensorrt`` brings ``tensorrt-cu13``. The version of
    ``cuda-bindings`` is CUDA's own, and ``onnxruntime-gpu`` names the runtime that it needs.
    """
    if package == BINDINGS:
        version = version_of(package)
        return int(version.partition(".")[0]) if version else None
    if package == ONNX_RUNTIME:
        needs = " ".join(metadata.requires(package) or []) if version_of(package) else ""
        match = _RUNTIME.search(needs)
        return int(match[1]) if match else None
    forms = (_form(name, package) for name, _ in _installed())
    return max((int(form) for form in forms if form), default=None)


def _form(name: str, package: str) -> str | None:
    """The CUDA in a package's name, empty where it names none; None for another package."""
    plain = re.sub(r"[-_.]+", "-", name).lower()
    match = re.fullmatch(rf"{re.escape(package)}(?:-cu(\d+))?", plain)
    return None if match is None else match[1] or ""


def too_old(driver: Driver, package: str, extra: str) -> tuple[str, str]:
    """What is wrong between a package and the driver, and the way out; empty where nothing is.

    Within a major version CUDA's libraries run on older drivers, so that one alone counts.
    """
    needed = None if driver.problem else built_for_cuda(package)
    if needed is None or needed <= int(driver.cuda_version.partition(".")[0]):
        return "", ""
    return (
        f"needs CUDA {needed}, and this NVIDIA driver takes CUDA {driver.cuda_version}",
        "Update the driver (CUDA 13 needs version 580 or later), or install the packages for "
        f"CUDA 12 in a new environment: pip install 'depthcut[{extra}]'.",
    )


def refuse_old_driver(driver: Driver, extra: str, *packages: str) -> None:
    """Refuses packages of a later CUDA than the driver takes."""
    for package in packages:
        problem, way_out = too_old(driver, package, extra)
        if problem:
            raise BackendError(f"{package} {problem}.", way_out, code="no-driver")


Backend = Literal["tensorrt", "tensorrt-rtx"]


@dataclass(frozen=True)
class EngineLibrary:
    """One of the two."""

    backend: Backend
    module: str
    extra: str
    short: str
    builds_without_gpu: bool
    oldest: str
    cards: str = r"sm\d+"

    @property
    def extra_cuda12(self) -> str:
        """The extra that brings it for CUDA 12."""
        return f"{self.extra}-cu12"

    def supports(self, compute_capability: str) -> bool:
        """Whether it runs on such a card, such as ``sm89``."""
        return re.fullmatch(self.cards, compute_capability) is not None

    @property
    def compiles_on_card(self) -> bool:
        """TensorRT-RTX compiles kernels when a context is made, and makes CUDA graphs by itself."""
        return self.builds_without_gpu


LIBRARIES: dict[str, EngineLibrary] = {
    "tensorrt": EngineLibrary(
        "tensorrt", "tensorrt", "gpu", "trt", builds_without_gpu=False,
        oldest="10.15",
    ),
    "tensorrt-rtx": EngineLibrary(
        "tensorrt-rtx", "tensorrt_rtx", "rtx", "rtx", builds_without_gpu=True,
        oldest="1.6", cards=r"sm(75|86|89|12\d)",
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
    served = all(LIBRARIES["tensorrt-rtx"].supports(card.compute_capability) for card in cards[:1])
    return "tensorrt-rtx" if served else "tensorrt"


def load(library: EngineLibrary) -> ModuleType:
    """Imports a library's module."""
    try:
        return require(library.module, extra=library.extra, oldest=library.oldest)
    except (OSError, RuntimeError) as error:  # the bindings are there, the libraries are not
        raise EngineError(
            f"{library.module} is installed, but its libraries can't be loaded ({error}).",
            "Install them again; see depthcut doctor.",
        ) from error


def cards_of(module: ModuleType, names: Sequence[str]) -> list[Any]:
    """The library's own names of cards; those that it doesn't build for are refused."""
    if not names:  # only one of the libraries has these classes
        return []
    known = {name.lower(): card for name, card in module.ComputeCapability.__members__.items()}
    cards = {name: card for name, card in known.items() if name.startswith("sm")}
    if wrong := [name for name in names if name not in cards]:
        raise EngineError(
            f"{module.__name__} {module.__version__} does not build for {', '.join(wrong)}.",
            f"It knows {', '.join(sorted(cards, key=lambda name: (len(name), name)))}.",
            code="other-card",
        )
    return [cards[name] for name in names]


def refuse_unbuildable(backend: Backend, compute_capabilities: Sequence[str] = ()) -> None:
    """Refuses what can be told without a graph: a build takes long.

    A library that needs a driver isn't touched where there is none for it.
    """
    library = LIBRARIES[backend]
    if library.builds_without_gpu:
        return
    if compute_capabilities:
        raise UsageError(
            f"{backend} has no --compute-capability.",
            "Leave it out, or build with tensorrt-rtx.",
            code="unsupported-option",
        )
    driver = ask_driver()
    if driver.problem:
        raise EngineError(
            f"{backend} can't be used here: {driver.problem}.",
            "Take tensorrt-rtx instead: it builds without a GPU.",
            code="no-driver",
        )
    refuse_old_driver(driver, library.extra_cuda12, backend)
