"""A check in words, and what CI systems read of it: JUnit, JSON for benchmarks, GitHub's own."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Literal
from xml.etree import ElementTree as Xml  # only written here, never read

from exporter.artifacts import (
    Check,
    CheckReport,
    CheckVerdict,
    ComparisonReport,
    Drift,
)
from exporter.files import sha256_bytes
from exporter.printable import (
    milliseconds,
    printable,
    printable_json,
    printable_line,
    printable_xml,
    significant,
)
from exporter.report.markdown import escaped, table_lines
from exporter.report.sections.blocks import Grid

_MARKS = {"regressed": "❌", "inconclusive": "❔", "improved": "✅", "within_limit": "✅"}
_MARK = "<!-- depthcut check {} -->"
_COMMON = ("candidate", "candidate-quantized", "engines", "hf", "onnx")
"""Folders of every export: their names say nothing."""
_FILES = (".onnx", ".engine", ".plan")


def junit(found: CheckReport, *, inconclusive_fails: bool = False) -> str:
    """JUnit XML: a test case for each check.

    A check without a verdict is ``skipped``: nothing was found to be wrong; where the caller takes
    it for a failure, it is one here too. ``time`` is the candidate's median in seconds.
    """
    failing = {"regressed", *(["inconclusive"] if inconclusive_fails else [])}
    failures = sum(check.verdict in failing for check in found.checks)
    unsure = sum(check.verdict == "inconclusive" for check in found.checks)
    counts = {"tests": str(len(found.checks)), "failures": str(failures), "errors": "0"}
    skipped = "0" if inconclusive_fails else str(unsure)
    root = Xml.Element("testsuites", {"name": "depthcut", **counts})
    suite = Xml.SubElement(
        root, "testsuite", {"name": "depthcut check", **counts, "skipped": skipped}
    )
    properties = Xml.SubElement(suite, "properties")
    for name, value in _properties(found).items():
        Xml.SubElement(properties, "property", {"name": name, "value": value})
    for check in found.checks:
        _case(suite, found, check, fails=check.verdict in failing)
    Xml.SubElement(suite, "system-out").text = "\n".join(remarks(found))
    return printable_xml(root)


def _case(suite: Xml.Element, report: CheckReport, check: Check, *, fails: bool) -> None:
    seconds = (check.after or 0) / 1000 if check.unit == "ms" else 0
    case = Xml.SubElement(
        suite,
        "testcase",
        {
            "classname": f"depthcut.{report.key.backend}.{check.quantity}",
            "name": check_name(check),
            "time": f"{seconds:.6f}",
        },
    )
    sentence = check_sentence(check)
    if fails:
        failure = Xml.SubElement(case, "failure", {"message": sentence, "type": check.verdict})
        failure.text = sentence
    elif check.verdict == "inconclusive":
        Xml.SubElement(case, "skipped", {"message": sentence})
    Xml.SubElement(case, "system-out").text = sentence


def _properties(report: CheckReport) -> dict[str, str]:
    key = report.key
    return {
        "verdict": report.verdict,
        "against": report.against,
        "model": key.model,
        "provider": key.provider,
        "precision": key.precision,
        "device": key.device,
        "threads": str(key.threads),
    }


def comment(found: CheckReport, report: ComparisonReport) -> str:
    """Markdown for a comment on a pull request.

    The first line is a mark by which a later run finds its own comment and writes over it: a hash
    of the model and of the candidate's name, so that several models, or cuts, have a comment each.
    """
    path = PurePath(report.arms.candidate.path)
    named = [part for part in path.parts if part not in _COMMON and not part.endswith(_FILES)]
    name = named[-1] if named else str(path)
    whose = f"{found.key.model} {name} {path.name}"
    mark = _MARK.format(sha256_bytes(whose.encode())[:12])
    return f"{mark}\n{summary(found, f'depthcut check: {name}')}"


def summary(found: CheckReport, title: str = "depthcut check") -> str:
    """Markdown for ``$GITHUB_STEP_SUMMARY``, and for a comment on a pull request."""
    grid, models = check_grid(found), model_lines(found)
    rows = [
        [*row[:-1], f"{_MARKS[check.verdict]} {VERDICT_WORDS[check.verdict]}"]
        for row, check in zip(grid.rows, found.checks, strict=True)
    ]
    lines = [
        f"## {escaped(title)}",
        "",
        f"**{escaped(conclusion(found))}**",
        "",
        *([*(f"- {escaped(line)}" for line in models), ""] if models else []),
        *table_lines(replace(grid, rows=rows)),
        "",
        *(f"- {escaped(line)}" for line in reasons(found)),
    ]
    return printable("\n".join(lines) + "\n")


def annotation_lines(found: CheckReport, *, inconclusive_fails: bool = False) -> list[str]:
    """A line for each regression, check without a verdict, and drift."""
    unsure = "error" if inconclusive_fails else "warning"
    levels = {"regressed": "error", "inconclusive": unsure}
    lines = [
        _command(levels[check.verdict], check_name(check), check_sentence(check))
        for check in found.checks
        if check.verdict in levels
    ]
    drifts = (
        _command("warning", f"{one.subject}: drift", drift_sentence(one)) for one in found.drift
    )
    return [*lines, *drifts]


def _command(level: str, title: str, message: str) -> str:
    return f"::{level} title={_property(title)}::{_data(message)}"


def _data(text: str) -> str:
    return printable_line(text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A"))


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")


def github_benchmark(report: ComparisonReport) -> dict[str, str]:
    """JSON for github-action-benchmark, which knows one direction a file.

    ``range`` is only shown there; it compares with the last point alone, which is why the gate is
    ``depthcut check`` and not the action.
    """
    figures = [one for one in _figures(report) if math.isfinite(one.value)]
    files = {
        name: [_entry(figure, report) for figure in figures if figure.better == better]
        for name, better in (("smaller.json", "lower"), ("bigger.json", "higher"))
    }
    texts = {name: json.dumps(entries, indent=2) + "\n" for name, entries in files.items()}
    return {name: printable_json(text) for name, text in texts.items()}


@dataclass(frozen=True)
class _Figure:
    """One number of the candidate, and its bounds: quartiles of a time, else an interval."""

    name: str
    unit: str
    value: float
    bounds: tuple[float, float] | None = None
    better: Literal["lower", "higher"] = "lower"


def _entry(figure: _Figure, report: ComparisonReport) -> dict[str, object]:
    bounds = figure.bounds
    return {
        "name": figure.name,
        "unit": figure.unit,
        "value": figure.value,
        "extra": f"{report.arms.candidate.backend}, {report.environment.processor}",
        **({"range": f"{bounds[0]:.4g} to {bounds[1]:.4g}"} if bounds else {}),
    }


def _figures(report: ComparisonReport) -> Iterator[_Figure]:
    for row in report.latency:
        times, shape = row.candidate, row.shape_name
        quarters = [times.median_ms] * 3
        if len(times.samples_ms) > 1:
            quarters = statistics.quantiles(times.samples_ms, n=4, method="inclusive")
        ends = quarters[0], quarters[2]
        yield _Figure(f"{shape}: latency", "ms", times.median_ms, ends)
        yield _Figure(f"{shape}: speedup", "x", row.speedup.ratio, row.speedup.ci95, "higher")
    yield from _accuracy(report)
    arm = report.arms.candidate
    sizes = {
        "file-size": ("bytes", arm.file_bytes),
        "kv-cache-per-token": ("bytes", arm.kv_cache_bytes_per_token),
        "device-memory": ("bytes", arm.device_memory_bytes),
        "nodes": ("1", arm.nodes or None),
    }
    for name, (unit, size) in sizes.items():
        if size is not None:
            yield _Figure(f"model: {name}", unit, size)


def _accuracy(report: ComparisonReport) -> Iterator[_Figure]:
    accuracy = report.accuracy
    if accuracy is None:
        return
    if accuracy.perplexity is not None:
        yield _Figure("accuracy: perplexity", "1", accuracy.perplexity.candidate)
    units = {"kl_divergence": (1, "nats"), "top1_agreement": (100, "%")}
    for figure in accuracy.agreement:
        scale, unit = units.get(figure.key, (1, "1"))
        low, high = (figure.value,) * 2 if figure.interval is None else figure.interval.ci95
        yield _Figure(
            f"accuracy: {figure.key.replace('_', '-')}",
            unit,
            scale * figure.value,
            None if figure.interval is None else (scale * low, scale * high),
            "higher" if figure.higher_is_better else "lower",
        )
    for task in accuracy.tasks:
        yield _Figure(f"{task.task} {task.metric}: score", "1", task.candidate, better="higher")


VERDICT_WORDS: dict[CheckVerdict, str] = {
    "regressed": "regression",
    "inconclusive": "can't tell",
    "improved": "improved",
    "within_limit": "within the limit",
}
"""What people read for each verdict, the worst first."""

_NAMES = {
    "kl_divergence": "KL divergence",
    "top1_agreement": "same top-1 token",
    "embedding_cosine": "cosine of embeddings",
    "rank_agreement": "ranking of pairs, Spearman",
}
_UNITS = {"time": " ms", "speedup": " ms"}


def check_name(check: Check) -> str:
    """``decode at 512: time``."""
    return f"{check.subject}: {_NAMES.get(check.quantity, check.quantity)}"


def check_grid(found: CheckReport) -> Grid:
    """A row a check."""
    rows = [
        (
            check_name(check),
            "" if check.before is None else _amount(check, check.before),
            "" if check.after is None else _amount(check, check.after),
            change_words(check),
            limit_words(check),
            VERDICT_WORDS[check.verdict],
        )
        for check in found.checks
    ]
    header = ("what", "before", "after", "value [judged by]", "limit", "verdict")
    return Grid("depthcut check", header, rows, right=(1, 2, 3, 4))


def model_lines(found: CheckReport) -> list[str]:
    """Which models are judged, a line each; none for a check of a version that didn't keep them."""
    if found.models is None:
        return []
    named = {
        "Baseline": found.models.baseline,
        "Candidate": found.models.candidate,
        "Candidate of the earlier report": found.models.earlier,
    }
    return [f"{what}: {path}" for what, path in named.items() if path is not None]


def reasons(found: CheckReport) -> list[str]:
    """What there is to say beside the table, a line each."""
    of_checks = [f"{check_name(check)}: {check.reason}" for check in found.checks if check.reason]
    return [*of_checks, *remarks(found)]


def remarks(found: CheckReport) -> list[str]:
    """The same without the reasons of single checks: what is told of the run as a whole."""
    return [
        *(
            f"Accepted difference. {d.field}: {d.baseline} there, {d.report} here."
            for d in found.accepted_differences
        ),
        *(f"Drift. {drift_sentence(drift)}" for drift in found.drift),
        *found.notes,
    ]


def check_sentence(check: Check) -> str:
    """One check in one line, with the reason for its verdict."""
    change = "" if check.value is None else f" {change_words(check)}"
    limit = "" if check.limit is None else f", limit {limit_words(check)}"
    words = f"{check_name(check)}{change}{limit}: {VERDICT_WORDS[check.verdict]}."
    return f"{words} {check.reason}".strip()


def change_words(check: Check) -> str:
    """The value with its interval: ``+3.1 % [+2.0, +4.2]``, ``1.09x [1.07, 1.11]``."""
    if check.value is None:
        return "missing"
    value = _value(check, check.value)
    return value if check.ci95 is None else f"{value} {interval_words(check, check.ci95)}"


def interval_words(check: Check, ci95: tuple[float, float]) -> str:
    """An interval of the check's value, in the value's unit: ``[+2.0, +4.2]``."""
    low, high = (_value(check, bound).removesuffix(" %").removesuffix("x") for bound in ci95)
    return f"[{low}, {high}]"


def limit_words(check: Check) -> str:
    """What is allowed: ``at most +3.0 %``."""
    if check.limit is None:
        return ""
    side = "at most" if check.better == "lower" else "at least"
    return f"{side} {_value(check, check.limit)}"


def drift_sentence(drift: Drift) -> str:
    """A slow change in one line."""
    low, high = (100 * bound for bound in drift.ci95)
    return (
        f"{drift.subject}: over {drift.entries} runs, from {drift.first} to {drift.last}, the time "
        f"relative to the unpruned arm grew by {100 * (drift.total - 1):.1f} %, "
        f"{100 * drift.per_entry:.2f} % a run [{low:.2f} %, {high:.2f} %] "
        f"(Mann-Kendall p = {drift.p_value:.1g})."
    )


def conclusion(found: CheckReport) -> str:
    """All checks in one line."""
    counts = Counter(check.verdict for check in found.checks)
    text = ", ".join(
        f"{counts[word]} {VERDICT_WORDS[word]}" for word in VERDICT_WORDS if counts[word]
    )
    openings = {"regressed": "Regression", "inconclusive": "Can't tell"}
    return f"{openings.get(found.verdict, 'Passed')}: {text}."


def _value(check: Check, value: float) -> str:
    if check.quantity == "speedup":
        return f"{value:.3f}x"
    if check.quantity == "nodes":
        return f"{100 * (value - 1):+.3g} %"
    if check.scale == "ratio":
        return f"{100 * (value - 1):+.1f} %"
    if check.quantity in ("kl_divergence", "embedding_cosine", "rank_agreement") or _is_loss(check):
        return significant(value, 3)
    sign = "+" if check.quantity == "task" else ""
    return f"{100 * value:{sign}.1f} %"


def _amount(check: Check, value: float) -> str:
    if check.quantity in _UNITS:
        return milliseconds(value) + _UNITS[check.quantity]
    if check.quantity == "nodes":
        return f"{value:,.0f}"
    if check.quantity in ("size", "memory"):
        return f"{value / 1e6:,.1f} MB" if value >= 1e6 else f"{value:,.0f} B"
    if check.quantity in ("task", "top1_agreement") and not _is_loss(check):
        return f"{100 * value:.1f} %"
    return significant(value)


def _is_loss(check: Check) -> bool:
    """Whether a task's score is no share of right answers."""
    return check.quantity == "task" and check.better == "lower"
