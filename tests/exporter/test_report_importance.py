from __future__ import annotations

from exporter.artifacts import (
    CalibrationRef,
    ImportanceReport,
    ModelRef,
    PlannedDeletion,
    Score,
)
from exporter.report.markdown import render_part
from exporter.report.parts.model import importance_part

REPORT = ImportanceReport(
    model=ModelRef(source="m", architecture="A", num_layers=2, sha256="0"),
    metric="cosine",
    calibration=CalibrationRef(
        source="self", samples=1, sequence_length=2, tokens=2, sha256="0"
    ),
    scores=[
        Score(layer=layer, kind=kind, score=layer + weight, std_error=None)
        for layer in (0, 1)
        for kind, weight in (("attention", 0.1), ("mlp", 0.2), ("block", 0.3))
        if (layer, kind) != (1, "mlp")
    ],
)  # fmt: skip


def test_what_is_dropped_stands_in_bold_and_nothing_else() -> None:
    text = render_part(importance_part(REPORT, [PlannedDeletion(layer=1, kind="attention")]))
    assert "| 0 | 0.1000 | 0.2000 | 0.3000 |" in text
    assert "| 1 | **1.1000** | - | 1.3000 |" in text


def test_a_dropped_block_marks_its_sublayers() -> None:
    text = render_part(importance_part(REPORT, [PlannedDeletion(layer=0, kind="block")]))
    assert "| 0 | **0.1000** | **0.2000** | **0.3000** |" in text
    assert "| 1 | 1.1000 |" in text
