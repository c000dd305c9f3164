"""The curves of a history: times relative to the unpruned arm, and counted figures, with steps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from exporter.artifacts import ChangePoint, HistoryCurve, HistoryEntry, HistoryRun, WorkFigure
from exporter.gate.change_points import pooled, steps

ALL_SHAPES = "all shapes"
WINDOW = 100
"""Runs that are searched, the newest."""
_NEAR = 3
"""Steps so many runs apart are one, of all shapes."""
SHARE_OF_ALL = 0.5
"""Of the error of the search, that of all shapes' curve; most changes slow every shape."""


def curves(entries: Sequence[HistoryEntry], series: str) -> list[HistoryCurve]:
    """The curves of a series, with their steps; those of counted figures where these changed.

    Runs that lack a shape are left out of its curve; the curve of all shapes has the runs that have
    each shape of the newest one.

    Args:
        entries: The history, oldest first.
        series: Whose; see :func:`exporter.gate.keys.series`.
    """
    mine = [entry for entry in entries if entry.series == series][-WINDOW:]
    times = [each for each in map(_times, mine) if each]
    newest = list(times[-1]) if times else []
    several = len(newest) > 1
    share = (1 - SHARE_OF_ALL * several) / max(1, len(newest))
    found = [_curve(mine, subject, [subject], share) for subject in newest]
    if several:
        whole = _curve(mine, ALL_SHAPES, newest, SHARE_OF_ALL)
        found = [whole, *(_without(curve, whole) for curve in found)]
    return [*found, *_counted(mine)]


def _times(entry: HistoryEntry) -> dict[str, float]:
    """By shape, the logarithm of the time relative to the unpruned arm."""
    return {
        row.subject: -math.log(row.speedup)
        for row in entry.rows
        if math.isfinite(row.speedup) and row.speedup > 0
    }


def _curve(
    entries: Sequence[HistoryEntry], subject: str, shapes: Sequence[str], share: float
) -> HistoryCurve:
    told = [(entry, _times(entry)) for entry in entries]
    kept = [(entry, found) for entry, found in told if all(shape in found for shape in shapes)]
    values = pooled([np.array([found[shape] for _, found in kept]) for shape in shapes])
    runs = [_run(entry) for entry, _ in kept]
    found = steps(values, share=share)
    points = [
        ChangePoint(
            run=step.at,
            time=runs[step.at].time,
            commit=runs[step.at].commit,
            size=math.exp(step.size),
            ci95=(math.exp(step.ci95[0]), math.exp(step.ci95[1])),
            p_value=step.p_value,
        )
        for step in found
    ]
    relative = np.exp(values - np.median(values))
    return HistoryCurve(subject=subject, runs=runs, values=relative.tolist(), points=points)


def _run(entry: HistoryEntry) -> HistoryRun:
    return HistoryRun(time=entry.time, commit=entry.commit)


def _without(curve: HistoryCurve, whole: HistoryCurve) -> HistoryCurve:
    """A shape's curve without the steps that all shapes take together."""
    place = {(run.time, run.commit): number for number, run in enumerate(curve.runs)}
    named = [(point.time, point.commit) for point in whole.points]
    told = [place[name] for name in named if name in place]
    own = [p for p in curve.points if all(abs(p.run - other) > _NEAR for other in told)]
    return curve.model_copy(update={"points": own})


def _counted(entries: Sequence[HistoryEntry]) -> list[HistoryCurve]:
    """The counted figures that changed; each change is a step."""
    names: dict[WorkFigure, None] = {name: None for entry in entries for name in entry.work}
    found = []
    for name in names:
        kept = [entry for entry in entries if name in entry.work]
        values = [float(entry.work[name]) for entry in kept]
        points = [
            ChangePoint(run=at, time=kept[at].time, commit=kept[at].commit, size=_factor(*pair))
            for at, pair in enumerate(itertools.pairwise(values), 1)
            if pair[0] != pair[1]
        ]
        if points:
            runs = list(map(_run, kept))
            found.append(
                HistoryCurve(subject=name, counted=True, runs=runs, values=values, points=points)
            )
    return found


def _factor(before: float, after: float) -> float:
    return after / before if before else math.inf
