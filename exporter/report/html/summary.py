"""The top of the page: key figures, and one table of speed, accuracy and size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from exporter.artifacts import ComparisonReport, LatencyRow
from exporter.report.html.view import Source, Tile
from exporter.report.parts.part import Cell, Grid, verdict_sign
from exporter.report.verdict import quality_sign, speed_sign
from exporter.report.words import (
    HEADER,
    accuracy_rows,
    latency_rows,
    milliseconds,
    relative_change,
    significant,
    size_rows,
    speedup_range,
)


def tiles(report: ComparisonReport) -> Iterator[Tile]:
    """The figures that a reader asks for first; those that were not measured are left out."""
    rows = report.latency
    if rows:
        count = f"{len(rows)} shape" + "s" * (len(rows) > 1)
        yield Tile(
            f"{speedup_range([row.speedup.ratio for row in rows], '–')}x",
            "speed",
            f"in {count}",
            speed_sign(report).tone,
        )
    yield from _quality(report)
    before, after = report.arms.baseline, report.arms.candidate
    yield Tile(
        relative_change(before.parameters, after.parameters) or "-",
        "parameters",
        f"{before.parameters / 1e6:,.2f} → {after.parameters / 1e6:,.2f} million",
    )
    if before.kv_cache_bytes_per_token:
        cache = (before.kv_cache_bytes_per_token, after.kv_cache_bytes_per_token)
        words = f"{cache[0]:,} → {cache[1]:,} bytes per token"
        yield Tile(relative_change(*cache), "KV cache", words)


def _quality(report: ComparisonReport) -> Iterator[Tile]:
    accuracy = report.accuracy
    if accuracy is None:
        return
    if accuracy.perplexity is not None:
        pair = accuracy.perplexity
        yield Tile(
            relative_change(pair.baseline, pair.candidate),
            "perplexity",
            f"{significant(pair.baseline)} → {significant(pair.candidate)}, lower is better",
            quality_sign(report).tone,
        )
    if accuracy.top1_agreement is not None:
        detail = f"of {accuracy.tokens:,} positions"
        yield Tile(f"{100 * accuracy.top1_agreement:.1f} %", "same most likely token", detail)
    if accuracy.embeddings is not None:
        yield Tile(f"{accuracy.embeddings.cosine:.4f}", "cosine of embeddings", "mean over texts")


def glance(source: Source) -> list[Grid]:
    """Speed, accuracy and size, each a table of the same form."""
    report = source.report
    found = [_speed(report)] if report.latency else []
    found += [
        Grid(name, ["", *HEADER[1:4]], [row[:4] for row in rows], right=(1, 2, 3))
        for name, rows in (("Accuracy", accuracy_rows(report)), ("Size", size_rows(report)))
        if rows
    ]
    return found


def _speed(report: ComparisonReport) -> Grid:
    names = list(dict.fromkeys(name for row in report.latency for name in row.references))
    floor = ["noise floor"] if any(row.noise_floor for row in report.latency) else []
    header = ["", "speedup", "verdict", "baseline", "candidate", *names, *floor]
    rows = [
        _speed_row(told[:4], row, names, bool(floor))
        for told, row in zip(latency_rows(report), report.latency, strict=True)
    ]
    return Grid("Speed, median times", header, rows, right=[1, *range(3, len(header))])


def _speed_row(
    told: Sequence[str], row: LatencyRow, names: Sequence[str], with_floor: bool
) -> list[Cell]:
    what, baseline, candidate, change = told
    others = [
        milliseconds(row.references[name].median_ms) if name in row.references else "-"
        for name in names
    ]
    floor = "-" if row.noise_floor is None else f"{row.noise_floor.ratio:.3f}x"
    sign = verdict_sign(row.verdict)
    return [what, change, sign, baseline, candidate, *others, *([floor] if with_floor else [])]
