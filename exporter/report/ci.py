"""A check in words, and what CI systems read of it: JUnit, JSON for benchmarks, GitHub's own."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import PurePath
from typing import Any
from xml.etree import ElementTree as Xml  # only written here, never read

from exporter.artifacts import Check, CheckReport, CheckVerdict, ComparisonReport, Drift
from exporter.artifacts.figures import LIMITED
from exporter.files import sha256_bytes
from exporter.printable import printable, printable_json, printable_line, printable_xml, significant
from exporter.report.markdown import escaped, table_lines
from exporter.report.sections.blocks import Grid

_MARKS = {"regressed": "❌", "inconclusive": "❔", "improved": "✅", "within_limit": "✅"}
_MARK = "<!-- depthcut check {} -->"
_COMMON = (
    "baseline",
    "baseline-quantized",
    "candidate",
    "candidate-quantized",
    "engines",
    "hf",
    "onnx",
)
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
    seconds = (check.after or 0) / 1000 if LIMITED[check.quantity].unit == "ms" else 0
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
    name = _name(path)
    whose = f"{found.key.model} {name} {path.name}"
    mark = _MARK.format(sha256_bytes(whose.encode())[:12])
    whole = _name(PurePath(report.arms.baseline.path))
    title = f"{name} against {whole}" if whole != name else name  # both in one export's folder
    return f"{mark}\n{summary(found, f'depthcut check: {title}')}"


def _name(path: PurePath) -> str:
    named = [part for part in path.parts if part not in _COMMON and not part.endswith(_FILES)]
    return named[-1] if named else str(path)


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
    entries = [one for one in _entries(report) if math.isfinite(one[0]["value"])]
    files = {
        name: [entry for entry, higher in entries if higher == is_higher]
        for name, is_higher in (("smaller.json", False), ("bigger.json", True))
    }
    texts = {name: json.dumps(entries, indent=2) + "\n" for name, entries in files.items()}
    return {name: printable_json(text) for name, text in texts.items()}


def _entries(report: ComparisonReport) -> Iterator[tuple[dict[str, Any], bool]]:
    arm = report.arms.candidate

    def entry(
        name: str, unit: str, value: float, bounds: tuple[float, float] | None = None
    ) -> dict[str, Any]:
        return {
            "name": name,
            "unit": unit,
            "value": value,
            "extra": f"{arm.backend}, {report.environment.processor}",
            **({"range": f"{bounds[0]:.4g} to {bounds[1]:.4g}"} if bounds else {}),
        }

    for row in report.latency:
        times, shape = row.candidate, row.shape_name
        quarters = [times.median_ms] * 3
        if len(times.samples_ms) > 1:
            quarters = statistics.quantiles(times.samples_ms, n=4, method="inclusive")
        yield entry(f"{shape}: latency", "ms", times.median_ms, (quarters[0], quarters[2])), False
        yield entry(f"{shape}: speedup", "x", row.speedup.ratio, row.speedup.ci95), True
    for figure in LIMITED.values():
        for one in figure.readings(report.accuracy, arm):
            is_unknown = figure.stands_in == "arm" and figure.ci_unit == "1" and not one.value
            if one.place.ci and not is_unknown:
                bounds = None
                if figure.of_the_cut and one.interval is not None:
                    low, high = one.interval.ci95
                    bounds = figure.ci_factor * low, figure.ci_factor * high
                name, value = one.place.ci.format(one.item), figure.ci_factor * one.value
                yield entry(name, figure.ci_unit, value, bounds), figure.higher_is_better


VERDICT_WORDS: dict[CheckVerdict, str] = {
    "regressed": "regression",
    "inconclusive": "can't tell",
    "improved": "improved",
    "within_limit": "within the limit",
}
"""What people read for each verdict, the worst first."""


def check_name(check: Check) -> str:
    """``decode at 512: time``."""
    return f"{check.subject}: {LIMITED[check.quantity].name or check.quantity}"


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
    """Which models are judged, a line each."""
    names = {"earlier": "Candidate of the earlier report"}
    return [f"{names.get(n, n.capitalize())}: {path}" for n, path in found.models.items()]


def reasons(found: CheckReport) -> list[str]:
    """What there is to say beside the table, a line each."""
    of_checks = [f"{check_name(check)}: {check.reason}" for check in found.checks if check.reason]
    return [*of_checks, *remarks(found)]


def remarks(found: CheckReport) -> list[str]:
    """The same without the reasons of single checks: what is told of the run as a whole."""
    return [
        *(
            f"Accepted difference. {field}: {there} there, {here} here."
            for field, (there, here) in found.accepted_differences.items()
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
    if check.ci95 is None:
        return value
    low, high = (_value(check, bound).removesuffix(" %").removesuffix("x") for bound in check.ci95)
    return f"{value} [{low}, {high}]"


def limit_words(check: Check) -> str:
    """What is allowed: ``at most +3.0 %``."""
    if check.limit is None:
        return ""
    side = "at most" if check.better == "lower" else "at least"
    return f"{side} {_value(check, check.limit)}"


def drift_sentence(drift: Drift) -> str:
    """A slow change in one line."""
    return (
        f"{drift.subject}: over {drift.entries} runs, from {drift.first} to {drift.last}, the time "
        f"relative to the unpruned arm grew by {100 * (drift.total - 1):.1f} %, "
        f"{100 * drift.per_entry:.2f} % a run."
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
    figure = LIMITED[check.quantity]
    return significant(value, 3) if _is_loss(check) else figure.judged(value)


def _amount(check: Check, value: float) -> str:
    return significant(value) if _is_loss(check) else LIMITED[check.quantity].amount(value)


def _is_loss(check: Check) -> bool:
    """Whether a task's score is no share of right answers."""
    return LIMITED[check.quantity].stands_in == "tasks" and check.better == "lower"
