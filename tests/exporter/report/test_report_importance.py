from __future__ import annotations

from exporter.artifacts import (
    CalibrationRef,
    ImportanceReport,
    MetricScores,
    ModelRef,
    PlannedDeletion,
    Score,
)
from exporter.report.chart_cells import Shades
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


def test_what_is_dropped_stands_in_bold_and_nothing_else() -> None:
    text = section_markdown(
        importance_section(REPORT, [PlannedDeletion(layer=1, kind="attention")])
    )
    assert "| 0 | 0.1000 | 0.2000 | 0.3000 |" in text
    assert "| 1 | **1.1000** | - | 1.3000 |" in text


def test_a_dropped_block_marks_its_sublayers() -> None:
    text = section_markdown(importance_section(REPORT, [PlannedDeletion(layer=0, kind="block")]))
    assert "| 0 | **0.1000** | **0.2000** | **0.3000** |" in text
    assert "| 1 | 1.1000 |" in text


def test_small_scores_keep_three_digits() -> None:
    small = [s.model_copy(update={"score": s.score / 4000}) for s in REPORT.scores]
    text = section_markdown(importance_section(REPORT.model_copy(update={"scores": small}), []))
    assert "| 0 | 0.0000250 | 0.0000500 | 0.0000750 |" in text


def test_scores_of_zero_and_below() -> None:
    some = [s.model_copy(update={"score": -s.score * (s.layer == 1)}) for s in REPORT.scores]
    report = REPORT.model_copy(update={"scores": some})
    assert "| 1 | -1.1000 | - | -1.3000 |" in section_markdown(importance_section(report, []))
    assert "h0" in importance_map(report, []).draw("k")
    nothing = REPORT.model_copy(
        update={"scores": [s.model_copy(update={"score": 0.0}) for s in REPORT.scores]}
    )
    assert "| 0 | 0.0000 |" in section_markdown(importance_section(nothing, []))
    assert "h0" in importance_map(nothing, []).draw("k")


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
