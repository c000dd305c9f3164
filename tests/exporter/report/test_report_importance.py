from __future__ import annotations

import pytest

from exporter.artifacts import (
    CalibrationRef,
    ImportanceReport,
    MetricScores,
    ModelRef,
    PlannedDeletion,
    Score,
)
from exporter.report.charts import Shades
from exporter.report.markdown import section_markdown
from exporter.report.sections.model import importance_map, importance_section

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


def scaled(factor: float) -> ImportanceReport:
    some = [score.model_copy(update={"score": score.score * factor}) for score in REPORT.scores]
    return REPORT.model_copy(update={"scores": some})


CUT = PlannedDeletion(layer=1, kind="attention")
BLOCK = PlannedDeletion(layer=0, kind="block")


@pytest.mark.parametrize(
    ("factor", "plan", "rows"),
    [
        (1, [CUT], ["| 0 | 0.1000 | 0.2000 | 0.3000 |", "| 1 | **1.1000** | - | 1.3000 |"]),
        (1, [BLOCK], ["| 0 | **0.1000** | **0.2000** | **0.3000** |", "| 1 | 1.1000 |"]),
        (1 / 4000, [], ["| 0 | 0.0000250 | 0.0000500 | 0.0000750 |"]),
        (-1, [], ["| 1 | -1.1000 | - | -1.3000 |"]),
        (0, [], ["| 0 | 0.0000 |"]),
    ],
)
def test_scores_are_told_by_layer_and_what_is_dropped_in_bold(
    factor: float, plan: list[PlannedDeletion], rows: list[str]
) -> None:
    report = scaled(factor)
    text = section_markdown(importance_section(report, plan))
    assert all(row in text for row in rows)
    assert "h0" in importance_map(report, plan).draw("k")


def test_one_large_score_leavesShades_to_the_others() -> None:
    values = [-0.01, 0.02, 0.3, 1.1, 6.0]
    shades = [*map(Shades(values), values)]
    assert shades == sorted(shades)
    assert len(set(shades)) >= 4


def test_the_metric_that_decides_is_named_and_the_others_too() -> None:
    text = section_markdown(importance_section(REPORT, []))
    assert "Metric: cosine." in text
    assert "Also" not in text
    further = [MetricScores(metric="depth", scores=REPORT.scores)]
    chosen = REPORT.model_copy(update={"further": further}).of_metric("depth")
    text = section_markdown(importance_section(chosen, []))
    assert "Metric: depth." in text
    assert "Also scored by cosine." in text
