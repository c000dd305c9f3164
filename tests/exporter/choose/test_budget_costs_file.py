"""A file of costs that was named is used where it fits, and else refused, not replaced."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest
from cost_tables import made_table

from exporter.choose.budgets.target_speedup import OnnxStopwatch
from exporter.choose.costs.request_shape import RequestShape
from exporter.choose.costs.table import CostTable
from exporter.choose.costs.timing import Effort
from exporter.errors import CostError
from tests.raising import raises
from tests.tiny_graphs import TinySpec, tiny_model

pytest.importorskip("onnxruntime")


def test_costs_of_another_graph_are_refused_where_the_file_was_named(tmp_path: Path) -> None:
    onnx, kept = tmp_path / "model.onnx", tmp_path / "costs.json"
    ir.save(tiny_model(TinySpec(layers=2)), onnx)
    made_table({(0, "mlp"): {"none": 1.0}}).write(kept)
    before = kept.read_bytes()
    quick = Effort(seconds=0.1, rounds=2, reload=False)
    watch = OnnxStopwatch(
        onnx,
        RequestShape(1, 4, 1),
        kept,
        tmp_path / "work",
        threads=1,
        may_replace=False,
        variants=quick,
    )
    with raises(CostError, "another-model", kept):
        watch.costs(["none"], None)
    assert kept.read_bytes() == before
    watch.may_replace = True  # the planner's own memory
    table = watch.costs(["none"], None)
    assert CostTable.read(kept) == table
    watch.may_replace = False  # it fits by now
    assert watch.costs(["none"], None).groups == table.groups
