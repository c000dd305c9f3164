"""``cuda.bindings.runtime`` of a machine: each call gives its code, then what it found."""

from __future__ import annotations

import enum
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from tests.stand_in.machine import Event, Graph, Machine, RuleError, Stream, Work


class cudaError_t(enum.IntEnum):
    """The codes that are answered."""

    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorNotReady = 600
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901


_TEXTS = {
    0: b"no error",
    1: b"invalid argument",
    2: b"out of memory",
    600: b"device not ready",
    900: b"operation not permitted when stream is capturing",
    901: b"operation failed due to a previous error during capture",
}
_OK = cudaError_t.cudaSuccess
# What no stream's capture of this thread allows, in the thread-local mode.
_UNSAFE = frozenset({
    "cudaMalloc", "cudaFree", "cudaMallocHost", "cudaFreeHost", "cudaStreamSynchronize",
    "cudaEventElapsedTime", "cudaGraphExecDestroy", "cudaStreamDestroy",
})  # fmt: skip
_H2D, _D2H = 1, 2


class _Calls:
    """By name without ``cuda``; a tuple begins with a code of its own."""

    def __init__(self, machine: Machine) -> None:
        self._on = machine

    def StreamCreateWithFlags(self, flags: int) -> int:
        return self._on.handle(Stream())

    def StreamDestroy(self, stream: int) -> None:
        self._on.drain(self._on.handles.pop(stream))

    def StreamSynchronize(self, stream: int) -> None:
        self._on.drain(self._on.streams[stream])

    def MemGetInfo(self) -> tuple[Any, ...]:
        return _OK, self._on.free_bytes, self._on.memory_bytes

    def Malloc(self, size: int) -> tuple[Any, ...]:
        address = self._on.allocate(size)
        return (cudaError_t.cudaErrorMemoryAllocation if address is None else _OK, address)

    def Free(self, address: int) -> None:
        self._on.free(address)

    def MallocHost(self, size: int) -> int:
        return self._on.pin(size)

    def FreeHost(self, address: int) -> None:
        self._on.unpin(address)

    def MemcpyAsync(self, target: int, source: int, size: int, kind: int, stream: int) -> None:
        to = self._on.on_host if kind == _D2H else self._on.on_device
        of = self._on.on_host if kind == _H2D else self._on.on_device
        to(target, size), of(source, size)  # a wrong address is told where it is given
        self._on.calls[f"bytes {'down' if kind == _D2H else 'up' if kind == _H2D else ''}"] += size

        def copy() -> None:
            to(target, size)[:] = of(source, size)

        self._put(stream, copy, size / 1e4)

    def MemsetAsync(self, target: int, value: int, size: int, stream: int) -> None:
        self.Memset2DAsync(target, size, value, size, 1, stream)

    def Memset2DAsync(
        self, target: int, pitch: int, value: int, width: int, height: int, stream: int
    ) -> None:
        def fill() -> None:
            for row in range(height):
                self._on.on_device(target + row * pitch, width)[:] = value

        self._put(stream, fill, 1.0)

    def EventCreate(self) -> int:
        return self._on.handle(Event())

    def EventRecord(self, event: int, stream: int) -> None:
        result, on = self._on.handles[event], self._on.streams[stream]
        result.at_us = None

        def passes() -> None:
            result.at_us = on.free_us

        self._put(stream, passes)

    def EventElapsedTime(self, begin: int, end: int) -> tuple[Any, ...]:
        first, last = (self._on.handles[event].at_us for event in (begin, end))
        if first is None or last is None:
            return cudaError_t.cudaErrorNotReady, 0.0
        return _OK, (last - first) / 1e3

    def StreamBeginCapture(self, stream: int, mode: int) -> None:
        on = self._on.streams[stream]
        if on.captured is not None:
            raise RuleError("A stream is captured already.")
        on.captured, on.broken = [], False

    def StreamEndCapture(self, stream: int) -> tuple[Any, ...]:
        on = self._on.streams[stream]
        work, on.captured = on.captured, None
        if work is None:
            return cudaError_t.cudaErrorInvalidValue, None
        if on.broken:
            return cudaError_t.cudaErrorStreamCaptureInvalidated, None
        return _OK, self._on.handle(Graph(tuple(work)))

    def GraphInstantiate(self, graph: int, flags: int) -> int:
        return self._on.handle(Graph(self._on.handles[graph].work))

    def GraphLaunch(self, graph: int, stream: int) -> None:
        work = self._on.handles[graph].work

        def run() -> float:
            self._on.in_graph = True
            taken = sum(item.run() or 0.0 for item in work)
            self._on.in_graph = False
            return taken

        self._put(stream, run, sum(item.device_us for item in work), self._on.launch_us)

    def GraphDestroy(self, handle: int) -> None:
        del self._on.handles[handle]

    GraphExecDestroy = EventDestroy = GraphDestroy

    def GetErrorString(self, code: int) -> bytes:
        return _TEXTS[int(code)]

    def GetLastError(self) -> tuple[Any, ...]:
        return (_OK,)

    def _put(
        self, stream: int, run: Callable[[], float | None], us: float = 0.0,
        host_us: float | None = None,
    ) -> None:  # fmt: skip
        self._on.put(self._on.streams[stream], Work(run, us), host_us=host_us)


class CudaRuntime:
    """The module."""

    cudaError_t = cudaError_t
    cudaMemcpyKind = SimpleNamespace(
        cudaMemcpyHostToDevice=_H2D, cudaMemcpyDeviceToHost=_D2H, cudaMemcpyDeviceToDevice=3
    )
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    cudaStreamNonBlocking = 1

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def __getattr__(self, name: str) -> Callable[..., tuple[Any, ...]]:
        machine, call = self._machine, getattr(_Calls(self._machine), name.removeprefix("cuda"))

        def made(*arguments: Any) -> tuple[Any, ...]:
            machine.calls[name] += 1
            machine.host_us += machine.call_us
            if name in _UNSAFE and machine.break_captures():
                return (cudaError_t.cudaErrorStreamCaptureUnsupported,)
            if name in machine.fails:
                return (cudaError_t(machine.fails[name]), None)
            result = call(*arguments)
            if isinstance(result, tuple):
                return result
            return (_OK,) if result is None else (_OK, result)

        return made
