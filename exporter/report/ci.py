"""What CI systems read of a check: JUnit, github-action-benchmark's JSON, and GitHub's own."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Literal
from xml.etree import ElementTree as Xml  # only written here, never read

from exporter.artifacts import Check, CheckReport, ComparisonReport
from exporter.files import sha256_bytes
from exporter.printable import printable, printable_json, printable_line, printable_xml
from exporter.report.checks import (
    VERDICT_WORDS,
    check_grid,
    check_name,
    check_sentence,
    conclusion,
    drift_sentence,
    model_lines,
    reasons,
    remarks,
)
from exporter.report.markdown import escaped, table_lines

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
    if accuracy.kl_divergence is not None:
        ends = None if accuracy.kl_interval is None else accuracy.kl_interval.ci95
        yield _Figure("accuracy: kl-divergence", "nats", accuracy.kl_divergence, ends)
    if accuracy.top1_agreement is not None:
        share = 100 * accuracy.top1_agreement
        yield _Figure("accuracy: top1-agreement", "%", share, better="higher")
    if accuracy.embeddings is not None:
        cosine = accuracy.embeddings.cosine
        yield _Figure("accuracy: embedding-cosine", "1", cosine, better="higher")
    for task in accuracy.tasks:
        yield _Figure(f"{task.task} {task.metric}: score", "1", task.candidate, better="higher")
