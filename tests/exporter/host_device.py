"""A device that is host memory, and engines that are ONNX graphs: what a decoder tells a session.

Addresses are real, so what is bound, sent and cleared is what the graph reads. An output that has
to lie where its input does must be bound there.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
from engine_support import record

from exporter.engines.build.engine_set import EngineSet, Slot
from exporter.engines.build.profiles import Ranges, fitting, graph_inputs, graph_outputs, profile
from exporter.engines.build.sidecar import EngineTensor
from exporter.engines.decoding.tensorrt_decoder import TensorRtDecoder
from exporter.engines.runners import tensorrt
from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
from exporter.engines.tensors import numpy_dtype

_DIRT = 0xFF  # as float32: NaN


def engines_of(onnx: Path, ranges: Ranges) -> EngineSet:
    """What an engine of the graph would say of itself, with both phases in it."""
    inputs, outputs = graph_inputs(onnx), graph_outputs(onnx)
    fit = fitting(inputs, ranges)
    entries = [profile(inputs, phase, fit) for phase in ("prefill", "decode")]
    given, made = ([EngineTensor.of(spec) for spec in ends] for ends in (inputs, outputs))
    return EngineSet((onnx,), (record(profiles=entries, inputs=given, outputs=made),))


class HostCuda:
    """The calls of :class:`exporter.engines.build.cuda.Cuda` that a decoder makes."""

    def __init__(self) -> None:
        self.blocks: list[np.ndarray[Any, Any]] = []
        self.sent = 0

    def allocate(self, size: int, what: str) -> int:
        self.blocks.append(np.full(size, _DIRT, np.uint8))
        return int(self.blocks[-1].ctypes.data)

    def pinned(self, size: int) -> np.ndarray[Any, Any]:
        return np.full(size, _DIRT, np.uint8)

    def send(self, target: int, source: np.ndarray[Any, Any]) -> None:
        self.sent += source.nbytes
        ctypes.memmove(target, source.ctypes.data, source.nbytes)

    def upload(self, target: int, array: np.ndarray[Any, Any]) -> None:
        self.send(target, np.ascontiguousarray(array))

    def fetch(self, target: np.ndarray[Any, Any], source: int) -> None:
        ctypes.memmove(target.ctypes.data, source, target.nbytes)

    def clear(self, target: int, size: int) -> None:
        ctypes.memset(target, 0, size)

    def mark(self, target: int, step: int, count: int) -> None:
        for number in range(count):
            ctypes.memset(target + number * step, 1, 1)

    def wait(self) -> None:
        pass


class HostProfile:
    """A profile whose run is the graph's in ONNX Runtime."""

    def __init__(self, slot: Slot, session: HostSession) -> None:
        self.slot = slot
        self._session = session
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self.told = 0

    def set_shapes(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self._shapes = dict(shapes)
        self.told += 1

    def bind(self, name: str, address: int) -> None:
        self._addresses[name] = address

    def output_shape(self, name: str) -> tuple[int, ...]:
        batch, sequence = self._shapes["input_ids"]
        (shape,) = (t.shape for t in self._session.engines.outputs if t.name == name)
        return batch, sequence, shape[-1]

    def enqueue(self) -> None:
        inputs = {
            each.name: self._memory(each, self._shapes[each.name]).copy()
            for each in self._session.engines.inputs
        }
        found = self._session.runner.run(inputs)
        for each in self._session.engines.outputs:
            past = each.name.replace("present", "past_key_values")
            if self._session.in_place and past in self._addresses:
                assert self._addresses[each.name] == self._addresses[past]
            array = found[each.name]
            self._memory(each, array.shape)[...] = array

    def _memory(self, tensor: EngineTensor, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        dtype = numpy_dtype(tensor.dtype)
        size = dtype.itemsize * int(np.prod(shape))
        content = (ctypes.c_uint8 * size).from_address(self._addresses[tensor.name])
        return np.frombuffer(content, dtype).reshape(shape)


class HostSession:
    """See :class:`exporter.engines.build.session.Session`."""

    def __init__(self, engines: EngineSet, *, fixed_shapes: Any) -> None:
        self.engines = engines
        self.fixed_shapes = fixed_shapes
        self.in_place = all(each.shape[2] > 0 for each in engines.inputs if "past" in each.name)
        self.cuda = HostCuda()
        self.used_bytes = 0

    def __enter__(self) -> Self:
        self.runner = OnnxRuntimeRunner(self.engines.paths[0], threads=1)
        self.runner.__enter__()
        self.profiles = [HostProfile(slot, self) for slot in self.engines.slots]
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.runner.__exit__()


@contextmanager
def decoder_of(
    onnx: Path, ranges: Ranges, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[TensorRtDecoder, HostSession]]:
    """An entered decoder, and the session that it made."""
    made: list[HostSession] = []

    def session(engines: EngineSet, *, fixed_shapes: Any) -> HostSession:
        made.append(HostSession(engines, fixed_shapes=fixed_shapes))
        return made[-1]

    monkeypatch.setattr(tensorrt, "Session", session)
    with TensorRtDecoder(engines_of(onnx, ranges), trial=False) as decoder:
        yield decoder, made[0]
