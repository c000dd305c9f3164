"""The few calls of the CUDA runtime that running an engine takes; each failure is an error here."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.engines.tensors import LESS_MEMORY, out_of_memory, rounded_up
from exporter.errors import OUT_OF_MEMORY, BackendError
from exporter.optional import require

Bytes = NDArray[np.uint8]

_NON_BLOCKING = 1  # cudaStreamNonBlocking: doesn't wait for the default stream
_STAGE_BYTES = 32 << 20


@dataclass(frozen=True)
class CapturedRun:
    """A CUDA graph."""

    launch: Callable[[], None]
    free: Callable[[], None]


class Cuda:
    """A stream of its own, and memory that is given back when it is closed."""

    def __init__(self, extra: str) -> None:
        self._rt = require("cuda.bindings.runtime", extra=extra)
        self._kinds = self._rt.cudaMemcpyKind
        self._held: dict[tuple[str, int], Any] = {}
        self._sizes: dict[int, int] = {}
        self._stage: Bytes | None = None
        self.stream = self._do("make a stream", "cudaStreamCreateWithFlags", _NON_BLOCKING)
        self._hold("cudaStreamDestroy", self.stream)

    @property
    def allocated_bytes(self) -> int:
        """See the class."""
        return sum(self._sizes.values())

    def finish(self) -> None:
        """Waits for the stream; a failure was told where it arose."""
        self._rt.cudaStreamSynchronize(self.stream)

    def close(self) -> None:
        """Gives everything back, also after a failure."""
        self.finish()
        self._stage = None
        self.back_to(())

    def free_bytes(self) -> tuple[int, int]:
        """Device memory: what is free, and all."""
        free, total = self._do("ask for free memory", "cudaMemGetInfo")
        return int(free), int(total)

    def allocate(self, size: int, what: str) -> int:
        """Device memory."""
        code, pointer = self._rt.cudaMalloc(rounded_up(size))
        if code == self._rt.cudaError_t.cudaErrorMemoryAllocation:
            self._rt.cudaGetLastError()  # the next call would tell it again
            raise out_of_memory(what, rounded_up(size), *self.free_bytes())
        self._refuse(code, f"allocate memory for {what}")
        self._hold("cudaFree", pointer)
        self._sizes[int(pointer)] = rounded_up(size)
        return int(pointer)

    def held(self) -> frozenset[tuple[str, int]]:
        """What is held now, for :meth:`back_to`."""
        return frozenset(self._held)

    def back_to(self, before: Collection[tuple[str, int]]) -> None:
        """Gives back what was taken since, once the stream has done what uses it."""
        self.finish()
        for since in [item for item in reversed(self._held) if item not in before]:
            self._give_back(*since)

    def pinned(self, size: int) -> Bytes:
        """Host memory that copies to and from the device don't have to go round, ``[size]``."""
        pointer = self._do(f"pin {size} bytes of host memory", "cudaMallocHost", size)
        self._hold("cudaFreeHost", pointer)
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(int(pointer)))

    def send(self, target: int, source: Bytes) -> None:
        """Copies pinned memory to the device; the stream does it in its turn."""
        kind = self._kinds.cudaMemcpyHostToDevice
        self._copy(target, source.ctypes.data, source.nbytes, kind)

    def fetch(self, target: Bytes, source: int) -> None:
        """Copies device memory to pinned memory; it is there after :meth:`wait`."""
        kind = self._kinds.cudaMemcpyDeviceToHost
        self._copy(target.ctypes.data, source, target.nbytes, kind)

    def upload(self, target: int, array: NDArray[Any]) -> None:
        """Copies any array to the device, through pinned memory, and waits."""
        for begin, piece, stage in self._pieces(np.ascontiguousarray(array)):
            stage[:] = piece
            self.send(target + begin, stage)
            self.wait()

    def download(self, array: NDArray[Any], source: int) -> None:
        """Fills a contiguous array from the device, through pinned memory, and waits."""
        for begin, piece, stage in self._pieces(array):
            self.fetch(stage, source + begin)
            self.wait()
            piece[:] = stage

    def _pieces(self, array: NDArray[Any]) -> Iterator[tuple[int, Bytes, Bytes]]:
        """Where each piece of an array begins, the piece, and pinned memory for it."""
        content = array.reshape(-1).view(np.uint8)
        if self._stage is None:
            self._stage = self.pinned(_STAGE_BYTES)
        for begin in range(0, content.nbytes, _STAGE_BYTES):
            piece = content[begin : begin + _STAGE_BYTES]
            yield begin, piece, self._stage[: len(piece)]

    def copy(self, target: int, source: int, size: int) -> None:
        """Copies within the device; the stream does it in its turn."""
        self._copy(target, source, size, self._kinds.cudaMemcpyDeviceToDevice)

    def clear(self, target: int, size: int) -> None:
        """Makes device memory zero; the stream does it in its turn."""
        self._do("clear memory", "cudaMemsetAsync", target, 0, size, self.stream)

    def mark(self, target: int, step: int, count: int) -> None:
        """Makes the byte at an address 1, and each that lies a step further; in its turn."""
        self._do("set memory", "cudaMemset2DAsync", target, step, 1, 1, count, self.stream)

    def wait(self) -> None:
        """Waits until the stream has done all."""
        self._do("run", "cudaStreamSynchronize", self.stream)

    def event(self) -> Any:
        """A point of time on the device."""
        event = self._do("make an event", "cudaEventCreate")
        self._hold("cudaEventDestroy", event)
        return event

    def record(self, event: Any) -> None:
        """Has an event take the time when the stream gets there."""
        self._do("record an event", "cudaEventRecord", event, self.stream)

    def elapsed_ms(self, begin: Any, end: Any) -> float:
        """Milliseconds between two events that have passed."""
        return float(self._do("read an event", "cudaEventElapsedTime", begin, end))

    def captured(self, work: Callable[[], None]) -> CapturedRun:
        """Records what ``work`` puts on the stream as a CUDA graph."""
        mode = self._rt.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._do("capture", "cudaStreamBeginCapture", self.stream, mode)
        try:
            work()
        except BaseException:
            self._rt.cudaStreamEndCapture(self.stream)  # leaves the stream usable
            self._rt.cudaGetLastError()
            raise
        graph = self._do("capture", "cudaStreamEndCapture", self.stream)
        try:
            ready = self._do("make a CUDA graph", "cudaGraphInstantiate", graph, 0)
        finally:
            self._rt.cudaGraphDestroy(graph)  # what was made of it is its own
        self._hold("cudaGraphExecDestroy", ready)
        launch, stream, refuse = self._rt.cudaGraphLaunch, self.stream, self._refuse
        return CapturedRun(
            lambda: refuse(launch(ready, stream)[0], "launch a CUDA graph"),
            lambda: self._give_back("cudaGraphExecDestroy", int(ready)),
        )

    def _hold(self, end: str, handle: Any) -> None:
        """What has to be given back, by the call that does it."""
        self._held[end, int(handle)] = handle

    def _give_back(self, end: str, number: int) -> None:
        if end == "cudaFree":
            self._sizes.pop(number, None)
        if self._stage is not None and self._stage.ctypes.data == number:
            self._stage = None
        handle = self._held.pop((end, number), None)
        if handle is not None:
            getattr(self._rt, end)(handle)

    def _copy(self, target: int, source: int, size: int, kind: Any) -> None:
        self._do("copy", "cudaMemcpyAsync", target, source, size, kind, self.stream)

    def _do(self, what: str, call: str, *arguments: Any) -> Any:
        """Calls the runtime and gives what it returns besides its code."""
        code, *result = getattr(self._rt, call)(*arguments)
        self._refuse(code, what)
        return result[0] if len(result) == 1 else result

    def _refuse(self, code: Any, what: str) -> None:
        if code != self._rt.cudaError_t.cudaSuccess:
            _, text = self._rt.cudaGetErrorString(code)
            said = text.decode() if isinstance(text, bytes) else text
            result = f"CUDA can't {what}: {said} ({int(code)})."
            if code == self._rt.cudaError_t.cudaErrorMemoryAllocation:
                raise BackendError(result, LESS_MEMORY, code=OUT_OF_MEMORY)
            raise BackendError(result, code="run-failed")
