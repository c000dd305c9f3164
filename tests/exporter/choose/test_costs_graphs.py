"""Costs of tiny graphs' sublayers on ONNX Runtime, and of finished candidates."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest

from exporter.artifacts import Speedup
from exporter.choose.budgets.candidates import PlanCandidate
from exporter.choose.budgets.target_speedup import Stopwatch
from exporter.choose.costs.cost_runners import OnnxCostRunner, cut_for_a_while
from exporter.choose.costs.measuring import CostSettings, measure_costs
from exporter.choose.costs.request_shape import RequestShape
from exporter.choose.costs.table import CostTable, groups_of, variants
from exporter.choose.costs.timing import Effort
from exporter.choose.costs.weighing import sizes
from exporter.choose.selection.options import Option
from exporter.errors import CostError
from graph_passes.types import SublayerRef
from tests.raising import raises
from tests.tiny_graphs import TinySpec, tiny_model


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder whose weights lie in a data file."""
    path = tmp_path_factory.mktemp("whole") / "model.onnx"
    ir.save(
        tiny_model(TinySpec(layers=4)), path, external_data="model.onnx.data",
        size_threshold_bytes=128,
    )  # fmt: skip
    path.with_name("config.json").write_text('{"max_position_embeddings": 64}')
    return path


@pytest.mark.parametrize(
    ("told", "longest"),
    [('{"max_seq_length": 32}', 32), ("{}", None), ('{"max_seq_length": true}', None)],
)
def test_a_graph_s_folder_says_where_its_users_cut_texts(
    tmp_path: Path, told: str, longest: int | None
) -> None:
    ir.save(tiny_model(TinySpec(layers=2)), tmp_path / "model.onnx")
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 64}')
    (tmp_path / "sentence_bert_config.json").write_text(told)
    result = sizes(tmp_path / "model.onnx")
    assert (result.longest, result.longest_text) == (64, longest)


QUICK = Effort(seconds=0.3, rounds=2, reload=False)


def test_a_graph_is_measured_and_the_folder_is_left_clean(graph: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    before = sorted(graph.parent.iterdir())
    kept = tmp_path / "costs.json"
    table = measure_costs(
        graph,
        CostSettings(RequestShape(2, 4, 2), threads=1, effort=QUICK, kept=kept),
        folder=tmp_path / "work",
    )
    assert sorted(graph.parent.iterdir()) == before
    assert list((tmp_path / "work").iterdir()) == []
    assert len(table.names) == 8
    assert all(
        table.saved_ms(name, how) < table.baseline_ms
        for name in table.names for how in ("none", "bias", "linear")
    )  # fmt: skip
    (trial, *_) = table.groups[0].trials
    assert [(row.phase, row.batch, row.past_length) for row in trial.rows] == [
        ("prefill", 2, 0), ("decode", 2, 4), ("decode", 2, 5),
    ]  # fmt: skip

    def again(model: Path, at: RequestShape, threads: int = 1) -> CostTable:
        cost_settings = CostSettings(
            at, threads=threads, effort=QUICK, kept=kept, may_replace=False
        )
        return measure_costs(model, cost_settings, folder=tmp_path / "work")

    assert again(graph, RequestShape(2, 4, 2)) == table
    with raises(CostError, "other-conditions", "batch=2,prompt=4,new=2", "batch=2,prompt=4,new=3"):
        again(graph, RequestShape(2, 4, 3))
    with raises(CostError, "other-conditions", "threads", 1, 2):
        again(graph, RequestShape(2, 4, 2), threads=2)
    other = tmp_path / "other.onnx"
    ir.save(tiny_model(TinySpec(layers=4), seed=1), other)
    with raises(CostError, "another-model", kept):
        again(other, RequestShape(2, 4, 2))


def test_a_variant_shares_its_weights_where_it_can(graph: Path, tmp_path: Path) -> None:
    sizes = OnnxCostRunner(graph, tmp_path).sizes
    group = groups_of(sizes, [(0, "mlp")])[0]
    variant = variants(group, sizes, ("none", "linear"))[1]
    with cut_for_a_while(graph, tmp_path, variant, sizes) as pruned:
        assert pruned.with_name("model.onnx.data").samefile(graph.with_name("model.onnx.data"))
        names = [n.name for n in ir.load(pruned).graph if "depthcut.mlp.1" in (n.name or "")]
        assert len(names) == 2  # the product, and the sum with the bias
    assert not pruned.parent.exists()
    alone = tmp_path / "alone.onnx"
    ir.save(tiny_model(TinySpec(layers=4)), alone)
    with cut_for_a_while(alone, tmp_path, variant, sizes) as pruned:
        assert pruned.exists()


def test_a_candidate_is_timed_against_the_whole_graph(graph: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    cut = PlanCandidate(tuple(Option((SublayerRef(n, "mlp"),)) for n in (1, 2)))

    def timed(at: RequestShape) -> Speedup:
        kept = tmp_path / "costs.json"
        watch = Stopwatch(graph, at, kept, tmp_path / "work", threads=1, candidates=QUICK)
        return watch.speedup(cut)

    result = timed(RequestShape(1, 4, 3))
    assert result.ci95[0] <= result.ratio <= result.ci95[1]
    assert list((tmp_path / "work").iterdir()) == []
    with raises(CostError, "context-too-long", 64, 65):
        timed(RequestShape(1, 60, 5))


def test_a_graph_without_a_cache_is_measured_on_its_input(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    path = tmp_path / "encoder.onnx"
    ir.save(tiny_model(TinySpec("post_norm", cache=False)), path)
    table = measure_costs(
        path,
        CostSettings(RequestShape(1, 8, 0), threads=1, replacements=("none",), effort=QUICK),
        [(1, "mlp")],
    )
    assert table.groups[0].trials[0].rows[0].phase == "encode"
    with raises(CostError, "no-kv-cache", 2):
        measure_costs(path, CostSettings(RequestShape(1, 8, 2), threads=1, effort=QUICK))
