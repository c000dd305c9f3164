"""The importance of every sublayer, as a section of report.md."""

from __future__ import annotations

from collections.abc import Sequence

from exporter.artifacts import ImportanceReport, PlannedDeletion

_KINDS = ("attention", "mlp", "block")


def render_importance(report: ImportanceReport, dropped: Sequence[PlannedDeletion]) -> str:
    """A table with a row a layer; what the plan drops stands in bold.

    Args:
        report: The scores; lower means more redundant.
        dropped: The plan's deletions. A dropped block marks all of its layer's sublayers.
    """
    gone: set[tuple[int, str]] = {(deletion.layer, deletion.kind) for deletion in dropped}
    scores: dict[tuple[int, str], float] = {
        (score.layer, score.kind): score.score for score in report.scores
    }
    layers = sorted({layer for layer, _ in scores})
    rows = [
        f"| {layer} | " + " | ".join(_cell(scores, gone, layer, kind) for kind in _KINDS) + " |"
        for layer in layers
    ]
    return "\n".join(
        [
            "## Importance",
            "",
            f"Metric: {report.metric}. Lower is more redundant; what was dropped stands in bold.",
            "",
            "| layer | attention | MLP | block |",
            "| ---: | ---: | ---: | ---: |",
            *rows,
            "",
        ]
    )


def _cell(
    scores: dict[tuple[int, str], float], gone: set[tuple[int, str]], layer: int, kind: str
) -> str:
    score = scores.get((layer, kind))
    if score is None:
        return "-"
    text = f"{score:.4f}"
    return f"**{text}**" if (layer, kind) in gone or (layer, "block") in gone else text
