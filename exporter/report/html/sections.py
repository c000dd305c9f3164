"""A report's parts with the drawings that belong to them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from exporter.artifacts import ComparisonReport, LatencyRow, PlannedDeletion
from exporter.printable import counted
from exporter.report.html.charts.architecture import architecture_chart, sublayer_kinds
from exporter.report.html.charts.curves import divergence_chart, position_chart
from exporter.report.html.charts.forest import Estimate, forest
from exporter.report.html.charts.heat import heat_chart
from exporter.report.html.charts.samples import MOST_POINTS, sample_chart, timed_arms
from exporter.report.html.tradeoff import tradeoff_section
from exporter.report.html.view import Figure, Section, Source
from exporter.report.parts import all_parts
from exporter.report.parts.corners import corner_name
from exporter.report.parts.part import Block, Grid, Note, Part, Tone, verdict_sign
from exporter.report.words import shape_words, short_shape, speedup_words

_ALL_POINTS = 20_000
"""Points on the whole page: about 250 kB."""
_OPEN_ROWS = 6
_LONG_TABLE = 12
_NEVER_FOLDED = ("corners",)
_POSITIONS = "KL(baseline || candidate), mean over samples; all ranges are drawn equally wide."
_BOXES = (
    "Points are calls; the box is the middle half of them with the median, its line ends at the "
    "95th percentile."
)


def sections(source: Source, prefix: str, *, sources: int = 1) -> list[Section]:
    """Every part of the report, drawn where it can be.

    Args:
        source: The report.
        prefix: Begins the names of its drawings.
        sources: How many reports share the page, and the points on it.
    """
    found = [
        _section(part, list(_figures(part, source, prefix)), source.report, prefix, sources)
        for part in all_parts(source.report, source.importance)
        if part.key != "size"  # It stands at the top.
    ]
    if sources == 1 and (tradeoff := tradeoff_section([source], prefix)) is not None:
        place = next((i for i, s in enumerate(found) if s.key == "accuracy"), len(found) - 1)
        found.insert(place + 1, tradeoff)
    return found


def _section(
    part: Part, figures: list[Figure], report: ComparisonReport, prefix: str, sources: int
) -> Section:
    strips = _strips(report, prefix, sources) if part.key == "latency" else []
    blocks = [Note(_BOXES), *part.blocks] if strips else list(part.blocks)
    if len(strips) <= _OPEN_ROWS:
        figures, strips = figures + strips, []
    folded = [block for block in blocks if _is_long(block) and part.key not in _NEVER_FOLDED]
    blocks = [block for block in blocks if block not in folded]
    return Section(part.key, part.title, figures, blocks, folded, strips)


def _is_long(block: Block) -> bool:
    return isinstance(block, Grid) and len(block.rows) > _LONG_TABLE


def _figures(part: Part, source: Source, prefix: str) -> Iterator[Figure]:
    report, accuracy, key = source.report, source.report.accuracy, f"{prefix}{part.key}"
    match part.key:
        case "corners":
            yield from _corner_speedups(report, key)
        case "latency":
            yield _speedups(report.latency, key)
        case "positions" if accuracy:
            chart = position_chart(f"{key}-chart", accuracy.positions)
            yield Figure(
                chart,
                _POSITIONS,
            )
        case "generation" if accuracy and accuracy.generation:
            chart = divergence_chart(f"{key}-chart", accuracy.generation)
            yield Figure(chart, "Share of prompts whose greedy continuations are still the same.")
        case "tasks" if accuracy:
            yield _task_differences(report, key)
        case "importance" if source.importance:
            chart = heat_chart(f"{key}-chart", source.importance, report.plan)
            yield Figure(
                chart,
                "A stronger colour is more important; by the logarithm where all are positive.",
                [("h0", "redundant"), ("h8", "important"), ("cut", "dropped")],
            )
        case "dropped":
            yield from _architecture(source, key)


def _speedups(rows: Sequence[LatencyRow], key: str) -> Figure:
    chart = forest(
        f"{key}-chart",
        [_estimate(row) for row in rows],
        neutral=1.0,
        unit="x",
        title="Speedup at each shape",
        description="; ".join(f"{shape_words(row)}: {row.verdict}" for row in rows),
    )
    band = "noise floor" if any(row.noise_floor for row in rows) else "threshold"
    return Figure(
        chart,
        "Baseline time over candidate time with its 95 % interval; right of the line the candidate "
        f"is faster. The grey band is the {band}: within it a difference counts as none.",
    )


def _estimate(row: LatencyRow) -> Estimate:
    limit = row.noise_floor.ratio if row.noise_floor else 1 + row.threshold
    return Estimate(
        short_shape(row),
        row.speedup.ratio,
        *row.speedup.ci95,
        f"{row.speedup.ratio:.3f}x {row.verdict}",
        verdict_sign(row.verdict).tone,
        (1 / limit, limit),
    )


def _corner_speedups(report: ComparisonReport, key: str) -> Iterator[Figure]:
    estimates = [
        Estimate(
            f"{short_shape(row)}: {corner_name(report, corner)}",
            found.value,
            *found.ci95,
            speedup_words(found.value, found.ci95, digits=2),
            _side(found.ci95[0] - 1, found.ci95[1] - 1),
        )
        for row in report.latency
        for corner in report.corners
        if (found := corner.speedups.get(row.shape_name))
    ]
    if not estimates:
        return
    chart = forest(
        f"{key}-chart", estimates, neutral=1.0, unit="x",
        title="Speedup of each corner over the whole model in float",
        description="; ".join(f"{e.label}: {e.words}" for e in estimates),
    )  # fmt: skip
    yield Figure(
        chart, "How many times as fast as the whole model in float, with the 95 % interval."
    )


def _strips(report: ComparisonReport, prefix: str, sources: int) -> list[Figure]:
    rows = report.latency
    arms = sum(len(timed_arms(row)) for row in rows)
    most = max(10, min(MOST_POINTS, _ALL_POINTS // max(1, arms * sources)))
    return [
        Figure(
            sample_chart(f"{prefix}times-{index}", row, most=most),
            _thinning(row, most),
            title=shape_words(row).capitalize(),
        )
        for index, row in enumerate(rows)
    ]


def _thinning(row: LatencyRow, most: int) -> str:
    longest = max(len(times.samples_ms) for _, _, times in timed_arms(row))
    if longest <= most:
        return "A point a call."
    return f"{most} of {longest:,} calls drawn, evenly by rank; the box is of all."


def _task_differences(report: ComparisonReport, key: str) -> Figure:
    assert report.accuracy is not None
    estimates = [
        Estimate(
            f"{task.task}, {task.metric}",
            task.difference.value,
            *task.difference.ci95,
            f"{task.difference.value:+.3f}",
            _side(*task.difference.ci95, higher_is_better=task.higher_is_better),
        )
        for task in report.accuracy.tasks
    ]
    chart = forest(
        f"{key}-chart", estimates, neutral=0.0, title="Difference of the tasks' scores",
        description="; ".join(f"{e.label}: {e.words}" for e in estimates),
    )  # fmt: skip
    return Figure(chart, "Candidate minus baseline with its 95 % interval, paired by item.")


def _side(low: float, high: float, *, higher_is_better: bool = True) -> Tone:
    if low <= 0 <= high:
        return "even"
    return "good" if (low > 0) == higher_is_better else "bad"


def _architecture(source: Source, key: str) -> Iterator[Figure]:
    plan, importance = source.report.plan, source.importance
    known = {deletion.kind for deletion in plan}
    told = source.report.arms.baseline.layers
    if importance is not None:
        told = importance.model.num_layers
        known |= {score.kind for score in importance.scores}
    layers = max(told or 0, *(deletion.layer + 1 for deletion in plan), 0)
    if layers == 0 or not (plan or importance):
        return
    caption = (
        "How many layers follow is not on record here."
        if told is None
        else f"{counted(layers, 'layer')}, the first to the left."
    )
    kinds = sublayer_kinds(set(known))
    legend = [("k-attention", "attention"), ("k-mlp", "MLP")]
    empty: list[PlannedDeletion] = []
    for name, cut, says in (
        ("before", empty, caption),
        (
            "after",
            plan,
            "Dropped sublayers are hollow; b: a bias takes the place, L: a linear map.",
        ),
    ):
        chart = architecture_chart(
            f"{key}-{name}", layers, kinds, cut, title=f"Architecture {name}"
        )
        hollow = [("hollow", "dropped")] if cut else []
        yield Figure(chart, f"{name.capitalize()}. {says}", legend + hollow)
