"""The cut and the quantisation crossed: whole and cut, in float and quantised, and further cuts.

Each is a row, and a cut one is compared with the whole model that is quantised alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from exporter.artifacts import ComparisonReport, Corner, Interval, LatencyRow, LatencySamples
from exporter.report.charts.intervals import IntervalLine, Intervals
from exporter.report.sections.blocks import Figure, Grid, Note, Section, Tone
from exporter.report.words import (
    has_too_few_rounds,
    milliseconds,
    named_arms,
    or_dash,
    percent,
    relative_change,
    short_shape,
    significant,
    speedup_range,
    speedup_words,
)

Column = tuple[str, list[str]]
"""A name, and a cell for each model."""
_HOW = (
    "All took turns in the same rounds and read the same text. A cut model's speed and perplexity "
    "are compared with those of the whole model that is quantised in the same way, with 95 % "
    "intervals; KL divergence and agreement are with the whole model in float. The same "
    "continuation is the share of prompts that are continued greedily with the same tokens to the "
    "end."
)
_MORE: dict[str, tuple[Callable[[Corner], float | None], Callable[[float], str]]] = {
    "KL divergence, nats": (lambda c: c.kl_divergence, lambda kl: significant(kl, 3)),
    "same top-1 token": (lambda c: c.top1_agreement, percent),
    "same continuation": (lambda c: c.exact_match, percent),
    "cosine of embeddings": (lambda c: c.embedding_cosine, lambda cosine: f"{cosine:.4f}"),
    "files, MB": (lambda c: c.file_bytes / 1e6, lambda size: f"{size:,.1f}"),
}


def corners_section(report: ComparisonReport) -> Section | None:
    """All models in one table; None for a pair alone."""
    if not report.corners:
        return None
    grid, figures = corners_grid(report), _speedups(report)
    return Section("corners", "All models", [grid, Note(_HOW)], figures, stays_open=True)


def _named(row: str, report: ComparisonReport) -> str:
    images = report.accuracy is not None and report.accuracy.images is not None
    return row.replace("token", "class") if images else row


def corners_grid(report: ComparisonReport) -> Grid:
    """A row a model, those in float first; what was measured of none is left out."""
    corners = sorted(report.corners, key=lambda corner: corner.quantized)
    columns = [column for row in report.latency for column in _times_and_gains(row, corners)]
    known = {corner.arm: corner for corner in corners}
    other = report.accuracy.other if report.accuracy else None
    text = "second text" if other is None else f"on {other.name}"
    for name, field in {"perplexity": "", text: "other_"}.items():
        columns.append((name, [_with_change(known, each, field) for each in corners]))
    for name, (value, words) in _MORE.items():
        columns.append((_named(name, report), [or_dash(value(each), words) for each in corners]))
    columns = [(name, cells) for name, cells in columns if set(cells) != {"-"}]
    names = [corner_name(report, corner) for corner in corners]
    rows = [list(row) for row in zip(names, *(cells for _, cells in columns), strict=True)]
    header = ["", *(name for name, _ in columns)]
    caption = "All models; cut ones against the whole one in the same form"
    return Grid(caption, header, rows, right=range(1, len(header)))


def _times_and_gains(row: LatencyRow, corners: Sequence[Corner]) -> Iterator[Column]:
    times = {"baseline": row.baseline, "candidate": row.candidate, **row.references}
    yield f"{short_shape(row)}, ms", [or_dash(times.get(c.arm), _median) for c in corners]
    gains = [corner.over_whole.get(row.shape_name) for corner in corners]
    yield (
        "speedup",
        ["" if g is None else speedup_words(g.value, g.ci95, digits=2) for g in gains],
    )
    yield "verdict", [corner.verdicts.get(row.shape_name, "") for corner in corners]


def _with_change(known: Mapping[str, Corner], corner: Corner, text: str) -> str:
    """A perplexity, and of a cut model the change from that of the whole one, with its interval."""
    own: float | None = getattr(corner, f"{text}perplexity")
    whole = None if corner.whole is None else getattr(known[corner.whole], f"{text}perplexity")
    if own is None or whole is None:
        return or_dash(own, significant)
    increase: Interval | None = getattr(corner, f"{text}log_perplexity_increase")
    bounds = () if increase is None else (100 * math.expm1(min(b, 50.0)) for b in increase.ci95)
    interval = ", ".join(f"{bound:+.1f}" for bound in bounds)
    return f"{significant(own)}, {relative_change(whole, own)}" + (interval and f" [{interval}]")


def corner_name(report: ComparisonReport, corner: Corner) -> str:
    """Its model, and what its weights are: ``cut, int4``."""
    arm = named_arms(report)[corner.arm]
    unnoted = "quantised" if corner.quantized else arm.precision
    weights = arm.quantization.scheme if arm.quantization else unnoted
    if arm.path in report.also:
        return f"{corner.arm.removesuffix(f'-{weights}')}, {weights}"
    return f"{'cut' if corner.pruned else 'whole'}, {weights}"


def corners_sentence(report: ComparisonReport) -> str | None:
    """What the cut and the quantisation did together; None without the four models."""
    if not report.corners:
        return None
    whole = report.corners[0]
    both = next(corner for corner in report.corners if corner.arm == "candidate")
    names = f"The {corner_name(report, both)} model against the {corner_name(report, whole)} one"
    told = []
    if both.speedups:
        told.append(f"{speedup_range([s.value for s in both.speedups.values()])} times as fast")
    told.append(f"{relative_change(whole.file_bytes, both.file_bytes)} bytes")
    if whole.perplexity is not None and both.perplexity is not None:
        told.append(f"perplexity {relative_change(whole.perplexity, both.perplexity)}")
    return f"{names}: {', '.join(told)}."


def _median(times: LatencySamples) -> str:
    return milliseconds(times.median_ms)


def _speedups(report: ComparisonReport) -> list[Figure]:
    lines = [
        IntervalLine(
            f"{short_shape(row)}: {corner_name(report, corner)}",
            found.value,
            *found.ci95,
            speedup_words(found.value, found.ci95, digits=2),
            _tone(row, found.ci95),
        )
        for row in report.latency
        for corner in report.corners
        if (found := corner.speedups.get(row.shape_name))
    ]
    if not lines:
        return []
    title = "Speedup of each corner over the whole model in float"
    caption = "How many times as fast as the whole model in float, with the 95 % interval."
    return [Figure(Intervals(title, lines, neutral=1.0, unit="x"), caption)]


def _tone(row: LatencyRow, ci95: tuple[float, float]) -> Tone:
    return "unsure" if has_too_few_rounds(row) else interval_tone(ci95[0] - 1, ci95[1] - 1)


def interval_tone(low: float, high: float, *, higher_is_better: bool = True) -> Tone:
    """On which side of 0 an interval lies."""
    if low <= 0 <= high:
        return "even"
    return "good" if (low > 0) == higher_is_better else "bad"
