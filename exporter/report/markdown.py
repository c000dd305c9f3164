"""report.md: the comparison for people, the verdict first."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence

from exporter.artifacts import ComparisonReport
from exporter.report.words import (
    HEADER,
    accuracy_rows,
    dropped_lines,
    headline,
    milliseconds,
    shape_words,
    significant,
    size_rows,
    speedup_words,
    verdict_sentences,
)


def render(report: ComparisonReport) -> str:
    """The whole report as Markdown (GitHub's tables)."""
    parts = [
        _verdict(report),
        _latency(report),
        _accuracy(report),
        _sizes(report),
        _dropped(report),
        _parity(report),
        _environment(report),
        _reproduce(report),
    ]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def _verdict(report: ComparisonReport) -> list[str]:
    lines = [f"- {sentence}" for sentence in verdict_sentences(report)]
    return ["# depthcut comparison", "", f"**{headline(report)}:**", "", *lines]


def _latency(report: ComparisonReport) -> list[str]:
    if not report.latency:
        return []
    header = ["phase", "arm", "median, ms", "p95, ms", "p99, ms", "samples", "speedup", "verdict"]
    rows = []
    for row in report.latency:
        words = [speedup_words(row.speedup), f"**{row.verdict}**"]
        for arm, times in (("baseline", row.baseline), ("candidate", row.candidate)):
            figures = [milliseconds(v) for v in (times.median_ms, times.p95_ms, times.p99_ms)]
            first = arm == "baseline"
            rows.append(
                [
                    shape_words(row) if first else "",
                    arm,
                    *figures,
                    str(len(times.samples_ms)),
                    *(words if first else ["", ""]),
                ]
            )
    return [
        "## Latency",
        "",
        *_table(header, rows, right=(2, 3, 4, 5, 6)),
        "",
        "Both arms took turns in one process (baseline, candidate, candidate, baseline, then the "
        "other way round). The speedup is the ratio of the medians, above 1 when the candidate is "
        "faster; in brackets its 95 % interval, from a paired bootstrap over the rounds. "
        "*faster* or *slower*: the whole interval lies beyond 1 %. *same*: it lies within 1 %. "
        "*inconclusive*: neither; measure with more rounds or on a quieter machine.",
    ]


def _accuracy(report: ComparisonReport) -> list[str]:
    accuracy = report.accuracy
    if accuracy is None:
        return ["## Accuracy", "", "Not measured: the models have no output called `logits`."]
    lines = [
        "## Accuracy",
        "",
        *_table(HEADER[:4], [row[:4] for row in accuracy_rows(report)], right=(1, 2, 3)),
        "",
        f"Evaluation text: {_escape(accuracy.text_source)}, {accuracy.tokens:,} tokens "
        f"(SHA-256 `{accuracy.text_sha256[:12]}`).",
    ]
    if accuracy.perplexity is None:
        lines.append(
            "There is no perplexity: the tokens are no text, or the model doesn't predict the "
            "next token."
        )
    lines.append(_calibration(report))
    lines.append(
        "KL divergence is KL(baseline || candidate) of the next-token distributions, mean over "
        "positions; 0 means that nothing changed."
    )
    return lines


def _calibration(report: ComparisonReport) -> str:
    text = report.calibration
    if text is None:
        return "Which text importance was measured on is not on record here."
    return (
        f"Importance was measured on another text: {_escape(text.source)}, {text.samples} x "
        f"{text.sequence_length}, {text.tokens:,} tokens (SHA-256 `{text.sha256[:12]}`)."
    )


def _sizes(report: ComparisonReport) -> list[str]:
    rows = [row[:4] for row in size_rows(report)]
    return ["## Size", "", *_table(HEADER[:4], rows, right=(1, 2, 3))]


def _dropped(report: ComparisonReport) -> list[str]:
    lines = dropped_lines(report.plan) or ["No deletion is on record."]
    return ["## What was dropped", "", *(f"- {line}" for line in lines)]


def _parity(report: ComparisonReport) -> list[str]:
    if not report.parity:
        return []
    rows = [
        [
            check.name,
            check.phase,
            significant(check.max_abs_error, 2),
            significant(check.tolerance, 2),
            "holds" if check.passed else "**does not hold**",
        ]
        for check in report.parity
    ]
    header = ["check", "phase", "max abs error", "tolerance", "result"]
    return ["## Parity", "", *_table(header, rows, right=(2, 3))]


def _environment(report: ComparisonReport) -> list[str]:
    machine, arms = report.environment, report.arms
    load = machine.load_average_1m
    rows = [
        ("processor", f"{machine.processor}, {machine.cpu_count} CPUs, {machine.machine}"),
        ("threads", str(machine.threads)),
        ("GPU", machine.gpu or "none used"),
        ("memory", f"{machine.memory_bytes / 2**30:.1f} GiB"),
        ("load before measuring", "unknown" if load is None else f"{load:.2f}"),
        ("platform", f"{machine.platform}, Python {machine.python}"),
        ("backend", f"{arms.baseline.backend}, {arms.baseline.provider}"),
        ("precision", f"{arms.baseline.precision} / {arms.candidate.precision}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in report.versions.items())),
    ]
    busy = load is not None and load > machine.cpu_count
    note = ["", "The machine was busy with other work: expect wide intervals."] if busy else []
    return ["## Environment", "", *_table(["what", "value"], rows), *note]


def _reproduce(report: ComparisonReport) -> list[str]:
    arms = report.arms
    own = shlex.join(report.command)
    alone = shlex.join(
        ["depthcut", "compare", arms.baseline.path, arms.candidate.path, "-o", "DIR"]
    )
    return [
        "## How to reproduce",
        "",
        "This report was written by",
        "",
        "```sh",
        own,
        "```",
        "",
        "The comparison alone, with the default shapes:",
        "",
        "```sh",
        alone,
        "```",
        "",
        f"SHA-256 of the baseline: `{arms.baseline.sha256[:12]}`, of the candidate: "
        f"`{arms.candidate.sha256[:12]}`. The raw samples are in `report.json`.",
    ]


def _table(
    header: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()
) -> list[str]:
    rule = ["---:" if column in right else "---" for column in range(len(header))]
    lines = [list(header), rule, *([_escape(cell) for cell in row] for row in rows)]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _escape(text: str) -> str:
    """Keeps a foreign text from breaking out of its cell."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
