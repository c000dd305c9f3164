"""Who generates or times asks for the last position's logits alone, who judges for all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.artifacts.latency import Shape
from exporter.engines.decoding.runner_decoder import OnnxRuntimeDecoder
from exporter.engines.inputs import make_inputs
from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
from graph_passes import save_model
from graph_passes.fusing.logits_to_keep import KEEP, LogitsToKeepPass
from tests.graph_passes.fused_graphs import VOCABULARY, FusedSpec, fused_model

IDS = np.array([[3, 1, 4, 1, 5], [2, 7, 1, 8, 2]])


@pytest.fixture(scope="module", params=[True, False], ids=["choice", "none"])
def path(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bool]:
    model = fused_model(FusedSpec())
    if request.param:
        assert LogitsToKeepPass()(model).modified
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    save_model(model, path)
    return path, request.param


def test_a_run_gives_all(path: tuple[Path, bool]) -> None:
    with OnnxRuntimeRunner(path[0], threads=1) as runner:
        inputs = make_inputs(runner.inputs, Shape("prefill", 2, 5), IDS)
        assert KEEP not in inputs
        assert runner.run(inputs)["logits"].shape == (2, 5, VOCABULARY)


@pytest.mark.parametrize("past", [0, 4])
def test_a_timed_call_gives_the_last(
    path: tuple[Path, bool], past: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = 1 if past else 5
    bound: list[Any] = []
    real = OnnxRuntimeRunner._bound_inputs
    monkeypatch.setattr(
        OnnxRuntimeRunner,
        "_bound_inputs",
        lambda self, inputs: bound.append(real(self, inputs)) or bound[-1],  # type: ignore[func-returns-value]
    )
    with OnnxRuntimeRunner(path[0], threads=1) as runner:
        inputs = make_inputs(runner.inputs, Shape("decode", 2, new, past), IDS[:, :new])
        call = runner.prepare(inputs)
        call()
        logits = bound[0].binding.get_outputs()[0].numpy()
        wanted = runner.run(inputs, ["logits"])["logits"]
    assert logits.shape == (2, 1 if path[1] else new, VOCABULARY)
    assert np.abs(logits[:, -1] - wanted[:, -1]).max() <= 1e-5


def test_a_decoder_asks_for_the_last(
    path: tuple[Path, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    with OnnxRuntimeDecoder(path[0], threads=1) as decoder:
        lengths: list[int] = []
        real = decoder.cache.run

        def watched(*call: Any) -> Any:
            logits = real(*call)
            lengths.append(logits.shape[1])
            return logits

        monkeypatch.setattr(decoder.cache, "run", watched)
        result = [decoder.prefill(IDS, context=7)]
        result += [decoder.step(IDS[:, :1]), decoder.step(IDS[:, 1:2])]
    assert lengths == [1 if path[1] else 5, 1, 1]
    with OnnxRuntimeRunner(path[0], threads=1) as runner:
        ids = np.concatenate([IDS, IDS[:, :2]], axis=1)
        wanted = runner.run(make_inputs(runner.inputs, Shape("prefill", 2, 7), ids))["logits"]
    assert np.abs(np.stack(result, axis=1) - wanted[:, 4:]).max() <= 1e-5
