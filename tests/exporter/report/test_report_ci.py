"""What CI systems read, held against what each format says of itself."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as Xml

import pytest
from markdown_it import MarkdownIt

from exporter.artifacts import CheckReport, ComparisonReport, Drift, JudgedModels
from exporter.cli import run
from exporter.gate.gate import BaselineMatch, check
from exporter.gate.limits import Limits
from exporter.report.checks import check_grid, conclusion
from exporter.report.ci import (
    FORMATS,
    Checked,
    CiFormat,
    bencher,
    github,
    github_benchmark,
    gitlab_metrics,
    junit,
    pytest_benchmark,
)
from exporter.report.ci.metrics import metrics
from tests.made_reports import gate_accuracy, gate_report, gate_row, samples

LENGTHS = {128: 88.0, 256: 83.0, 512: 70.0, 1024: 80.1}
"""Slower, unsure, faster, the same."""


@pytest.fixture
def report() -> ComparisonReport:
    widths = {256: 0.05}
    rows = [
        gate_row(n, candidate_ms=ms, width=widths.get(n, 0.01), candidate=spread(ms))
        for n, ms in LENGTHS.items()
    ]
    return gate_report(rows)


def checked(report: ComparisonReport) -> Checked:
    return Checked(check(report, Limits(max_slowdown=0.03)), report)


def spread(median_ms: float) -> Any:
    values = [median_ms * (1 + 0.005 * (n - 11.5)) for n in range(24)]
    return samples(median_ms).model_copy(update={"samples_ms": values})


@pytest.fixture
def found(report: ComparisonReport) -> CheckReport:
    old = gate_report([gate_row(n) for n in LENGTHS])
    return check(report, Limits(max_slowdown=0.03), baseline=BaselineMatch(old))


HOSTILE = 'x\n::error::no | <b>&"\x00\x1b]]>, 100 %'


@pytest.fixture
def hostile(found: CheckReport) -> CheckReport:
    """Every text that comes from elsewhere tries to break out."""
    drift = Drift(
        subject=HOSTILE, entries=20, per_entry=0.01, ci95=(0.0, 0.02), total=1.2, p_value=0.001,
        first=HOSTILE, last=HOSTILE,
    )  # fmt: skip
    checks = [
        one.model_copy(update={"subject": HOSTILE, "reason": HOSTILE}) for one in found.checks
    ]
    key = found.key.model_copy(update={"device": HOSTILE, "backend": HOSTILE})
    models = JudgedModels(baseline=HOSTILE, candidate=HOSTILE, earlier=HOSTILE)
    changes = {"models": models, "checks": checks, "drift": [drift], "notes": [HOSTILE], "key": key}
    return found.model_copy(update=changes)


def test_each_verdict_has_its_place_in_junit(found: CheckReport) -> None:
    root = Xml.fromstring(junit.render(Checked(found, gate_report())))
    (suite,) = root
    assert (root.tag, suite.tag) == ("testsuites", "testsuite")
    for element in (root, suite):
        assert (element.get("tests"), element.get("failures"), element.get("errors")) == (
            "4",
            "1",
            "0",
        )
    cases = {case.get("name"): case for case in suite.iter("testcase")}
    assert len(cases) == 4
    inside = {name: [child.tag for child in case] for name, case in cases.items()}
    assert inside == {
        "prefill 128: time": ["failure", "system-out"],
        "prefill 256: time": ["skipped", "system-out"],
        "prefill 512: time": ["system-out"],
        "prefill 1024: time": ["system-out"],
    }
    failure = cases["prefill 128: time"].find("failure")
    assert failure is not None
    assert "+10.0 %" in failure.get("message", "")
    assert cases["prefill 128: time"].get("time") == "0.088000"


def test_junit_keeps_to_what_jenkins_and_pytest_agree_on(found: CheckReport) -> None:
    """The attributes and children that Jenkins' junit-10.xsd has, in an order that it takes."""
    allowed = {
        "testsuites": ({"name", "time", "tests", "failures", "errors"}, {"testsuite"}),
        "testsuite": (
            {"name", "tests", "failures", "errors", "skipped", "time", "timestamp", "hostname"},
            {"properties", "testcase", "system-out", "system-err"},
        ),
        "properties": (set(), {"property"}),
        "property": ({"name", "value"}, set()),
        "testcase": (
            {"name", "classname", "time"},
            {"skipped", "error", "failure", "system-out", "system-err"},
        ),
        "failure": ({"message", "type"}, set()),
        "skipped": ({"message", "type"}, set()),
        "system-out": (set(), set()),
    }
    for element in Xml.fromstring(junit.render(Checked(found, gate_report()))).iter():
        attributes, children = allowed[element.tag]
        assert set(element.attrib) <= attributes
        assert {child.tag for child in element} <= children


def test_not_knowing_fails_in_junit_where_it_fails_in_the_shell(found: CheckReport) -> None:
    (suite,) = Xml.fromstring(junit.render(Checked(found, gate_report(), inconclusive_fails=True)))
    assert (suite.get("failures"), suite.get("skipped")) == ("2", "0")
    assert len(list(suite.iter("failure"))) == 2


def test_foreign_text_breaks_no_xml(hostile: CheckReport) -> None:
    text = junit.render(Checked(hostile, gate_report()))
    assert "\x00" not in text
    (suite,) = Xml.fromstring(text)
    assert len(list(suite.iter("testcase"))) == 4


def test_annotations_are_errors_and_warnings(found: CheckReport) -> None:
    lines = github.annotation_lines(found)
    assert [line.split(" ")[0] for line in lines] == ["::error", "::warning"]
    assert lines[0].startswith("::error title=prefill 128%3A time::prefill 128: time +10.0 %25 [")
    both = github.annotation_lines(found, inconclusive_fails=True)
    assert [line.split(" ")[0] for line in both] == ["::error", "::error"]


def test_foreign_text_is_no_workflow_command(hostile: CheckReport) -> None:
    lines = github.annotation_lines(hostile)
    assert len(lines) == 3
    for line in lines:
        assert "\n" not in line
        head, title, message = re.fullmatch(r"::(\w+) title=([^:,]*)::(.*)", line).groups()  # type: ignore[union-attr]
        assert head in ("error", "warning")
        assert "%0A%3A%3Aerror" in title
        assert "100 %25" in message


def test_the_summary_is_a_table_that_foreign_text_does_not_break(
    found: CheckReport, hostile: CheckReport
) -> None:
    for one in (found, hostile):
        table = [line for line in github.summary(one).splitlines() if line.startswith("|")]
        assert len(table) == 2 + 4
        assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {7}
        read = MarkdownIt("commonmark").enable("table").parse(github.summary(one))
        assert [token.type for token in read].count("tr_open") == 1 + 4
    text = github.summary(hostile)
    assert "<b>" not in text
    assert "❌ regression" in text
    assert "**Regression: 1 regression, 1 can't tell, 1 improved, 1 within the limit.**" in text


def test_github_benchmark_has_a_file_for_each_direction(report: ComparisonReport) -> None:
    files = github_benchmark.render(checked(report))
    smaller, bigger = (json.loads(files[f"{name}.json"]) for name in ("smaller", "bigger"))
    for entries in (smaller, bigger):
        assert entries
        for entry in entries:
            assert {"name", "unit", "value"} <= set(entry) <= {
                "name", "unit", "value", "range", "extra",
            }  # fmt: skip
            assert isinstance(entry["value"], int | float)
    by_name = {entry["name"]: entry for entry in smaller}
    time = by_name["prefill, batch 1, length 128: latency"]
    assert (time["unit"], time["value"]) == ("ms", 88.0)
    assert time["range"] == "85.47 to 90.53"
    assert {"model: file-size", "accuracy: perplexity"} <= set(by_name)
    assert {entry["name"].split(": ")[1] for entry in bigger} == {"speedup", "top1-agreement"}


def test_bencher_has_values_with_bounds_in_its_own_units(report: ComparisonReport) -> None:
    data = json.loads(bencher.render(checked(report)))
    for measures in data.values():
        for metric in measures.values():
            assert {"value"} <= set(metric) <= {"value", "lower_value", "upper_value"}
            low, high = metric.get("lower_value"), metric.get("upper_value")
            assert low is None or low <= metric["value"] <= high
    shape = data["prefill, batch 1, length 128"]
    assert shape["latency"]["value"] == pytest.approx(88e6, rel=1e-12)
    assert shape["speedup"]["lower_value"] == report.latency[0].speedup.ci95[0]


def test_gitlab_s_metrics_are_openmetrics(report: ComparisonReport) -> None:
    lines = gitlab_metrics.render(checked(report)).splitlines()
    assert lines[-1] == "# EOF"
    seen: list[str] = []
    for line in lines[:-1]:
        if line.startswith("# TYPE "):
            name = line.split()[2]
            assert name not in seen  # the samples of a metric stand together
            seen.append(name)
            continue
        sample = re.fullmatch(r'([a-z_][a-z0-9_]*)\{of="((?:[^"\\]|\\.)*)"\} (\S+)', line)
        assert sample is not None, line
        assert sample[1] == seen[-1]
        assert math.isfinite(float(sample[3]))


def test_pytest_benchmark_s_statistics_are_those_of_the_samples(report: ComparisonReport) -> None:
    data = json.loads(pytest_benchmark.render(checked(report)))
    assert {"machine_info", "commit_info", "benchmarks", "datetime", "version"} == set(data)
    assert len(data["benchmarks"]) == 8
    one = data["benchmarks"][1]
    stats, times = one["stats"], report.latency[0].candidate.samples_ms
    assert one["name"] == "prefill, batch 1, length 128 [candidate]"
    assert stats["min"] == pytest.approx(min(times) / 1000, rel=1e-12)
    assert stats["mean"] == pytest.approx(sum(times) / len(times) / 1000, rel=1e-12)
    assert stats["ops"] == pytest.approx(1 / stats["mean"], rel=1e-12)
    assert stats["rounds"] == len(times)
    assert stats["ld15iqr"] >= stats["min"]


def test_pytest_benchmark_itself_compares_the_file(
    report: ComparisonReport, tmp_path: Path
) -> None:
    pytest.importorskip("pytest_benchmark")
    path = tmp_path / "benchmark.json"
    path.write_text(pytest_benchmark.render(checked(report)))
    call = [sys.executable, "-m", "pytest_benchmark", "compare", str(path)]
    done = subprocess.run(call, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "prefill, batch 1, length 128 [candidate]" in done.stdout


def test_a_collapsed_model_has_no_infinite_figure(report: ComparisonReport) -> None:
    collapsed = report.model_copy(update={"accuracy": gate_accuracy(math.inf)})
    assert all(math.isfinite(metric.value) for metric in metrics(collapsed))
    assert "Infinity" not in bencher.render(checked(collapsed))
    found = check(collapsed, Limits(max_perplexity_increase=0.1))
    assert conclusion(found) == "Regression: 1 regression."
    assert "inf" in check_grid(found).rows[0][3]
    Xml.fromstring(junit.render(Checked(found, gate_report())))


@pytest.mark.parametrize("each", FORMATS)
def test_every_registered_format_is_written_by_its_option(
    each: CiFormat, report: ComparisonReport, tmp_path: Path
) -> None:
    saved = report.write(tmp_path / "report.json")
    target = tmp_path / "ci"
    option = f"--{each.name.replace('_', '-')}"
    assert run(["check", str(saved), "--max-slowdown", "3%", option, str(target)]) in (0, 1, 3)
    assert target.is_dir() == each.is_folder
    files = [*target.iterdir()] if each.is_folder else [target]
    assert all(file.stat().st_size for file in files)


def test_a_report_without_accuracy_has_figures_of_the_rest() -> None:
    measures = {metric.measure for metric in metrics(gate_report(accuracy=None))}
    assert measures == {"latency", "speedup", "file-size", "kv-cache-per-token"}
