"""report.md: the comparison for people, the verdict first."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence

from exporter.artifacts import FEWEST_ROUNDS, Arm, ComparisonReport, LatencyRow
from exporter.report.words import (
    HEADER,
    accuracy_rows,
    dropped_lines,
    has_too_few_rounds,
    headline,
    milliseconds,
    shape_words,
    significant,
    size_rows,
    speedup_words,
    verdict_sentences,
)

_CPU = "CPUExecutionProvider"  # where exporter.parity runs, whatever is timed
_MUCH = 0.1
_BUSY = (
    "Other processes took {:.0f} % of the machine's CPU time while the arms were timed: expect "
    "wide intervals."
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
        *_latency_warnings(report),
    ]


def _latency_warnings(report: ComparisonReport) -> list[str]:
    """What makes a row less sure than it looks, each with the rows that it is true of."""
    few = [row for row in report.latency if has_too_few_rounds(row)]
    unsettled = [row for row in report.latency if row.settled is False]
    lines = []
    if few:
        lines.append(
            f"**Too few rounds:** {_shapes(few)}. With fewer than {FEWEST_ROUNDS} the true speedup "
            "lies outside of the brackets more often than 5 times in 100 (with 2 rounds in about "
            "half of all runs), so there is no verdict."
        )
    if unsettled:
        lines.append(
            f"**Not settled:** {_shapes(unsettled)}. Times were still changing when the warm-up "
            "had taken as long as it may; expect them to differ in the next run."
        )
    return [part for line in lines for part in ("", line)]


def _shapes(rows: Sequence[LatencyRow]) -> str:
    return "; ".join(shape_words(row) for row in rows)


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
    return ["## Parity", "", *_table(header, rows, right=(2, 3)), *_parity_device(report)]


def _parity_device(report: ComparisonReport) -> list[str]:
    """Says that these checks are none of the device that was timed, where that is so."""
    provider = report.arms.baseline.provider
    if provider == _CPU:
        return []
    return [
        "",
        f"These checks ran on the CPU ({_CPU}), not on {provider}, where the arms were "
        "timed and compared.",
    ]


def _environment(report: ComparisonReport) -> list[str]:
    machine, arms = report.environment, report.arms
    load, others = machine.load_average_1m, machine.other_cpu_share
    rows = [
        ("processor", f"{machine.processor}, {machine.cpu_count} CPUs, {machine.machine}"),
        ("threads", str(machine.threads)),
        ("GPU", machine.gpu or "none used"),
        ("memory", f"{machine.memory_bytes / 2**30:.1f} GiB"),
        ("other processes while timing", _share(machine.other_cpu_share)),
        ("load before measuring", "unknown" if load is None else f"{load:.2f}, this run included"),
        ("platform", f"{machine.platform}, Python {machine.python}"),
        ("backend", f"{arms.baseline.backend}, {arms.baseline.provider}"),
        *_left_to_the_cpu(report),
        ("precision", f"{arms.baseline.precision} / {arms.candidate.precision}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in report.versions.items())),
    ]
    note = ["", _BUSY.format(100 * others)] if others is not None and others > _MUCH else []
    return ["## Environment", "", *_table(["what", "value"], rows), *note]


def _share(share: float | None) -> str:
    return "unknown" if share is None else f"{100 * share:.0f} % of all CPU time"


def _left_to_the_cpu(report: ComparisonReport) -> list[tuple[str, str]]:
    arms = report.arms
    if arms.baseline.provider == _CPU:
        return []
    counts = f"{_on_cpu(arms.baseline)} / {_on_cpu(arms.candidate)}"
    return [("arithmetic on shapes, on the CPU", counts)]


def _on_cpu(arm: Arm) -> str:
    counts = ", ".join(f"{number} {name}" for name, number in sorted(arm.cpu_nodes.items()))
    return f"{sum(arm.cpu_nodes.values())} nodes ({counts})" if counts else "no node"


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
