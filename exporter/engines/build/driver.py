"""Asks the NVIDIA driver what is there, before any CUDA library is touched.

TensorRT's runtime ends the process with a segmentation fault where there is no driver, so this
must be asked first. Only libcuda, which the driver itself brings, is loaded.
"""

from __future__ import annotations

import ctypes
import functools
import os
import uuid
from dataclasses import dataclass

from exporter.errors import BackendError

_LIBRARY = "libcuda.so.1"
_NAME_BYTES, _UUID_BYTES = 256, 16
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR


@dataclass(frozen=True)
class Device:
    """One NVIDIA GPU.

    Attributes:
        name: As the driver calls it.
        compute_capability: Such as ``sm89``.
        memory_bytes: All of its memory.
        uuid: Its name to NVIDIA's tools, which count cards in another order than CUDA does; empty
            where the driver doesn't say.
    """

    name: str
    compute_capability: str
    memory_bytes: int
    uuid: str = ""


@dataclass(frozen=True)
class Driver:
    """What the driver says.

    Attributes:
        problem: Why nothing can run on a GPU here; empty where something can.
        cuda_version: The newest CUDA that it takes, such as ``13.0``.
        devices: The GPUs that this process may use.
    """

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
        return _described(cuda)
    except AttributeError as error:  # a stub, or a library of another kind
        return Driver(f"{library} is no NVIDIA driver ({error})")


def _described(cuda: ctypes.CDLL) -> Driver:
    version, count = ctypes.c_int(0), ctypes.c_int(0)
    cuda.cuDriverGetVersion(ctypes.byref(version))
    cuda.cuDeviceGetCount(ctypes.byref(count))
    text = f"{version.value // 1000}.{version.value % 1000 // 10}"
    devices = tuple(_device(cuda, number) for number in range(count.value))
    return Driver("" if devices else "the NVIDIA driver finds no GPU", text, devices)


def _device(cuda: ctypes.CDLL, number: int) -> Device:
    handle, memory = ctypes.c_int(0), ctypes.c_size_t(0)
    cuda.cuDeviceGet(ctypes.byref(handle), number)
    name = ctypes.create_string_buffer(_NAME_BYTES)
    cuda.cuDeviceGetName(name, _NAME_BYTES, handle)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), handle)
    major, minor = (_attribute(cuda, which, handle) for which in (_MAJOR, _MINOR))
    told, capability = name.value.decode(errors="replace"), f"sm{major}{minor}"
    return Device(told, capability, memory.value, _uuid(cuda, handle))


def _uuid(cuda: ctypes.CDLL, device: ctypes.c_int) -> str:
    found = ctypes.create_string_buffer(_UUID_BYTES)
    ask = getattr(cuda, "cuDeviceGetUuid_v2", None)
    if ask is None or ask(found, device) != 0:
        return ""
    return f"GPU-{uuid.UUID(bytes=found.raw)}"


def use_device(device: str | None) -> None:
    """Has this process, and those that it starts, see one GPU alone.

    It comes before anything else of CUDA, which looks at ``CUDA_VISIBLE_DEVICES`` once.

    Args:
        device: Its number among the GPUs that are visible, as CUDA counts them, or its UUID; None
            leaves all visible, and the first is used.

    Raises:
        BackendError: There is no such number among them.
    """
    if device is None:
        return
    visible = _visible()
    if device.isdigit() and visible is not None:
        if int(device) >= len(visible):
            raise BackendError(
                f"There is no GPU {device}: CUDA_VISIBLE_DEVICES names {len(visible)}.",
                "Numbers begin at 0.",
                code="no-such-device",
            )
        device = visible[int(device)]
    os.environ[_VISIBLE] = device


@functools.cache
def _visible() -> list[str] | None:
    """What is visible before one is chosen; None where nothing limits it."""
    told = os.environ.get(_VISIBLE)
    return None if told is None else [each.strip() for each in told.split(",")]


def _attribute(cuda: ctypes.CDLL, which: int, device: ctypes.c_int) -> int:
    found = ctypes.c_int(0)
    cuda.cuDeviceGetAttribute(ctypes.byref(found), which, device)
    return found.value
