"""A Pareto front of plans: what each gains and costs, drawn twice, and a table."""

from __future__ import annotations

import math

from exporter.artifacts import CurvePoint, ParetoCurve
from exporter.printable import counted
from exporter.report.charts.tradeoff import Candidate, TradeOff
from exporter.report.sections.blocks import Document, Figure, Grid, Section
from exporter.report.sections.tradeoff import COSTS
from exporter.report.words import dropped_briefly


def front_document(curve: ParetoCurve) -> Document:
    """The front, among all plans that the search found."""
    timed = all(point.speedup is not None for point in curve.points)
    caption = (
        f"Better is further down and to the right. Measured on {curve.calibration.tokens} tokens "
        "that the search did not see; the dashed line joins what nothing else beats."
    )
    figures = [Figure(_chart(curve, number, timed), caption) for number in range(len(COSTS))]
    section = Section(
        "front", "What each plan gains and costs", [_table(curve, timed)], figures, stays_open=True
    )
    return Document(
        command="plan",
        version=curve.versions.get("depthcut", ""),
        title="Pareto front",
        subject=curve.model.source,
        lead=f"{counted(len(curve.points), 'plan')}, {len(curve.front)} of which no other beats.",
        sections=[section],
    )


def _chart(curve: ParetoCurve, number: int, timed: bool) -> TradeOff:
    points = []
    for point in curve.points:
        gain = point.speedup if timed and point.speedup else 100 * point.parameters_removed
        cost = (_perplexity_change(point), point.kl)[number]
        tip = dropped_briefly(point.deletions)
        points.append(Candidate("", 0, gain, gain, gain, cost, tip, beaten=not point.on_front))
    across = f"speedup at {curve.at}" if timed else "parameters removed, %"
    start, unit = (1.0, "x") if timed else (0.0, "")
    return TradeOff("Pareto front", points, across, COSTS[number], unit, start, "whole model")


def _table(curve: ParetoCurve, timed: bool) -> Grid:
    speed = ["speedup"] if timed else []
    rows = [
        [
            str(len(point.deletions)),
            *([f"{point.speedup:.3f}x"] if timed else []),
            f"-{point.parameters_removed:.1%}",
            f"{_perplexity_change(point):+.1f} %",
            f"{point.kl:.3f}",
            f"{point.top1_agreement:.1%}",
        ]
        for point in curve.front
    ]
    header = ["sublayers", *speed, "parameters", "perplexity", "KL, nats", "same top-1"]
    return Grid("The front", header, rows, right=range(len(header)))


def _perplexity_change(point: CurvePoint) -> float:
    return 100 * math.expm1(min(point.log_perplexity_increase, 50.0))
