"""A Pareto front as a page of its own: two drawings and a table."""

from __future__ import annotations

import math

from exporter.artifacts import CurvePoint, ParetoCurve
from exporter.report.html.charts.front import FrontPoint, front_chart
from exporter.report.html.page import page_environment, page_style
from exporter.report.html.view import Figure, Section
from exporter.report.parts.part import Grid


def render_front(curve: ParetoCurve) -> str:
    """The page.

    Args:
        curve: The front, and the plans that it was found among.
    """
    style, style_hash = page_style()
    return (
        page_environment()
        .get_template("front.html.j2")
        .render(
            model=curve.model.source,
            section=_section(curve),
            style=style,
            style_hash=style_hash,
            version=curve.versions.get("depthcut", ""),
        )
    )


def _section(curve: ParetoCurve) -> Section:
    timed = all(point.speedup is not None for point in curve.points)
    what = f"speedup at {curve.at}" if timed else "parameters removed, %"
    kinds = (
        ("perplexity, change in % (less is better)", "%", _perplexity_change),
        ("KL divergence, nats (less is better)", "", lambda point: point.kl),
    )
    figures = [
        Figure(
            front_chart(
                f"front-{number}",
                [FrontPoint(_gain(p, timed), cost(p), p.on_front, _tip(p)) for p in curve.points],
                across=what,
                cost=words,
                unit=unit,
                start=1.0 if timed else 0.0,
            ),
            f"Better is further down and to the right. Measured on {curve.calibration.tokens} "
            "tokens that the search did not see; the dashed line joins what nothing else beats.",
        )
        for number, (words, unit, cost) in enumerate(kinds)
    ]
    return Section("front", "What each plan gains and costs", figures, [_table(curve, timed)])


def _table(curve: ParetoCurve, timed: bool) -> Grid:
    header = ["sublayers", "speedup", "parameters", "perplexity", "KL, nats", "same top-1"]
    rows = [
        [
            str(len(point.deletions)),
            f"{point.speedup:.3f}x" if point.speedup is not None else "",
            f"-{point.parameters_removed:.1%}",
            f"{_perplexity_change(point):+.1f} %",
            f"{point.kl:.3f}",
            f"{point.top1_agreement:.1%}",
        ]
        for point in curve.front
    ]
    kept = [i for i in range(len(header)) if timed or i != 1]
    return Grid(
        caption="The front",
        header=[header[i] for i in kept],
        rows=[[row[i] for i in kept] for row in rows],
        right=range(len(kept)),
    )


def _gain(point: CurvePoint, timed: bool) -> float:
    return point.speedup if timed and point.speedup else 100 * point.parameters_removed


def _perplexity_change(point: CurvePoint) -> float:
    return 100 * math.expm1(min(point.log_perplexity_increase, 50.0))


def _tip(point: CurvePoint) -> str:
    kinds: dict[str, list[str]] = {}
    for deletion in point.deletions:
        kinds.setdefault(deletion.kind, []).append(str(deletion.layer))
    return "; ".join(f"{kind} {', '.join(layers)}" for kind, layers in kinds.items())
