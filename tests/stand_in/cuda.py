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
_NO_ROOM = cudaError_t.cudaErrorMemoryAllocation
_NOT_NOW = cudaError_t.cudaErrorStreamCaptureUnsupported
_BROKEN = cudaError_t.cudaErrorStreamCaptureInvalidated
# What no stream's capture of this thread allows, in the thread-local mode.
_UNSAFE = frozenset({
    "cudaMalloc", "cudaFree", "cudaMallocHost", "cudaFreeHost", "cudaStreamSynchronize",
    "cudaEventElapsedTime", "cudaGraphExecDestroy", "cudaStreamDestroy",
})  # fmt: skip
_H2D, _D2H = 1, 2


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
        call = getattr(_Calls, name.removeprefix("cuda"), None)
        if call is None or not name.startswith("cuda"):
            raise AttributeError(f"the stand-in of CUDA has no {name}")
        machine = self._machine

        def made(*arguments: Any) -> tuple[Any, ...]:
            machine.calls[name] += 1
            machine.host_us += machine.call_us
            if name in _UNSAFE and machine.break_captures():
                return (_NOT_NOW,)
            if name in machine.fails:
                return (cudaError_t(machine.fails[name]), None)
            result = call(machine, *arguments)
            return (
                result
                if isinstance(result, tuple)
                else (_OK, *([] if result is None else [result]))
            )

        return made


class _Calls:
    """By name without ``cuda``; a tuple begins with a code of its own."""

    @staticmethod
    def StreamCreateWithFlags(machine: Machine, flags: int) -> int:
        return machine.handle(Stream())

    @staticmethod
    def StreamDestroy(machine: Machine, stream: int) -> None:
        machine.drain(machine.streams.pop(stream))

    @staticmethod
    def StreamSynchronize(machine: Machine, stream: int) -> None:
        machine.drain(machine.streams[stream])

    @staticmethod
    def MemGetInfo(machine: Machine) -> tuple[Any, ...]:
        return _OK, machine.free_bytes, machine.memory_bytes

    @staticmethod
    def DeviceGetAttribute(machine: Machine, which: int, device: int) -> int:
        return {36: 1_000_000, 37: 128}[which]  # kHz and bits: 32 GB/s

    @staticmethod
    def Malloc(machine: Machine, size: int) -> tuple[Any, ...]:
        address = machine.allocate(size)
        return (_NO_ROOM, None) if address is None else (_OK, address)

    @staticmethod
    def Free(machine: Machine, address: int) -> None:
        machine.free(address)

    @staticmethod
    def MallocHost(machine: Machine, size: int) -> int:
        return machine.pin(size)

    @staticmethod
    def FreeHost(machine: Machine, address: int) -> None:
        machine.unpin(address)

    @staticmethod
    def MemcpyAsync(
        machine: Machine, target: int, source: int, size: int, kind: int, stream: int
    ) -> None:
        to = machine.on_host if kind == _D2H else machine.on_device
        of = machine.on_host if kind == _H2D else machine.on_device
        to(target, size), of(source, size)  # a wrong address is told where it is given
        machine.calls[f"bytes {'down' if kind == _D2H else 'up' if kind == _H2D else ''}"] += size

        def copy() -> None:
            to(target, size)[:] = of(source, size)

        machine.put(machine.streams[stream], Work(copy, size / 1e4))

    @staticmethod
    def MemsetAsync(machine: Machine, target: int, value: int, size: int, stream: int) -> None:
        def fill() -> None:
            machine.on_device(target, size)[:] = value

        machine.put(machine.streams[stream], Work(fill, 1.0))

    @staticmethod
    def Memset2DAsync(
        machine: Machine, target: int, pitch: int, value: int, width: int, height: int, stream: int
    ) -> None:
        def fill() -> None:
            for row in range(height):
                machine.on_device(target + row * pitch, width)[:] = value

        machine.put(machine.streams[stream], Work(fill, 1.0))

    @staticmethod
    def EventCreate(machine: Machine) -> int:
        return machine.handle(Event())

    @staticmethod
    def EventDestroy(machine: Machine, event: int) -> None:
        del machine.handles[event]

    @staticmethod
    def EventRecord(machine: Machine, event: int, stream: int) -> None:
        result, on = machine.handles[event], machine.streams[stream]
        result.passed = False

        def passes() -> None:
            result.passed, result.at_us = True, on.free_us

        machine.put(on, Work(passes))

    @staticmethod
    def EventElapsedTime(machine: Machine, begin: int, end: int) -> tuple[Any, ...]:
        first, last = machine.handles[begin], machine.handles[end]
        if not (first.passed and last.passed):
            return cudaError_t.cudaErrorNotReady, 0.0
        return _OK, (last.at_us - first.at_us) / 1e3

    @staticmethod
    def StreamBeginCapture(machine: Machine, stream: int, mode: int) -> None:
        on = machine.streams[stream]
        if on.captured is not None:
            raise RuleError("A stream is captured already.")
        on.captured, on.broken = [], False

    @staticmethod
    def StreamEndCapture(machine: Machine, stream: int) -> tuple[Any, ...]:
        on = machine.streams[stream]
        work, on.captured = on.captured, None
        if work is None:
            return cudaError_t.cudaErrorInvalidValue, None
        return (_BROKEN, None) if on.broken else (_OK, machine.handle(Graph(tuple(work))))

    @staticmethod
    def GraphInstantiate(machine: Machine, graph: int, flags: int) -> int:
        return machine.handle(Graph(machine.handles[graph].work))

    @staticmethod
    def GraphLaunch(machine: Machine, graph: int, stream: int) -> None:
        work = machine.handles[graph].work

        def run() -> float:
            machine.in_graph = True
            taken = sum(item.run() or 0.0 for item in work)
            machine.in_graph = False
            return taken

        total = Work(run, sum(item.device_us for item in work))
        machine.put(machine.streams[stream], total, host_us=machine.launch_us)

    @staticmethod
    def GraphDestroy(machine: Machine, graph: int) -> None:
        del machine.handles[graph]

    @staticmethod
    def GraphExecDestroy(machine: Machine, graph: int) -> None:
        del machine.handles[graph]

    @staticmethod
    def GetErrorString(machine: Machine, code: int) -> bytes:
        return _TEXTS[int(code)]

    @staticmethod
    def GetLastError(machine: Machine) -> tuple[Any, ...]:
        return (_OK,)
