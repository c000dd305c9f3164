"""What Polygraphy's runner of engines asks of a machine besides what depthcut asks."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any
from unittest import mock

import polygraphy.backend.trt  # noqa: F401  # else each block of stand_in() would forget it again

from exporter.engines import verify
from exporter.engines.build import session
from tests.stand_in.cuda import CudaRuntime
from tests.stand_in.machine import Machine


class _Cudart:
    """CUDA's runtime as a C library; a pageable copy is done when its call returns."""

    def __init__(self, machine: Machine) -> None:
        self._machine, self._cuda = machine, CudaRuntime(machine)

    def cudaStreamCreate(self, stream: Any) -> int:
        code, stream._obj.value = self._cuda.cudaStreamCreateWithFlags(0)
        return int(code)

    def cudaStreamSynchronize(self, stream: Any) -> int:
        return int(self._cuda.cudaStreamSynchronize(stream.value)[0])

    def cudaStreamDestroy(self, stream: Any) -> int:
        return int(self._cuda.cudaStreamDestroy(stream.value)[0])

    def cudaMalloc(self, pointer: Any, size: Any) -> int:
        code, pointer._obj.value = self._cuda.cudaMalloc(size.value)
        return int(code)

    def cudaFree(self, pointer: Any) -> int:
        return int(self._cuda.cudaFree(pointer.value)[0]) if pointer.value else 0

    def cudaMemcpyAsync(self, to: Any, source: Any, size: Any, kind: Any, stream: Any) -> int:
        self._machine.drain(self._machine.streams[stream.value])
        device = to if kind.value == 1 else source
        self._machine.on_device(device.value, size.value)  # or a rule is broken
        ctypes.memmove(to.value, source.value, size.value)
        return 0


@contextlib.contextmanager
def polygraphy_on(machine: Machine, library: str = "tensorrt_rtx") -> Iterator[None]:
    """Has Polygraphy find the machine, within a block of :func:`stand_in`."""
    from polygraphy import config, cuda

    wrapper = object.__new__(cuda.Cuda)
    wrapper.handle = _Cudart(machine)
    with (
        mock.patch.object(config, "USE_TENSORRT_RTX", library[-3:] == "rtx"),
        mock.patch.object(cuda.cuda, "G_CUDA", wrapper),
        mock.patch.object(verify, "run_job", session.run_job),
    ):
        yield
