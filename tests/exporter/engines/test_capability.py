"""Polygraphy's capability report beside `check-engine`."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import parser

from exporter.cli import run

pytestmark = pytest.mark.rtx

GRAPH = """<ir_version: 10, opset_import: ["" : 20]>
g (float[2,2] x) => (float[2,2] y) {{
a = Add(x, x)  d = {operator}(a)  b = Mul(a, d)  y = Relu(b) }}"""


def reported(folder: Path, operator: str) -> tuple[int, list[str]]:
    model = folder / f"{operator}.onnx"
    onnx.save(parser.parse_model(GRAPH.format(operator=operator)), model)
    code = run(["check-engine", str(model), "--report", str(folder / "report")])
    return code, sorted(each.name for each in (folder / "report").iterdir())


def test_the_rejected_part_stands_beside_those_that_are_accepted(tmp_path: Path) -> None:
    code, files = reported(tmp_path, "Det")
    assert code == 1
    assert "results.txt" in files
    assert sum(name.startswith("unsupported") for name in files) == 1
    assert sum(name.startswith("supported") for name in files) == 2
    assert "Det" in (tmp_path / "report" / "results.txt").read_text()


def test_a_graph_that_is_accepted_has_no_parts(tmp_path: Path) -> None:
    assert reported(tmp_path, "Neg") == (0, [])
