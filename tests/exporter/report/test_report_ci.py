"""What CI systems read, held against what each format says of itself."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as Xml

import pytest
from markdown_it import MarkdownIt

from exporter.artifacts import CheckReport, ComparisonReport
from exporter.cli import run
from exporter.gate.gate import BaselineMatch, check
from exporter.gate.limits import Limits
from exporter.report.ci import (
    annotation_lines,
    check_grid,
    conclusion,
    github_benchmark,
    junit,
    summary,
)
from tests.made_reports import gate_accuracy, gate_report, gate_row, samples
from tests.present import present

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


def spread(median_ms: float) -> Any:
    values = [median_ms * (1 + 0.005 * (n - 11.5)) for n in range(24)]
    return samples(median_ms).model_copy(update={"samples_ms": values})


@pytest.fixture
def found(report: ComparisonReport) -> CheckReport:
    old = gate_report([gate_row(n) for n in LENGTHS])
    return check(report, Limits(max_slowdown=0.03), baseline=BaselineMatch(old))


def test_a_speedup_is_told_as_a_factor_with_its_limit(report: ComparisonReport) -> None:
    first, *_ = check_grid(check(report, Limits(min_speedup=1.1))).rows
    assert (str(first[3]).partition(" [")[0], first[4]) == ("1.136x", "at least 1.100x")


def test_each_verdict_has_its_place_in_junit(found: CheckReport) -> None:
    root = Xml.fromstring(junit(found))
    (suite,) = root
    assert (root.tag, suite.tag) == ("testsuites", "testsuite")
    for element in (root, suite):
        counts = [element.get(name) for name in ("tests", "failures", "errors")]
        assert counts == ["4", "1", "0"]
    cases = {case.get("name"): case for case in suite.iter("testcase")}
    assert {name: [child.tag for child in case] for name, case in cases.items()} == {
        "prefill 128: time": ["failure", "system-out"],
        "prefill 256: time": ["skipped", "system-out"],
        "prefill 512: time": ["system-out"],
        "prefill 1024: time": ["system-out"],
    }
    slow = cases["prefill 128: time"]
    assert "+10.0 %" in present(slow.find("failure")).get("message", "")
    assert slow.get("time") == "0.088000"
    # Not knowing fails in JUnit where it fails in the shell.
    (suite,) = Xml.fromstring(junit(found, inconclusive_fails=True))
    assert (suite.get("failures"), suite.get("skipped")) == ("2", "0")
    assert len(list(suite.iter("failure"))) == 2


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
    for element in Xml.fromstring(junit(found)).iter():
        attributes, children = allowed[element.tag]
        assert set(element.attrib) <= attributes
        assert {child.tag for child in element} <= children


def test_annotations_are_errors_and_warnings_and_the_summary_a_table(found: CheckReport) -> None:
    lines = annotation_lines(found)
    assert [line.split(" ")[0] for line in lines] == ["::error", "::warning"]
    assert lines[0].startswith("::error title=prefill 128%3A time::prefill 128: time +10.0 %25 [")
    both = annotation_lines(found, inconclusive_fails=True)
    assert [line.split(" ")[0] for line in both] == ["::error", "::error"]
    text = summary(found)
    read = MarkdownIt("commonmark").enable("table").parse(text)
    assert [token.type for token in read].count("tr_open") == 1 + 4
    assert "❌ regression" in text
    assert "**Regression: 1 regression, 1 can't tell, 1 improved, 1 within the limit.**" in text


def test_github_benchmark_has_a_file_for_each_direction(report: ComparisonReport) -> None:
    files = github_benchmark(report)
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


def test_what_has_collapsed_or_was_not_measured_is_no_figure(report: ComparisonReport) -> None:
    collapsed = report.model_copy(update={"accuracy": gate_accuracy(math.inf)})
    assert all("Infinity" not in text for text in github_benchmark(collapsed).values())
    result = check(collapsed, Limits(max_perplexity_increase=0.1))
    assert conclusion(result) == "Regression: 1 regression."
    assert "inf" in check_grid(result).rows[0][3]
    Xml.fromstring(junit(result))
    texts = github_benchmark(gate_report(accuracy=None)).values()
    measures = {entry["name"].split(": ")[1] for text in texts for entry in json.loads(text)}
    assert measures == {"latency", "speedup", "file-size", "kv-cache-per-token", "nodes"}


@pytest.mark.parametrize("name", ["junit", "github-benchmark", "comment"])
def test_every_format_is_written_by_its_option(
    name: str, report: ComparisonReport, tmp_path: Path
) -> None:
    saved, target = report.write(tmp_path / "report.json"), tmp_path / "ci"
    assert run(["check", str(saved), "--max-slowdown", "3%", f"--{name}", str(target)]) in (0, 3)
    files = [*target.iterdir()] if target.is_dir() else [target]
    assert files
    assert all(file.stat().st_size for file in files)


@pytest.mark.parametrize(
    ("option", "instead"),
    [
        ("bencher", "--github-benchmark"),
        ("pytest-benchmark", "--github-benchmark"),
        ("gitlab-metrics", "--junit"),
        ("page", "--comment"),
    ],
)
@pytest.mark.parametrize("in_file", [False, True])
def test_a_removed_option_names_what_takes_its_place(
    option: str, instead: str, in_file: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"--{option}", "x"]
    if in_file:
        (tmp_path / "c.yaml").write_text(f"{option.replace('-', '_')}: x\n")
        given = ["--config", str(tmp_path / "c.yaml")]
    report = gate_report().write(tmp_path / "report.json")
    assert run(["check", str(report), *given]) == 2
    assert instead in capsys.readouterr().err
