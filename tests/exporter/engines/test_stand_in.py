"""The stand-in for a card: each rule that it holds its user to, kept and broken."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from exporter.engines.tensors import byte_count
from tests.stand_in import trt
from tests.stand_in.cuda import CudaRuntime, cudaError_t
from tests.stand_in.decoders import decoder_engine
from tests.stand_in.machine import Machine, RuleError

OK = cudaError_t.cudaSuccess
CACHES = [f"past_key_values.{n}.{part}" for n in (0, 1) for part in ("key", "value")]


class Loaded:
    """An engine, a context on its decode profile, and memory for each tensor."""

    def __init__(self, engine: Path, **facts: Any) -> None:
        self.machine = Machine(**facts)
        self.cuda = CudaRuntime(self.machine)
        self.stream = self.cuda.cudaStreamCreateWithFlags(1)[1]
        self.said: list[str] = []
        logger = SimpleNamespace(log=lambda severity, text: self.said.append(text))
        self.module = trt.module_of(self.machine, "tensorrt")
        self.engine = self.module.Runtime(logger).deserialize_cuda_engine(engine.read_bytes())
        assert self.engine is not None
        self.context = self.new_context(1)
        self.places = {}
        for name, (dtype, dims) in {**self.engine.ends.inputs, **self.engine.ends.outputs}.items():
            size = byte_count(dtype, [d if isinstance(d, int) else 32 for d in dims])
            self.places[name] = self.cuda.cudaMalloc(size)[1]
        for output, source in self.engine.ends.aliases.items():
            self.places[output] = self.places[source]
        for address, block in self.machine.blocks.items():
            assert address
            block[:] = 0

    def new_context(self, profile: int, stream: int | None = None) -> Any:
        context = self.engine.create_execution_context()
        chosen = context.set_optimization_profile_async(profile, stream or self.stream)
        return context if chosen else None

    def tell(self, batch: int = 1, *, without: str = "") -> None:
        shapes = {
            "input_ids": (batch, 1),
            "attention_mask": (batch, 32),
            "position_ids": (batch, 1),
        }
        shapes |= dict.fromkeys(CACHES, (batch, 2, 32, 32))
        for name, shape in shapes.items():
            if name != without:
                assert self.context.set_input_shape(name, shape)
        for name, address in self.places.items():
            if name != without:
                assert self.context.set_tensor_address(name, address)

    def run(self) -> bool:
        done: bool = self.context.execute_async_v3(self.stream)
        return done

    def wait(self) -> Any:
        return self.cuda.cudaStreamSynchronize(self.stream)[0]

    def captured(self) -> tuple[Any, ...]:
        self.cuda.cudaStreamBeginCapture(self.stream, 1)
        self.run()
        return self.cuda.cudaStreamEndCapture(self.stream)


@pytest.fixture
def loaded(tmp_path: Path) -> Loaded:
    return Loaded(decoder_engine(tmp_path))


def is_chosen_elsewhere(it: Loaded) -> None:
    del it.context
    it.context = it.new_context(1, it.cuda.cudaStreamCreateWithFlags(1)[1])
    it.tell()
    it.run()


def told(it: Loaded, name: str, address: int) -> None:
    it.context.set_tensor_address(name, address)
    it.run()


@pytest.mark.parametrize(
    ("breaks", "rule"),
    [
        (lambda it: told(it, "logits", it.places["input_ids"]), "logits"),  # they overlap
        (lambda it: told(it, "present.0.key", it.cuda.cudaMalloc(2 * 32 * 32 * 4)[1]),
         "present.0.key"),
        (lambda it: (it.cuda.cudaFree(it.places["logits"]), it.run()), "device memory"),
        (lambda it: told(it, "logits", it.places["logits"] + 8), "256"),
        (lambda it: it.cuda.cudaMemcpyAsync(
            it.places["logits"], it.cuda.cudaMallocHost(256)[1] + 1, 256, 1, it.stream),
         "pinned"),
        (is_chosen_elsewhere, "another stream"),
    ],
)  # fmt: skip
def test_a_rule_that_is_broken_is_told_and_kept_it_runs(
    breaks: Callable[[Loaded], object], rule: str, loaded: Loaded
) -> None:
    loaded.tell()
    assert loaded.run()
    assert loaded.machine.runs == []  # until the stream is waited for
    assert loaded.wait() == OK
    assert [run.profile for run in loaded.machine.runs] == [1]
    with pytest.raises(RuleError, match=re.escape(rule)):
        breaks(loaded)


def test_what_the_library_refuses(loaded: Loaded) -> None:
    assert not loaded.context.set_input_shape("input_ids", (1, 2))
    assert "input_ids" in loaded.said[-1]
    loaded.tell(without="input_ids")
    assert not loaded.run()
    loaded.context.set_input_shape("input_ids", (1, 1))
    assert not loaded.run()
    loaded.context.set_tensor_address("input_ids", loaded.places["input_ids"])
    assert loaded.run()
    assert loaded.new_context(1) is None
    left = loaded.machine.free_bytes
    assert loaded.cuda.cudaMalloc(left)[0] == OK
    assert loaded.cuda.cudaMalloc(1)[0] == cudaError_t.cudaErrorMemoryAllocation
    assert loaded.new_context(0) is None
    assert "OutOfMemory" in loaded.said[-1]


def test_a_capture_comes_after_a_run_at_the_same_shapes(loaded: Loaded) -> None:
    loaded.tell()
    assert loaded.captured()[0] == cudaError_t.cudaErrorStreamCaptureInvalidated
    assert loaded.run()
    code, graph = loaded.captured()
    assert code == OK
    loaded.tell(batch=2)
    assert loaded.captured()[0] == cudaError_t.cudaErrorStreamCaptureInvalidated
    ready = loaded.cuda.cudaGraphInstantiate(graph, 0)[1]
    loaded.cuda.cudaGraphLaunch(ready, loaded.stream)
    loaded.wait()
    assert loaded.machine.runs[-1].shapes["input_ids"] == (1, 1)  # as it was captured
    assert loaded.machine.runs[-1].as_graph
    loaded.cuda.cudaStreamBeginCapture(loaded.stream, 1)
    assert loaded.cuda.cudaMalloc(16)[0] == cudaError_t.cudaErrorStreamCaptureUnsupported
    code, _ = loaded.cuda.cudaStreamEndCapture(loaded.stream)
    assert code == cudaError_t.cudaErrorStreamCaptureInvalidated


@pytest.mark.rtx
def test_it_has_no_name_that_the_real_libraries_lack() -> None:
    import tensorrt_rtx as real

    own = trt.module_of(Machine(), "tensorrt-rtx")
    for name in vars(own):
        assert hasattr(real, name), name
    kinds = (trt.ICudaEngine, trt.IExecutionContext, trt.IRuntimeConfig, trt.IRuntimeCache)
    for kind in kinds:
        calls = {name for name, var in vars(kind).items() if callable(var)}
        # What the stand-in needs besides begins with _ or is no call of the library's.
        strange = {n for n in calls if n[0] != "_" and not hasattr(getattr(real, kind.__name__), n)}
        assert strange <= {"graph", "compile"}, kind
    runtime = pytest.importorskip("cuda.bindings.runtime")
    from tests.stand_in.cuda import _Calls

    names = [f"cuda{name}" for name in vars(_Calls) if not name.startswith("_")]
    assert [name for name in names if not hasattr(runtime, name)] == []
    for item in cudaError_t:
        assert int(getattr(runtime.cudaError_t, item.name)) == item.value
