"""Costs on a graph: where they are kept, and what is timed together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from exporter.choose.budgets import target_speedup
from exporter.choose.budgets.target_speedup import Stopwatch
from exporter.choose.costs.cost_runners import OnnxCostRunner
from exporter.choose.costs.measuring import CostSettings
from exporter.choose.costs.request_shape import RequestShape
from exporter.choose.costs.table import CostTable
from exporter.choose.costs.timing import Effort
from exporter.choose.costs.together import measure_together
from exporter.errors import CostError
from tests.made_tables import made_table
from tests.raising import raises
from tests.tiny_graphs import TinySpec, tiny_model

pytest.importorskip("onnxruntime")


def test_costs_of_another_graph_are_refused_where_the_file_was_named(tmp_path: Path) -> None:
    onnx, kept = tmp_path / "model.onnx", tmp_path / "costs.json"
    ir.save(tiny_model(TinySpec(layers=2)), onnx)
    made_table({(0, "mlp"): {"none": 1.0}}).write(kept)
    before = kept.read_bytes()
    quick = Effort(seconds=0.1, rounds=2, reload=False)
    watch = Stopwatch(
        onnx,
        RequestShape(1, 4, 1),
        kept,
        tmp_path / "work",
        threads=1,
        may_replace=False,
        variants=quick,
    )
    with raises(CostError, "another-model", kept):
        watch.costs(["none"])
    assert kept.read_bytes() == before
    watch.may_replace = True  # the planner's own memory
    table = watch.costs(["none"])
    assert CostTable.read(kept) == table
    watch.may_replace = False  # it fits by now
    assert watch.costs(["none"]).groups == table.groups


QUICK = Effort(seconds=0.1, reload=False)
AT = RequestShape(1, 4, 1)


def test_all_variants_and_other_graphs_are_timed_in_the_same_rounds(tmp_path: Path) -> None:
    onnx, kept = tmp_path / "model.onnx", tmp_path / "costs.json"
    ir.save(tiny_model(TinySpec(layers=3)), onnx)
    runner = OnnxCostRunner(onnx, tmp_path / "work")
    settings = CostSettings(AT, threads=1, effort=QUICK, kept=kept)
    table, rows = measure_together(runner, settings, beside={"same": onnx})
    assert {*table.names} == {(n, kind) for n in range(3) for kind in ("attention", "mlp")}
    assert [len(group.trials) for group in table.groups] == [1, 1]
    trials = [trial for group in table.groups for trial in group.trials]
    assert all(trial.replacement == "none" for trial in trials)
    (beside,) = rows.values()
    cells = len(AT.cells(cached=True))
    assert len(beside) == len(trials[0].rows) == cells
    # The whole graph's times are those of the same rounds; each has its own candidate.
    arms = [beside, *(trial.rows for trial in trials)]
    assert len({tuple(arm[0].baseline.samples_ms) for arm in arms}) == 1
    assert len({tuple(arm[0].candidate.samples_ms) for arm in arms}) == 3
    assert CostTable.read(kept) == table


def test_what_was_timed_together_is_not_timed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx, kept = tmp_path / "model.onnx", tmp_path / "costs.json"
    ir.save(tiny_model(TinySpec(layers=2)), onnx)
    runner = OnnxCostRunner(onnx, tmp_path / "work")
    settings = CostSettings(AT, threads=1, effort=QUICK, kept=kept)
    first, _ = measure_together(runner, settings, [(0, "mlp")])
    monkeypatch.setattr(OnnxCostRunner, "arms_of", None)
    assert measure_together(runner, settings, [(1, "mlp")])[0] == first
    with pytest.raises(TypeError):  # attentions were not timed
        measure_together(runner, settings)
    monkeypatch.undo()
    both, _ = measure_together(runner, settings, [(0, "attention")])
    assert {*both.names} == {(layer, kind) for layer in (0, 1) for kind in ("attention", "mlp")}
    assert CostTable.read(kept) == both


@pytest.mark.parametrize(
    ("together", "replacements", "free", "is_together"),
    [
        (True, ("none",), None, True),
        (True, ("none",), 10**9, True),
        (True, ("none",), 1, False),
        (True, ("none", "bias"), None, False),
        (False, ("none",), None, False),
    ],
)
def test_times_that_only_order_sublayers_are_measured_together_where_memory_holds_all(
    tmp_path: Path,
    monkeypatch: Any,
    together: bool,
    replacements: Any,
    free: int | None,
    is_together: bool,
) -> None:
    ir.save(tiny_model(TinySpec(layers=2)), tmp_path / "model.onnx")
    monkeypatch.setattr("exporter.choose.costs.together.available_bytes", lambda: free)
    table = made_table({(0, "mlp"): {"none": 1.0}})
    monkeypatch.setattr(target_speedup, "measure_on", lambda *_, **__: table)
    monkeypatch.setattr(target_speedup, "measure_together", lambda *_, **__: (None, {}))
    watch = Stopwatch(
        tmp_path / "model.onnx", AT, tmp_path / "costs.json", tmp_path, together=together
    )
    assert (watch.costs(replacements) is None) == is_together
