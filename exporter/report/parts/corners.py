"""The four corners: whole and cut, in float and quantised, held against the whole one in float."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from exporter.artifacts import ComparisonReport, Corner, LatencyRow
from exporter.report.parts.part import Grid, Note, Part
from exporter.report.words import (
    milliseconds,
    named_arms,
    relative_change,
    short_shape,
    significant,
    speedup_range,
    speedup_words,
)

_HOW = (
    "All four took turns in the same rounds and read the same text. What stands below a time is "
    "how many times as fast as the whole model in float it is, in brackets the 95 % interval, "
    "computed as the speedup of the pair is. KL divergence and agreement are with the whole model "
    "in float, too; the same continuation is the share of prompts that are continued greedily with "
    "the same tokens to the end."
)


def corners_part(report: ComparisonReport) -> Part | None:
    """A column a corner; None where the report has none."""
    if not report.corners:
        return None
    return Part("corners", "Four corners", [corners_grid(report), Note(_HOW)])


def corners_grid(report: ComparisonReport, *, brief: bool = False) -> Grid:
    """Times, bytes and accuracy of all four; what was measured of none is left out.

    Args:
        report: One with corners.
        brief: With the speedup beside the time, and without its interval: for a terminal.
    """
    corners = report.corners
    rows = [line for row in report.latency for line in _times(row, corners, brief)]
    rows += [[what, *cells] for what, cells in _figures(corners) if any(c != "-" for c in cells)]
    header = ["", *(corner_name(report, corner) for corner in corners)]
    return Grid("Whole and cut, in float and quantised", header, rows, right=range(1, 5))


def corner_name(report: ComparisonReport, corner: Corner) -> str:
    """Its model, and what its weights are: ``cut, int4``."""
    arm = named_arms(report)[corner.arm]
    unnoted = "quantised" if corner.quantized else arm.precision
    weights = arm.quantization.scheme if arm.quantization else unnoted
    return f"{'cut' if corner.pruned else 'whole'}, {weights}"


def corners_sentence(report: ComparisonReport) -> str | None:
    """What the cut and the quantisation did together; None where nothing was timed or judged."""
    if not report.corners:
        return None
    whole, both = report.corners[0], report.corners[-1]
    names = f"The {corner_name(report, both)} model against the {corner_name(report, whole)} one"
    told = []
    if both.speedups:
        told.append(f"{speedup_range([s.value for s in both.speedups.values()])} times as fast")
    told.append(f"{relative_change(whole.file_bytes, both.file_bytes)} bytes")
    if whole.perplexity is not None and both.perplexity is not None:
        told.append(f"perplexity {relative_change(whole.perplexity, both.perplexity)}")
    return f"{names}: {', '.join(told)}."


def _times(row: LatencyRow, corners: Sequence[Corner], brief: bool) -> Iterator[list[str]]:
    times = {"baseline": row.baseline, "candidate": row.candidate, **row.references}
    told = [milliseconds(times[c.arm].median_ms) if c.arm in times else "-" for c in corners]
    found = [corner.speedups.get(row.shape_name) for corner in corners]
    what = f"{short_shape(row)}, ms"
    if brief:
        beside = ["" if speedup is None else f" ({speedup.value:.2f}x)" for speedup in found]
        yield [what, *map("".join, zip(told, beside, strict=True))]
        return
    yield [what, *told]
    yield ["", *("-" if s is None else speedup_words(s.value, s.ci95, digits=2) for s in found)]


def _figures(corners: Sequence[Corner]) -> Iterator[tuple[str, list[str]]]:
    def cells(value: Callable[[Corner], float | None], words: Callable[[float], str]) -> list[str]:
        found = map(value, corners)
        return ["-" if number is None else words(number) for number in found]

    yield "files, MB", cells(lambda c: c.file_bytes / 1e6, lambda size: f"{size:,.1f}")
    yield "perplexity", cells(lambda c: c.perplexity, significant)
    yield "KL divergence, nats", cells(lambda c: c.kl_divergence, lambda kl: significant(kl, 3))
    yield "same top-1 token", cells(lambda c: c.top1_agreement, _percent)
    yield "same continuation", cells(lambda c: c.exact_match, _percent)
    yield "cosine of embeddings", cells(lambda c: c.embedding_cosine, lambda c: f"{c:.4f}")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
