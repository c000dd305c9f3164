"""The stand-in for a card: each rule that it holds its user to, kept and broken."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from exporter.artifacts.latency import Shape
from exporter.engines.inputs import make_inputs, random_tokens
from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
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


def test_what_is_told_in_full_runs_when_the_stream_is_waited_for(loaded: Loaded) -> None:
    loaded.tell()
    assert loaded.run()
    assert loaded.machine.runs == []
    assert loaded.wait() == OK
    assert [run.profile for run in loaded.machine.runs] == [1]


def test_a_shape_outside_the_profile_is_refused(loaded: Loaded) -> None:
    assert not loaded.context.set_input_shape("input_ids", (1, 2))
    assert "input_ids" in loaded.said[-1]


def test_without_a_shape_or_an_address_nothing_runs(loaded: Loaded) -> None:
    loaded.tell(without="input_ids")
    assert not loaded.run()
    loaded.context.set_input_shape("input_ids", (1, 1))
    assert not loaded.run()
    loaded.context.set_tensor_address("input_ids", loaded.places["input_ids"])
    assert loaded.run()


def test_an_aliased_output_lies_where_its_input_does(loaded: Loaded) -> None:
    loaded.tell()
    elsewhere = loaded.cuda.cudaMalloc(2 * 32 * 32 * 4)[1]
    loaded.context.set_tensor_address("present.0.key", elsewhere)
    with pytest.raises(RuleError, match=r"present\.0\.key"):
        loaded.run()


def test_tensors_do_not_overlap_and_lie_in_memory(loaded: Loaded) -> None:
    loaded.tell()
    loaded.context.set_tensor_address("logits", loaded.places["input_ids"])
    with pytest.raises(RuleError, match="logits"):
        loaded.run()
    with pytest.raises(RuleError, match="256"):
        loaded.context.set_tensor_address("logits", loaded.places["logits"] + 8)
    loaded.cuda.cudaFree(loaded.places["logits"])
    loaded.context.set_tensor_address("logits", loaded.places["logits"])
    with pytest.raises(RuleError, match="device memory"):
        loaded.run()


def test_one_context_holds_a_profile(loaded: Loaded) -> None:
    assert loaded.new_context(1) is None
    assert loaded.new_context(0) is not None


def test_a_profile_is_chosen_on_the_stream_that_runs_or_waited_for(loaded: Loaded) -> None:
    other = loaded.cuda.cudaStreamCreateWithFlags(1)[1]
    loaded.wait()
    del loaded.context
    loaded.context = loaded.new_context(1, other)
    loaded.tell()
    with pytest.raises(RuleError, match="another stream"):
        loaded.run()
    loaded.cuda.cudaStreamSynchronize(other)
    assert loaded.run()


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


@pytest.mark.parametrize(
    "call",
    [
        lambda it: it.cuda.cudaMalloc(16),
        lambda it: it.cuda.cudaFree(it.places["logits"]),
        lambda it: it.cuda.cudaStreamSynchronize(it.stream),
    ],
)
def test_what_breaks_a_capture(call: Any, loaded: Loaded) -> None:
    loaded.tell()
    loaded.run()
    loaded.wait()
    loaded.cuda.cudaStreamBeginCapture(loaded.stream, 1)
    assert call(loaded)[0] == cudaError_t.cudaErrorStreamCaptureUnsupported
    code, _ = loaded.cuda.cudaStreamEndCapture(loaded.stream)
    assert code == cudaError_t.cudaErrorStreamCaptureInvalidated


def test_copies_take_what_is_there_when_the_stream_comes_to_them(loaded: Loaded) -> None:
    pinned = loaded.cuda.cudaMallocHost(256)[1]
    loaded.machine.pinned[pinned][:] = 1
    target = loaded.places["logits"]
    loaded.cuda.cudaMemcpyAsync(target, pinned, 256, 1, loaded.stream)
    loaded.machine.pinned[pinned][:] = 2
    loaded.wait()
    assert set(loaded.machine.on_device(target, 256)) == {2}
    with pytest.raises(RuleError, match="pinned"):
        loaded.cuda.cudaMemcpyAsync(target, pinned + 1, 256, 1, loaded.stream)


def test_an_event_is_read_once_it_has_passed_and_tells_the_device_s_time(loaded: Loaded) -> None:
    begin, end = (loaded.cuda.cudaEventCreate()[1] for _ in range(2))
    loaded.tell()
    loaded.cuda.cudaEventRecord(begin, loaded.stream)
    loaded.run()
    loaded.cuda.cudaEventRecord(end, loaded.stream)
    code, _ = loaded.cuda.cudaEventElapsedTime(begin, end)
    assert code == cudaError_t.cudaErrorNotReady
    loaded.wait()
    assert loaded.cuda.cudaEventElapsedTime(begin, end)[1] > 0


def test_memory_runs_out(tmp_path: Path) -> None:
    engine = decoder_engine(tmp_path)
    loaded = Loaded(engine, memory_bytes=1 << 20)
    left = loaded.machine.free_bytes
    assert loaded.cuda.cudaMalloc(left)[0] == OK
    assert loaded.cuda.cudaMalloc(1)[0] == cudaError_t.cudaErrorMemoryAllocation
    assert loaded.new_context(0) is None
    assert "OutOfMemory" in loaded.said[-1]


def test_it_computes_what_the_graph_does(tmp_path: Path) -> None:
    loaded = Loaded(decoder_engine(tmp_path))
    shape = Shape("decode", 1, 1, 20)
    with OnnxRuntimeRunner(tmp_path / "model.onnx", threads=1) as runner:
        inputs = make_inputs(runner.inputs, shape, random_tokens(shape, 11))
        room = runner.cache_form.with_room(inputs)
        given = {**inputs, **room}
        wanted = runner.run(given, ["logits"])["logits"]
    for name, array in given.items():
        place = loaded.machine.on_device(loaded.places[name], array.nbytes)
        place.view(array.dtype).reshape(array.shape)[...] = array
    loaded.tell()
    loaded.run()
    loaded.wait()
    found = loaded.machine.on_device(loaded.places["logits"], wanted.nbytes)
    assert abs(found.view(wanted.dtype) - wanted.ravel()).max() < 1e-5


@pytest.mark.rtx
def test_it_has_no_name_that_the_real_libraries_lack() -> None:
    import tensorrt_rtx as real

    own = trt.module_of(Machine(), "tensorrt-rtx")
    for name in vars(own):
        assert hasattr(real, name), name
    kinds = (trt.ICudaEngine, trt.IExecutionContext, trt.IRuntimeConfig, trt.IRuntimeCache)
    for kind in kinds:
        calls = {name for name, each in vars(kind).items() if callable(each)}
        # What the stand-in needs besides begins with _ or is no call of the library's.
        strange = {n for n in calls if n[0] != "_" and not hasattr(getattr(real, kind.__name__), n)}
        assert strange <= {"graph", "compile"}, kind
    runtime = pytest.importorskip("cuda.bindings.runtime")
    from tests.stand_in.cuda import _Calls

    names = [f"cuda{name}" for name in vars(_Calls) if not name.startswith("_")]
    assert [name for name in names if not hasattr(runtime, name)] == []
    for each in cudaError_t:
        assert int(getattr(runtime.cudaError_t, each.name)) == each.value
