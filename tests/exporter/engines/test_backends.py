"""ONNX Runtime as a backend: it runs where it was asked to, or says in one line why not."""

from __future__ import annotations

import gc
import sys
import time
import types
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from exporter.artifacts.latency import Shape
from exporter.engines.build import libraries as cuda_versions
from exporter.engines.build.libraries import Driver
from exporter.engines.runners import sessions
from exporter.engines.runners.onnxruntime import (
    OnnxRuntimeRunner,
    bfloat16_copy,
    device_value,
    host_array,
)
from exporter.engines.runners.sessions import RECORD_PLACEMENT, placement
from exporter.engines.tensors import make_inputs
from exporter.errors import BackendError, DepthcutError, MissingDependencyError
from tests.engine_support import CARD, bindings
from tests.raising import raises, tells
from tests.text_graphs import write_tiny_lm


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_lm(tmp_path) / "model.onnx"


def loaded(model: Path) -> OnnxRuntimeRunner:
    return OnnxRuntimeRunner(model, threads=1)


def inputs_for(runner: OnnxRuntimeRunner, tokens: list[int], past: int = 0) -> dict[str, Any]:
    shape = Shape("prefill", 1, len(tokens), past)
    return make_inputs(runner.inputs, shape, np.array([tokens]))


def test_specs_are_told_inside_the_block_and_threads_reach_the_session(model: Path) -> None:
    with raises(BackendError, "unknown-provider", "'npu'"):
        OnnxRuntimeRunner(model, provider="npu", threads=1)
    runner = OnnxRuntimeRunner(model, threads=2)
    with raises(BackendError, "not-entered"):
        _ = runner.inputs
    with runner:
        specs = {spec.name: spec for spec in (*runner.inputs, *runner.outputs)}
        assert runner._session.get_session_options().intra_op_num_threads == 2
    with raises(BackendError, "not-entered"):
        _ = runner.inputs
    assert specs["input_ids"].dtype == np.int64
    assert specs["past_key_values.1.value"].shape == ("batch", 2, "past", 4)
    assert specs["logits"].shape == ("batch", "seq", 32)
    assert runner.provider == "CPUExecutionProvider"


@pytest.mark.parametrize("past", [0, 3])
def test_run_gives_the_named_outputs(model: Path, past: int) -> None:
    with loaded(model) as runner:
        inputs = inputs_for(runner, [1, 2], past)
        every = runner.run(inputs)
        one = runner.run(inputs, ["logits"])
    assert set(every) == {"logits", *(f"present.{n}.{p}" for n in (0, 1) for p in ("key", "value"))}
    assert every["present.0.key"].shape == (1, 2, past + 2, 4)
    np.testing.assert_array_equal(one["logits"], every["logits"])


def test_prepared_call_runs_again_into_the_same_buffers(model: Path) -> None:
    with loaded(model) as runner, bindings() as bound:
        inputs = inputs_for(runner, [3, 4])
        call = runner.prepare(inputs)
        expected = runner.run(inputs, ["logits"])["logits"]
        addresses = set()
        for _ in range(3):
            output = bound[0].binding.get_outputs()[0]
            addresses.add(output.data_ptr())
            np.testing.assert_array_equal(expected, output.numpy())
            call()
    assert len(addresses) == 1


@pytest.mark.parametrize("dtype", [np.int64, np.int32])
def test_a_prepared_call_keeps_the_memory_that_it_reads(model: Path, dtype: type) -> None:
    with loaded(model) as runner:
        inputs = inputs_for(runner, [3, 4])
        inputs["input_ids"] = inputs["input_ids"].astype(dtype)
        alive = {name: weakref.ref(array) for name, array in inputs.items()}
        if dtype is np.int32:  # converted: the copy is the call's own
            del alive["input_ids"]
        call = runner.prepare(inputs)
        del inputs
        gc.collect()
        assert all(reference() is not None for reference in alive.values())
        call()


def test_converted_inputs_give_the_same_outputs(model: Path) -> None:
    with loaded(model) as runner:
        inputs = inputs_for(runner, [3, 4])
        expected = runner.run(inputs)["logits"]
        narrow = dict(inputs)
        for name, array in inputs.items():
            narrow[name] = array.astype(np.int32) if array.dtype == np.int64 else array
        for _ in range(20):
            np.testing.assert_array_equal(runner.run(narrow)["logits"], expected)


def test_missing_input_and_failed_run_are_one_line(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with loaded(model) as runner:
        inputs = inputs_for(runner, [1, 2])
        with raises(BackendError, "wrong-shape", "attention_mask"):
            runner.run({"input_ids": inputs["input_ids"]})
        bad = {**inputs, "input_ids": np.array([[1, 99]])}
        for use in (runner.run, runner.prepare):
            with raises(BackendError, "run-failed") as caught:
                use(bad)
            assert "\n" not in caught.value.message
            assert not tells(caught.value.message, "[ONNXRuntimeError]")
        session = mock.Mock(wraps=runner._session)
        monkeypatch.setattr(runner, "_session", session)
        call = runner.prepare(inputs)
        session.run_with_iobinding.side_effect = RuntimeError("[ONNXRuntimeError] : 1 : FAIL : no")
        with raises(BackendError, "run-failed", "no") as caught:  # a bound call, later
            call()
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (lambda graph, _: graph.write_bytes(graph.read_bytes()[: graph.stat().st_size // 2]),
         "incomplete-onnx"),
        (lambda graph, _: graph.write_bytes(b""), "incomplete-onnx"),
        (lambda _, data: data.unlink(), "data-missing"),
        (lambda _, data: data.write_bytes(b"1234"), "incomplete-onnx"),
        (lambda graph, _: write_tiny_lm(graph.parent, opset=99), "load-failed"),
        (lambda graph, _: graph.unlink(), "file-missing"),
    ],
)  # fmt: skip
def test_damaged_models_are_one_clear_line(
    model: Path, damage: Callable[[Path, Path], None], code: str
) -> None:
    damage(model, model.with_name("model.onnx.data"))
    with raises(DepthcutError, code, "model.onnx") as caught, loaded(model):
        pass
    assert "\n" not in str(caught.value)
    assert "onnxruntime_src" not in str(caught.value)


def fake_part(provider: str, *operators: str, domain: str = "") -> Any:
    """A part of a graph that one provider got."""
    nodes = [types.SimpleNamespace(op_type=name, domain=domain) for name in operators]
    return types.SimpleNamespace(ep_name=provider, get_nodes=lambda: nodes)


ON_GPU = fake_part("CUDAExecutionProvider", "MatMul", "Gather")


def fake_runtime(
    present: list[str], running: list[str], placed: list[Any] | None = None
) -> types.SimpleNamespace:
    """A runtime of which no session can run; ``placed`` is who got which nodes."""

    def session(_path: str, options: mock.Mock, **_kwargs: Any) -> Any:
        recorded = mock.call(RECORD_PLACEMENT, "1") in options.add_session_config_entry.mock_calls
        parts = [ON_GPU] if placed is None else placed if recorded else []
        return types.SimpleNamespace(
            get_providers=lambda: running, get_provider_graph_assignment_info=lambda: parts
        )

    return types.SimpleNamespace(
        get_available_providers=lambda: present,
        SessionOptions=mock.Mock,
        ExecutionMode=types.SimpleNamespace(ORT_SEQUENTIAL=0),
        InferenceSession=session,
        preload_dlls=lambda: None,
        __version__="0",
    )


BOTH = ["CUDAExecutionProvider", "CPUExecutionProvider"]


def cuda_runner(
    model: Path, monkeypatch: pytest.MonkeyPatch, placed: list[Any] | None = None,
    **runtime: list[str],
) -> OnnxRuntimeRunner:  # fmt: skip
    fake = fake_runtime(runtime.get("present", BOTH), runtime.get("running", BOTH), placed)
    monkeypatch.setattr(sessions, "require", lambda *_a, **_k: fake)
    return OnnxRuntimeRunner(model, provider="cuda", threads=1)


SHAPES = fake_part(BOTH[1], "Gather", "Concat", "Gather")  # arithmetic on them may run there


@pytest.mark.parametrize(
    ("placed", "runtime", "code", "named"),
    [
        (None, {}, "", ()),
        ([ON_GPU, SHAPES], {}, "", ()),
        (None, {"present": BOTH[1:]}, "provider-missing", ("CUDAExecutionProvider", BOTH[1])),
        (None, {"running": BOTH[1:]}, "provider-missing", BOTH),
        ([ON_GPU, fake_part(BOTH[1], "Concat", "MatMul", "MatMul", "Softmax")], {},
         "nodes-on-cpu", ("2 MatMul, 1 Softmax",)),
        ([ON_GPU, fake_part(BOTH[1], "Add", domain="com.microsoft")], {},
         "nodes-on-cpu", ("1 com.microsoft.Add",)),
        ([fake_part(BOTH[1], "Gather")], {}, "nodes-on-cpu", (BOTH[0],)),
    ],
)  # fmt: skip
def test_what_would_not_run_on_the_gpu_is_refused(
    model: Path, monkeypatch: pytest.MonkeyPatch, placed: list[Any] | None,
    runtime: dict[str, list[str]], code: str, named: tuple[str, ...],
) -> None:  # fmt: skip
    runner = cuda_runner(model, monkeypatch, placed, **runtime)
    if not code:
        with runner:
            assert runner.provider == BOTH[0]
        return
    with raises(BackendError, code, *named), runner:
        pass
    with raises(BackendError, "not-entered"):
        _ = runner.inputs


def test_a_runtime_that_keeps_no_record_is_refused_on_cuda(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = cuda_runner(model, monkeypatch, [])
    bare = types.SimpleNamespace(get_providers=lambda: BOTH)
    fake = sessions.require("onnxruntime", extra="gpu")
    monkeypatch.setattr(fake, "InferenceSession", lambda *_a, **_k: bare)
    with raises(BackendError, "provider-missing", BOTH[0], "onnxruntime-gpu"), runner:
        pass


def test_cuda_s_session_loads_its_libraries_and_has_no_tf32(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results: list[Any] = []
    fake = fake_runtime(BOTH, BOTH)
    fake.preload_dlls = lambda: print("Failed to load libcudnn.so.9")
    fake.InferenceSession = lambda *_a, **options: results.append(options)
    monkeypatch.setattr(sessions, "require", lambda *_a, **_k: fake)
    sessions.new_session(model, providers=BOTH)
    assert results[0]["provider_options"] == [{"use_tf32": "0"}, {}]
    assert "libcudnn" not in capsys.readouterr().out  # which may be a command's JSON
    monkeypatch.setattr(fake, "preload_dlls", lambda: pytest.fail("not for the CPU"))
    sessions.new_session(model)
    assert results[1]["provider_options"] == [{}]


def test_cuda_with_an_old_driver_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "ask_driver", lambda: Driver("", "12.8", (CARD,)))
    monkeypatch.setattr(cuda_versions, "built_for_cuda", {"onnxruntime-gpu": 13}.get)
    runner = cuda_runner(model, monkeypatch, [ON_GPU])
    with raises(BackendError, "no-driver", "onnxruntime-gpu", "12.8", "gpu-cu12"), runner:
        pass
    monkeypatch.setattr(cuda_versions, "built_for_cuda", {"onnxruntime-gpu": 12}.get)
    with runner:
        pass


def test_bfloat16_values_are_copied_to_a_device_and_back() -> None:
    """With the CPU as the device: what is left to show on a card is the copy itself."""
    import onnxruntime

    array = np.arange(6, dtype=np.float32).reshape(2, 3).astype("bfloat16")
    value = bfloat16_copy(onnxruntime.OrtValue, array, "cpu")
    assert value.data_type() == "tensor(bfloat16)"
    result = host_array(value)
    assert result.dtype == array.dtype
    np.testing.assert_array_equal(result, array)
    array[:] = 0  # a copy, not a view
    assert host_array(value)[1, 2] == 5
    plain = np.ones(2, np.float32)
    assert host_array(device_value(onnxruntime.OrtValue, plain, "cpu")).dtype == plain.dtype


def test_the_record_of_a_real_session_has_every_node(model: Path) -> None:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(RECORD_PLACEMENT, "1")
    providers = ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(str(model), options, providers=providers)
    counters = placement(session)
    assert set(counters) == set(providers)
    assert counters["CPUExecutionProvider"] == {
        "Gather": 1, "MatMul": 1, "Reshape": 1, "Transpose": 1, "Concat": 4,
    }  # fmt: skip


def test_a_missing_runtime_names_the_extra(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for provider, extra in (("cpu", "cpu"), ("cuda", "gpu")):
        with raises(MissingDependencyError, "", f"depthcut[{extra}]"):
            OnnxRuntimeRunner(model, provider=provider, threads=1).__enter__()


def test_threads_of_a_session_sleep_after_a_run(model: Path) -> None:
    with OnnxRuntimeRunner(model, threads=2) as runner:
        runner.run(inputs_for(runner, [1, 2, 3]))
        begin = time.process_time()
        time.sleep(0.05)
        assert time.process_time() - begin < 0.02  # ONNX Runtime's own default: all of it
