"""The importance of every sublayer as a map: layers across, kinds down."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from exporter.artifacts import ImportanceReport, PlannedDeletion
from exporter.report.html.charts.bands import LEFT, bands, deletions_by_cell, places
from exporter.report.html.charts.svg import WIDTH, Drawing, number
from exporter.report.words import significant

LABELS = {
    "attention": "attn",
    "cross_attention": "cross",
    "mixer": "mixer",
    "mlp": "MLP",
    "block": "block",
}
_CELL = 20.0
STEPS = 9
"""Shades from palest to darkest: the classes ``h0`` to ``h8``."""


def heat_chart(key: str, report: ImportanceReport, plan: Sequence[PlannedDeletion]) -> Markup:
    """The drawing; what the plan drops is outlined and crossed."""
    scores: dict[tuple[int, str], float] = {(s.layer, s.kind): s.score for s in report.scores}
    kinds = [kind for kind in LABELS if any(kind == other for _, other in scores)]
    layers = max((layer for layer, _ in scores), default=-1) + 1
    tall = _CELL * len(kinds) + 24
    gone, shade = deletions_by_cell(plan), Shades(list(scores.values()))
    drawing = Drawing(
        key, tall * bands(layers) or 1, title="Importance by layer and kind",
        description=_words(report, gone),
    )  # fmt: skip
    for place in places(layers, WIDTH - LEFT):
        top = tall * place.band
        if place.x == LEFT:
            _row_names(drawing, kinds, top)
        drawing.text(place.x + place.width / 2, top + 11, str(place.layer), "tick small", "middle")
        for row, kind in enumerate(kinds):
            if (score := scores.get((place.layer, kind))) is None:
                continue
            box = (place.x, top + 15 + _CELL * row, place.width - 1.5, _CELL - 1.5)
            dropped = (place.layer, kind) in gone
            _cell(
                drawing, box, f"h{shade(score)}", dropped, _tip(place.layer, kind, score, dropped)
            )
    return drawing.markup()


def _row_names(drawing: Drawing, kinds: Sequence[str], top: float) -> None:
    for row, kind in enumerate(kinds):
        drawing.text(0, top + 29 + _CELL * row, LABELS[kind], "tick")


def _cell(
    drawing: Drawing, box: tuple[float, float, float, float], cls: str, dropped: bool, tip: str
) -> None:
    x, y, width, height = box
    drawing.add("rect", cls=cls, x=x, y=y, width=width, height=height, tip=tip)
    if dropped:
        a, b, c, d = x + 1, y + 1, x + width - 1, y + height - 1
        corners = f"M{number(a)} {number(b)}H{number(c)}V{number(d)}H{number(a)}Z"
        cross = f"L{number(c)} {number(d)}M{number(c)} {number(b)}L{number(a)} {number(d)}"
        drawing.add("path", cls="cut", d=corners + cross)


def _tip(layer: int, kind: str, score: float, dropped: bool) -> str:
    return f"layer {layer}, {LABELS[kind]}: {significant(score)}{', dropped' if dropped else ''}"


class Shades:
    """From a score to its shade: by its logarithm, since a few scores are far above the rest.

    Where some are zero or below (as a perplexity that falls), by what is a logarithm far from zero.
    """

    def __init__(self, scores: Sequence[float]) -> None:
        finite = [score for score in scores if math.isfinite(score)]
        self._log = bool(finite) and min(finite) > 0
        sizes = sorted(abs(score) for score in finite if score)
        self._middle = sizes[len(sizes) // 2] if sizes else 1.0
        values = [self._place(score) for score in finite] or [0.0]
        self._low, self._span = min(values), (max(values) - min(values)) or 1.0

    def _place(self, score: float) -> float:
        return math.log(score) if self._log else math.asinh(score / self._middle)

    def __call__(self, score: float) -> int:
        """The number of its shade, from 0 to :data:`STEPS` - 1."""
        if not math.isfinite(score):
            return STEPS - 1
        share = (self._place(score) - self._low) / self._span
        return round(min(1.0, max(0.0, share)) * (STEPS - 1))


def _words(report: ImportanceReport, gone: dict[tuple[int, str], str]) -> str:
    if not report.scores:
        return "No scores."
    least = min(report.scores, key=lambda score: score.score)
    most = max(report.scores, key=lambda score: score.score)
    dropped = [f"{LABELS[s.kind]} {s.layer}" for s in report.scores if (s.layer, s.kind) in gone]
    return (
        f"Metric {report.metric}, from {significant(least.score)} ({LABELS[least.kind]} "
        f"{least.layer}) to {significant(most.score)} ({LABELS[most.kind]} {most.layer}). "
        f"Dropped: {', '.join(dropped) or 'none of them'}."
    )
