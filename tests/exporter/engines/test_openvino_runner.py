"""OpenVINO behind a runner: what ONNX Runtime gives, caches included."""

from __future__ import annotations

import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from exporter.artifacts.latency import Shape
from exporter.engines.decoding.generate import generate, open_decoder
from exporter.engines.runners.base import Runner
from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
from exporter.engines.runners.openvino import OpenVinoRunner
from exporter.engines.tensors import make_inputs, random_tokens
from exporter.errors import BackendError, MissingDependencyError
from graph_passes import Deletion, prune_graph
from tests.graph_passes.fused_graphs import FusedSpec, fused_model
from tests.raising import raises
from tests.text_graphs import TIED, write_tiny_lm, written
from tests.tiny_graphs import VOCABULARY, TinySpec, saved, tiny_model

SPEC = TinySpec()
SHAPES = (Shape("prefill", 2, 5), Shape("decode", 2, 1, 5), Shape("decode", 1, 3, 4))
openvino = pytest.mark.openvino


@pytest.fixture(params=["whole", "cut"])
def graph(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    model = tiny_model(SPEC)
    if request.param == "cut":
        model, _ = prune_graph(model, [Deletion(1, "attention"), Deletion(2, "block")])
    return saved(model, tmp_path)


def fed(runner: Runner, shape: Shape) -> dict[str, Any]:
    return make_inputs(runner.inputs, shape, random_tokens(shape, VOCABULARY))


@openvino
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_gives_what_onnx_runtime_gives(graph: Path, shape: Shape, padded: bool) -> None:
    with OpenVinoRunner(graph, threads=1) as runner, OnnxRuntimeRunner(graph, threads=1) as other:
        assert [s.name for s in runner.inputs] == [s.name for s in other.inputs]
        inputs = fed(other, shape)
        if padded:
            inputs["attention_mask"][0, :2] = 0
        got, wanted = (item.run(inputs) for item in (runner, other))
        assert list(got) == [spec.name for spec in other.outputs]
        real = inputs["attention_mask"][:, -shape.sequence_length :].astype(bool)
        for name, array in wanted.items():
            rows = (got[name], array) if array.ndim != 3 else (got[name][real], array[real])
            np.testing.assert_allclose(*rows, rtol=1e-4, atol=1e-5, err_msg=name)


@openvino
def test_calls_that_are_timed_run_in_turns(graph: Path) -> None:
    with OpenVinoRunner(graph, threads=2) as runner:
        calls = [runner.prepare(fed(runner, shape), phase=shape.phase) for shape in SHAPES]
        for call in (*calls, *calls):
            call()


@openvino
def test_what_it_gave_stays(graph: Path) -> None:
    with OpenVinoRunner(graph, threads=1) as runner:
        inputs = fed(runner, SHAPES[0])
        first = runner.run(inputs)["logits"]
        kept = first.copy()
        runner.run({**inputs, "input_ids": inputs["input_ids"] * 0})
        np.testing.assert_array_equal(first, kept)


class _Watched:
    """A request that looks whether the arrays which it borrows are alive while it runs."""

    def __init__(self, request: Any, tensor: Any) -> None:
        self._request, self._tensor = request, tensor
        self._borrowed: list[weakref.ref[Any]] = []
        self.get_tensor = request.get_tensor
        self.set_tensor = request.set_tensor

    def Tensor(self, array: Any, *, shared_memory: bool) -> Any:
        assert shared_memory
        self._borrowed.append(weakref.ref(array))
        return self._tensor(array, shared_memory=True)

    def infer(self) -> None:
        assert self._borrowed
        assert all(item() is not None for item in self._borrowed)
        self._request.infer()


@openvino
def test_inputs_that_must_be_copied_stay_while_it_runs(
    graph: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with OpenVinoRunner(graph, threads=1) as runner:
        inputs = fed(runner, SHAPES[0])
        wanted = runner.run(inputs)["logits"]
        inputs["input_ids"] = np.asfortranarray(inputs["input_ids"].astype(np.int32))
        watched = _Watched(runner._request, runner._library.Tensor)
        monkeypatch.setattr(runner, "_request", watched)
        monkeypatch.setattr(runner, "_library", watched)
        np.testing.assert_array_equal(runner.run(inputs)["logits"], wanted)


@openvino
def test_it_generates(graph: Path) -> None:
    result = []
    for name in (f"openvino:{graph}", graph):
        with open_decoder(name, threads=1) as decoder:
            result.append(generate(decoder, [3, 1, 4], new_tokens=5).token_ids)
    assert result[0] == result[1]


@openvino
def test_what_it_doesnt_load(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"\x08\x0anothing")
    with raises(BackendError, "load-failed", broken, "--target portable"):
        OpenVinoRunner(broken, threads=1).__enter__()
    fused = saved(fused_model(FusedSpec()), tmp_path / "fused")
    with raises(BackendError, "load-failed", fused, "--target portable"):
        OpenVinoRunner(fused, threads=1).__enter__()
    narrow = written(TIED, tmp_path / "narrow.onnx", kind=ir.DataType.BFLOAT16)
    runner = OpenVinoRunner(narrow, threads=1)
    with runner, raises(BackendError, "unknown-input", narrow, "logits"):
        _ends(runner)


def _ends(runner: Runner) -> None:
    assert runner.inputs
    assert runner.outputs


@openvino
def test_a_call_that_fails(graph: Path) -> None:
    with OpenVinoRunner(graph, threads=1) as runner:
        inputs = fed(runner, SHAPES[1])
        flat = {**inputs, "input_ids": inputs["input_ids"][0]}
        with raises(BackendError, "run-failed", graph):
            runner.run(flat)
        with raises(BackendError, "wrong-shape", "input_ids"):
            runner.run({name: array for name, array in inputs.items() if name != "input_ids"})


def test_what_it_doesnt_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tiny_lm(tmp_path) / "model.onnx"
    with raises(BackendError, "unknown-provider", "cuda", "openvino"):
        OpenVinoRunner(path, provider="cuda", threads=1)
    with raises(BackendError, "not-entered", path):
        _ends(OpenVinoRunner(path, threads=1))
    monkeypatch.setitem(sys.modules, "openvino", None)
    with raises(MissingDependencyError, "", "openvino", "depthcut[openvino]"):
        OpenVinoRunner(path, threads=1).__enter__()
