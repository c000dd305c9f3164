"""Engines that TensorRT-RTX really built, compared where there is no GPU for them."""

from __future__ import annotations

from pathlib import Path

import pytest

from exporter.compare import kinds as engine_arm
from exporter.compare.options import CompareOptions
from exporter.compare.session import compare
from exporter.engines.build.build import build_engines
from exporter.engines.build.libraries import Driver
from exporter.engines.build.profiles import Ranges, Span
from exporter.engines.build.settings import BuildSettings
from graph_passes import Deletion, prune_graph, save_model
from tests.tiny_graphs import TinySpec, tiny_model

pytestmark = pytest.mark.rtx

SM89 = BuildSettings(compute_capabilities=("sm89",))
SMALL = Ranges(prompt=Span(1, 4, 16), context=Span(1, 4, 16))
OPTIONS = CompareOptions(
    threads=1,
    prefill_lengths=(4,),
    decode_past_lengths=(),
    rounds=2,
    eval_tokens=32,
    eval_sequence_length=16,
)


@pytest.fixture(autouse=True)
def without_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_arm, "ask_driver", lambda: Driver("no NVIDIA driver"))


def test_builds_are_told_beside_what_onnx_runtime_measures(tmp_path: Path) -> None:
    whole = tiny_model(TinySpec(layers=4))
    cut, _ = prune_graph(whole, [Deletion(1, "attention"), Deletion(2, "attention")])
    for name, graph, builds in (("baseline", whole, 2), ("candidate", cut, 1)):
        (tmp_path / name).mkdir()
        save_model(graph, tmp_path / name / "model.onnx")
        build_engines(
            tmp_path / name / "model.onnx",
            tmp_path / "engines" / name,
            builds=builds,
            phases=["prefill"],
            ranges=SMALL,
            settings=SM89,
        )
    report = compare(tmp_path / "engines/baseline", tmp_path / "engines/candidate", OPTIONS)
    first, second = report.arms.baseline, report.arms.candidate
    assert [Path(engine.path).stem[-3:] for engine in first.engines] == ["-b1", "-b2"]
    assert first.backend == second.backend == "onnxruntime"
    smaller = max(engine.engine_bytes for engine in second.engines)
    assert all(engine.engine_bytes > smaller for engine in first.engines)
    layers = [sum(arm.engines[0].layers.values()) for arm in (first, second)]
    assert layers[0] > layers[1]
    assert {deletion.layer for deletion in report.plan} == {1, 2}
    assert len(report.latency) == 1
    assert report.accuracy is not None
