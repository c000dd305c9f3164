"""The curves of a history: times relative to the unpruned arm, with steps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from exporter.artifacts import ChangePoint, HistoryCurve, HistoryEntry, HistoryRun

Values = NDArray[np.float64]

FEWEST = 12
"""Fewer runs say nothing of steps."""
_SIDE = 3
"""Runs on each side of a split: one or two may be outliers."""
_RECENT = 10
"""A split among so many of the last runs is asked about by itself."""
_RECENT_SIDE = 2
_NEWEST_HANDICAP = 0.5
"""Taken off the statistic of the newest split."""
_FIRST_PERMUTATIONS, _MORE_PERMUTATIONS = 499, 9500
"""More, as often as a small error takes, go only where those before leave hope."""
_HOPE = 6
_ERROR_WHOLE, _ERROR_RECENT = 0.0005, 0.0018
"""How often a search of one history may find what isn't there; for all of its curves together."""
_OUTLIER = 4.0
_MOST_KEPT = 0.9
"""Of a run's difference by the next one; with more the spread would have no end."""
_ROUNDING = 1e-9
"""Values that differ by less, of logarithms or of their own size, are the same."""


@dataclass(frozen=True)
class Step:
    """A step of one curve."""

    at: int
    size: float
    # its 95 % interval, Welch's, of the runs up to the neighbouring steps
    ci95: tuple[float, float]
    p_value: float


def steps(values: Values, *, share: float = 1.0, seed: int = 0) -> list[Step]:
    """The steps of a curve, in order."""
    if len(values) < FEWEST or np.ptp(values) < _ROUNDING:
        return []
    clipped, rng = _clipped(values), np.random.default_rng(seed)
    result = dict(_whole(clipped, 0, _ERROR_WHOLE * share, rng))
    begin = max(result, default=0)
    recent = _recent(clipped[begin:], _ERROR_RECENT * share, rng)
    if recent is not None:
        result[begin + recent[0]] = recent[1]
    edges = [0, *sorted(result), len(values)]
    return [
        _sized(values, before, at, after, result[at])
        for before, at, after in zip(edges, edges[1:], edges[2:], strict=False)
    ]


def _whole(
    values: Values, offset: int, error: float, rng: np.random.Generator
) -> Iterator[tuple[int, float]]:
    """All splits and their p values, the largest first, then those of both sides."""
    count = len(values)
    if count < FEWEST:
        return
    splits = np.arange(_SIDE, count - _SIDE + 1)
    at, p_value = _split(values, splits, error, rng, grown=False)
    if p_value >= error or _is_line(values, at):
        return
    yield offset + at, p_value
    yield from _whole(values[:at], offset, error, rng)
    yield from _whole(values[at:], offset + at, error, rng)


def _recent(values: Values, error: float, rng: np.random.Generator) -> tuple[int, float] | None:
    count = len(values)
    if count < FEWEST:
        return None
    splits = np.arange(max(_SIDE, count - _RECENT), count - _RECENT_SIDE + 1)
    at, p_value = _split(values, splits, error, rng, grown=True)
    return (at, p_value) if p_value < error and not _is_line(values, at) else None


def _split(
    values: Values,
    splits: NDArray[np.int64],
    error: float,
    rng: np.random.Generator,
    *,
    grown: bool,
) -> tuple[int, float]:
    """The best split, and how often permuted runs have one that is as good."""
    own = _differences(values, splits, grown=grown)
    at = int(splits[own.argmax()])
    # Before the whole search is through, there may be more steps than this one.
    kept = _kept_by_rest(_rest(values, at)) if grown else _kept_by_changes(values)
    best = float(own.max()) * math.sqrt((1 - kept) / (1 + kept))
    reached = tried = 0
    # The smallest p value is 1 / (1 + tried): it must be able to fall below the error.
    while reached <= _HOPE and tried < 2 / error:
        count = _MORE_PERMUTATIONS if tried else _FIRST_PERMUTATIONS
        shuffled = rng.permuted(np.tile(values, (count, 1)), axis=1)
        reached += int((_differences(shuffled, splits, grown=grown).max(axis=-1) >= best).sum())
        tried += count
    return at, (1 + reached) / (1 + tried)


def _differences(values: Values, splits: NDArray[np.int64], *, grown: bool) -> Values:
    """The t statistics of both sides' means, ``[..., splits]``.

    If only what has grown is asked for, it is 0 for what shrank, less for the newest split.
    """
    count = values.shape[-1]
    sums = np.cumsum(values, axis=-1)
    left, whole = sums[..., splits - 1], sums[..., -1:]
    difference = (whole - left) / (count - splits) - left / splits
    between = difference**2 * splits * (count - splits) / count
    spread = (values**2).sum(axis=-1, keepdims=True) - whole**2 / count
    within = np.maximum(spread - between, 1e-18)
    array: Values = np.sqrt(between * (count - 2) / within)
    if not grown:
        return array
    handicaps = np.where(count - splits <= _RECENT_SIDE, _NEWEST_HANDICAP, 0.0)
    return np.where(difference > 0, array - handicaps, 0.0)


def _is_line(values: Values, at: int) -> bool:
    """Whether a steady slope explains more than the step: that is drift."""
    order = np.arange(len(values), dtype=np.float64)
    slope = np.polynomial.Polynomial.fit(order, values, 1)
    return float(((values - slope(order)) ** 2).sum()) < float((_rest(values, at) ** 2).sum())


def _rest(values: Values, at: int) -> Values:
    parts = values[:at], values[at:]
    return np.concatenate([part - part.mean() for part in parts])


def _kept_by_changes(values: Values) -> float:
    """Which part of a run's difference from the level the next one keeps, if beyond chance.

    Of a process of first order, whose part ``k`` is kept from run to run, neighbouring differences
    have the correlation ``(k - 1) / 2``; steps hardly touch these. Means of ``n`` such runs vary as
    much as those of ``n (1 - k) / (1 + k)`` independent ones.
    """
    changes = np.diff(values)
    reach = _OUTLIER * float(np.median(np.abs(changes)))
    changes = np.clip(changes, -reach, reach)
    power = float(changes @ changes)
    if not power:
        return 0.0
    kept = min(1 + 2 * float(changes[1:] @ changes[:-1]) / power, _MOST_KEPT)
    by_chance = 2 / math.sqrt(len(values)) * float(stats.norm.ppf(0.95))
    return kept if kept > by_chance else 0.0


def _kept_by_rest(rest: Values) -> float:
    """The same of a rest without steps, which tells it more exactly; less its standard error."""
    power = float(rest @ rest)
    if not power:
        return 0.0
    kept = float(rest[1:] @ rest[:-1]) / power - 1 / math.sqrt(len(rest))
    return min(max(kept, 0.0), _MOST_KEPT)


def _clipped(values: Values) -> Values:
    """Without the reach of outliers; what is far for many runs is still far."""
    middle = np.median(values)
    typical = float(np.median(np.abs(np.diff(values)))) if len(values) > 1 else 0.0
    if not typical:
        return values - middle
    reach = _OUTLIER * typical / math.sqrt(2) / float(stats.norm.ppf(0.75))  # of normal values
    array: Values = np.clip(values - middle, -reach, reach)
    return array


def _sized(values: Values, begin: int, at: int, end: int, p_value: float) -> Step:
    before, after = values[begin:at], values[at:end]
    size = float(after.mean() - before.mean())
    if min(len(before), len(after)) < 2 or not (np.ptp(before) or np.ptp(after)):
        return Step(at, size, (size, size), p_value)
    # Each side from its own first value: scipy warns of a side that is constant and not zero.
    between = float(after[0] - before[0])
    test = stats.ttest_ind(after - after[0], before - before[0], equal_var=False)
    result = test.confidence_interval(0.95)
    return Step(at, size, (between + float(result.low), between + float(result.high)), p_value)


def pooled(curves: Sequence[Values]) -> Values:
    """The mean of all curves at each run, each about its own level."""
    array: Values = np.mean([curve - curve.mean() for curve in curves], axis=0)
    return array


ALL_SHAPES = "all shapes"
WINDOW = 100
"""Runs that are searched, the newest."""
_NEAR = 3
"""Steps so many runs apart are one, of all shapes."""
SHARE_OF_ALL = 0.5
"""Of the error of the search, that of all shapes' curve; most changes slow every shape."""


def curves(entries: Sequence[HistoryEntry], series: str) -> list[HistoryCurve]:
    """The curves of a series, with their steps.

    Runs that lack a shape are left out of its curve; the curve of all shapes has the runs that have
    each shape of the newest one.
    """
    mine = [entry for entry in entries if entry.series == series][-WINDOW:]
    times = [values for values in map(_times, mine) if values]
    newest = list(times[-1]) if times else []
    several = len(newest) > 1
    share = (1 - SHARE_OF_ALL * several) / max(1, len(newest))
    result = [_curve(mine, subject, [subject], share) for subject in newest]
    if several:
        whole = _curve(mine, ALL_SHAPES, newest, SHARE_OF_ALL)
        result = [whole, *(_without(curve, whole) for curve in result)]
    return result


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
    result = [(entry, _times(entry)) for entry in entries]
    kept = [(entry, item) for entry, item in result if all(shape in item for shape in shapes)]
    values = pooled([np.array([item[shape] for _, item in kept]) for shape in shapes])
    runs = [_run(entry) for entry, _ in kept]
    outcome = steps(values, share=share)
    points = [
        ChangePoint(
            run=step.at,
            time=runs[step.at].time,
            commit=runs[step.at].commit,
            size=math.exp(step.size),
            ci95=(math.exp(step.ci95[0]), math.exp(step.ci95[1])),
            p_value=step.p_value,
        )
        for step in outcome
    ]
    relative = np.exp(values - np.median(values))
    return HistoryCurve(subject=subject, runs=runs, values=relative.tolist(), points=points)


def _run(entry: HistoryEntry) -> HistoryRun:
    return HistoryRun(time=entry.time, commit=entry.commit)


def _without(curve: HistoryCurve, whole: HistoryCurve) -> HistoryCurve:
    """A shape's curve without the steps that all shapes take together."""
    place = {(run.time, run.commit): number for number, run in enumerate(curve.runs)}
    named = [(point.time, point.commit) for point in whole.points]
    numbers = [place[name] for name in named if name in place]
    own = [p for p in curve.points if all(abs(p.run - other) > _NEAR for other in numbers)]
    return curve.model_copy(update={"points": own})
