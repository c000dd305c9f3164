"""Latency: every row's times, the speedup, the noise floor, and what makes a row less sure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from exporter.artifacts import FEWEST_ROUNDS, ComparisonReport, Corner, LatencyRow, LatencySamples
from exporter.artifacts.figures import BRIEF, FIGURES, Figure
from exporter.printable import milliseconds, relative_change
from exporter.report.sections.blocks import (
    Block,
    Cell,
    Grid,
    IntervalLine,
    Intervals,
    Note,
    Section,
    verdict_sign,
)
from exporter.report.words import (
    change_words,
    has_too_few_rounds,
    named_arms,
    or_dash,
    shape_words,
    short_shape,
    speedup_range,
    speedup_words,
)

_FIGURES = ("median, ms", "p95, ms", "p99, ms", "samples")
_CAVEATS: tuple[tuple[str, Callable[[LatencyRow], bool], str], ...] = (
    (
        "Too few rounds:",
        has_too_few_rounds,
        f". With fewer than {FEWEST_ROUNDS} one disturbance can decide, so there is no verdict",
    ),
    (
        "Not settled:",
        lambda row: row.settled is False,
        ". Times were still changing when the warm-up had taken as long as it may; expect them to "
        "differ in the next run",
    ),
    (
        "Ended by the time budget:",
        lambda row: row.stopped == "budget",
        ", before the interval was narrow enough",
    ),
    (
        "Loaded once:",
        lambda row: row.loads == row.builds == 1,
        ". Two loads of the same model can differ by percents, for as long as they stay loaded; "
        "that is in the speedup and not in its interval",
    ),
    ("Timed by the device's own clock:", lambda row: row.clock == "device", ""),
)
"""What makes rows less sure than they look, or tells how they were timed."""


def latency_section(report: ComparisonReport) -> Section | None:
    """A row an arm and shape, and what was left out; None where nothing was to be timed."""
    rows = report.latency
    blocks: list[Block] = []
    if rows:
        blocks = [_speedups(rows), _grid(rows), Note(_how(rows)), *_notes(rows)]
    if report.left_out:
        blocks.append(Note(f"{'; '.join(report.left_out)}.", lead="Not timed as asked:"))
    return Section("latency", "Latency", blocks) if blocks else None


def _speedups(rows: Sequence[LatencyRow]) -> Intervals:
    band = "noise floor" if any(row.noise_floor for row in rows) else "threshold"
    return Intervals(
        "Speedup at each shape",
        [_speedup(row) for row in rows],
        1.0,
        "Baseline time over candidate time with its 95 % interval; right of the line the candidate "
        f"is faster. The grey band is the {band}: within it a difference counts as none.",
    )


def _speedup(row: LatencyRow) -> IntervalLine:
    ratio, limit = row.speedup.ratio, 1 + row.threshold
    if row.noise_floor is not None:
        limit = row.noise_floor
    words, tone = f"{ratio:.3f}x {row.verdict}", verdict_sign(row.verdict).tone
    return IntervalLine(short_shape(row), ratio, row.speedup.ci95, (1 / limit, limit), words, tone)


def _grid(rows: Sequence[LatencyRow]) -> Grid:
    floor = ["noise floor"] if any(row.noise_floor for row in rows) else []
    header = ["phase", "arm", *_FIGURES, "speedup", *floor, "verdict"]
    return Grid(
        "Latency of each arm at each shape",
        header,
        [line for row in rows for line in _lines(row, bool(floor))],
        right=range(2, len(header) - 1),
    )


def _lines(row: LatencyRow, with_floor: bool) -> Iterator[list[Cell]]:
    floor = [_floor(row)] if with_floor else []
    cells: list[Cell] = [
        speedup_words(row.speedup.ratio, row.speedup.ci95),
        *floor,
        verdict_sign(row.verdict),
    ]
    yield [shape_words(row), "baseline", *_figures(row.baseline), *cells]
    empty = [""] * len(cells)
    yield ["", "candidate", *_figures(row.candidate), *empty]
    for name, times in row.references.items():
        yield ["", name, *_figures(times), *empty]


def _figures(times: LatencySamples) -> list[str]:
    figures = [milliseconds(v) for v in (times.median_ms, times.p95_ms, times.p99_ms)]
    return [*figures, f"{len(times.samples_ms):,}"]


def _floor(row: LatencyRow) -> str:
    return "not measured" if row.noise_floor is None else f"{row.noise_floor:.3f}x"


def _how(rows: Sequence[LatencyRow]) -> str:
    limits = " or ".join(f"{100 * limit:.3g} %" for limit in sorted({r.threshold for r in rows}))
    floor = " and than the noise floor" if any(row.noise_floor for row in rows) else ""
    return (
        "The speedup is the baseline's time over the candidate's: above 1 the candidate is faster. "
        "The arms took turns, and the speedup is taken within turns, so it is not exactly the "
        "ratio of the two medians. In brackets is its 95 % interval. *faster* and *slower*: the "
        f"difference is certainly more than {limits}{floor}. *same*: it is certainly less than "
        f"{limits}. *inconclusive*: neither is certain; measure longer, or on a quieter machine."
    )


def _notes(rows: Sequence[LatencyRow]) -> Iterator[Block]:
    if any(row.noise_floor for row in rows):
        yield Note(
            "how far the baseline against itself lies from 1 in 95 of 100 such sessions: a speedup "
            "within it is noise, whatever its interval says.",
            lead="Noise floor:",
        )
    for lead, is_so, text in _CAVEATS:
        if affected := [row for row in rows if is_so(row)]:
            yield Note(f"{_shapes(affected)}{text}.", lead=lead)
    for ways in dict.fromkeys(tuple(row.launches.items()) for row in rows if row.launches):
        text = "; ".join(f"{arm}: {way}" for arm, way in ways if way)
        affected = [row for row in rows if tuple(row.launches.items()) == ways]
        yield Note(f"{_shapes(affected)}.", lead=f"Launched as {text}:")


def _shapes(rows: Sequence[LatencyRow]) -> str:
    return "; ".join(shape_words(row) for row in rows)


Column = tuple[str, list[str]]
"""A name, and a cell for each model."""
_HOW = (
    "All took turns in the same rounds and read the same text. A cut model's speed and perplexity "
    "are compared with those of the whole model that is quantised in the same way, with 95 % "
    "intervals; KL divergence and agreement are with the whole model in float. The same "
    "continuation is the share of prompts that are continued greedily with the same tokens to the "
    "end."
)


def corners_section(report: ComparisonReport) -> Section | None:
    """All models in one table; None for a pair alone."""
    if not report.corners:
        return None
    return Section("corners", "All models", [corners_grid(report), Note(_HOW)], stays_open=True)


def corners_grid(report: ComparisonReport) -> Grid:
    """A row a model, those in float first; what was measured of none is left out."""
    corners = sorted(report.corners, key=lambda corner: corner.quantized)
    columns = [column for row in report.latency for column in _times_and_gains(row, corners)]
    known = {corner.arm: corner for corner in corners}
    for figure in FIGURES:
        if figure.column:
            name = figure.words(figure.column, report.accuracy)
            columns.append((name, [_corner_words(figure, known, item) for item in corners]))
    sizes = [named_arms(report)[corner.arm].file_bytes for corner in corners]
    columns.append(("files, MB", [f"{size / 1e6:,.1f}" for size in sizes]))
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


def _corner_words(figure: Figure, known: Mapping[str, Corner], corner: Corner) -> str:
    own, whole = corner.figures.get(figure.key), None
    if figure.has_before and corner.whole is not None:
        whole = known[corner.whole].figures.get(figure.key)
    if own is None or whole is None:
        return or_dash(own, figure.row)
    return f"{figure.row(own)}, {change_words(whole, own, corner.rises.get(figure.key))}"


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
    result = []
    if both.speedups:
        result.append(f"{speedup_range([s.value for s in both.speedups.values()])} times as fast")
    sizes = (named_arms(report)[corner.arm].file_bytes for corner in (whole, both))
    result.append(f"{relative_change(*sizes)} bytes")
    for figure in BRIEF:
        ends = [c.figures[figure.key] for c in (whole, both) if figure.key in c.figures]
        if figure.has_before and len(ends) == 2:
            result.append(f"{figure.brief} {relative_change(*ends)}")
    return f"{names}: {', '.join(result)}."


def _median(times: LatencySamples) -> str:
    return milliseconds(times.median_ms)
