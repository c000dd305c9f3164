"""Asks the NVIDIA driver what is there, before any CUDA library is touched.

TensorRT's runtime ends the process with a segmentation fault where there is no driver, so this
must be asked first. Only libcuda, which the driver itself brings, is loaded.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

_LIBRARY = "libcuda.so.1"
_NAME_BYTES = 256
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR


@dataclass(frozen=True)
class Device:
    """One NVIDIA GPU.

    Attributes:
        name: As the driver calls it.
        compute_capability: Such as ``sm89``.
        memory_bytes: All of its memory.
    """

    name: str
    compute_capability: str
    memory_bytes: int


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
    return Device(name.value.decode(errors="replace"), f"sm{major}{minor}", memory.value)


def _attribute(cuda: ctypes.CDLL, which: int, device: ctypes.c_int) -> int:
    found = ctypes.c_int(0)
    cuda.cuDeviceGetAttribute(ctypes.byref(found), which, device)
    return found.value
