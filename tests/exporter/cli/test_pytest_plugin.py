"""The fixture ``depthcut`` in a team's own test suite."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as Xml

import pytest

from exporter.artifacts import ComparisonReport, Interval, TaskResult
from exporter.gate.gate import check
from exporter.gate.limits import Limits
from tests.made_reports import gate_accuracy, gate_report, gate_row, narrow

pytest_plugins = ["pytester"]

SLOW, UNSURE = gate_row(candidate_ms=110.0), gate_row(candidate_ms=99.0, width=0.05)
_INSTALLED = any(point.value == "depthcut_pytest" for point in entry_points(group="pytest11"))


@pytest.fixture(scope="module", autouse=True)
def loaded() -> None:
    """What the inner runs import must be there before: each of them forgets what it has loaded."""
    importlib.import_module("exporter.compare.session")
    check(gate_report(), Limits(max_kl=1, max_slowdown=1))


_LEAN = [
    word for name in ("xdist", "cacheprovider", "hypothesispytest") for word in ("-p", f"no:{name}")
]


class Inner:
    """Runs tests that somebody else might have written."""

    def __init__(self, pytester: pytest.Pytester) -> None:
        self.pytester = pytester

    @property
    def path(self) -> Path:
        return self.pytester.path

    def run(self, body: str, *arguments: str) -> pytest.RunResult:
        lines = "\n".join(f"    {line}" for line in body.splitlines())
        self.pytester.makepyfile(f"def test_gate(depthcut, request):\n{lines}\n")
        plugin = () if _INSTALLED else ("-p", "depthcut_pytest")
        return self.pytester.runpytest_inprocess(*plugin, *_LEAN, "-W", "default", *arguments)

    def report(self, *rows: Any, **changes: Any) -> ComparisonReport:
        report = gate_report(rows, **changes)
        report.write(self.path / "report.json")
        return report


@pytest.fixture
def inner(pytester: pytest.Pytester) -> Inner:
    return Inner(pytester)


def task(name: str) -> TaskResult:
    """Three points are lost of it."""
    lost = Interval(value=-0.03, ci95=(-0.032, -0.028))
    return TaskResult(
        task=name, metric="acc", items=900, baseline=0.6, candidate=0.57, difference=lost
    )


@pytest.mark.parametrize(
    ("limits", "told"),
    [
        (
            'max_slowdown="3%", min_speedup=1.2, max_perplexity_increase="30%", max_kl=0.3, '
            'min_top1_agreement="75%", max_size_increase="0%", max_memory_increase="0%", '
            'max_task_drop="5%", min_embedding_cosine=0.9, min_rank_agreement=0.8', "",
        ),
        ('max_slowdown="3%"', "*prefill 128: time +10.0 % *regression*"),
        ("min_speedup=1.2", "*prefill 128: speedup 0.909x *at least 1.200x: regression*"),
        ('max_perplexity_increase="10%"', "*perplexity +25.0 %*regression*"),
        ("max_kl=0.1", "*KL divergence 0.2*regression*"),
        ('min_top1_agreement="90%"', "*same top-1 token 80.0 %*regression*"),
        ('max_task_drop="1%"', "*arc*regression*"),
        ("max_task_drop=5", "*5*"),  # points are shares: 5 isn't 5 %
        ("min_embedding_cosine=0.99", "*0.95*regression*"),
        ("min_rank_agreement=0.99", "*0.9*regression*"),
        ("max_guilt=1", "*max_guilt*"),
    ],
)  # fmt: skip
def test_what_holds_passes_and_what_doesn_t_fails_with_the_numbers(
    inner: Inner, limits: str, told: str
) -> None:
    near = {"embedding_cosine": 0.95, "lowest_cosine": 0.9, "rank_agreement": 0.9}
    accuracy = gate_accuracy(tasks=[task("arc")], figures=near)
    accuracy.intervals.update({key: narrow(value) for key, value in near.items()})
    inner.report(SLOW if told else gate_row(), accuracy=accuracy)
    result = inner.run(f'depthcut.report("report.json").assert_limits({limits})')
    result.assert_outcomes(**{"failed" if told else "passed": 1})
    if told:
        result.stdout.fnmatch_lines([told])
        result.stdout.no_fnmatch_line("*Traceback*")


@pytest.mark.parametrize(
    ("arguments", "ini", "outcome"),
    [
        ((), "", {"failed": 1}),
        (("--depthcut-inconclusive=skip",), "", {"skipped": 1}),
        (("--depthcut-inconclusive=warn",), "", {"passed": 1, "warnings": 1}),
        ((), "depthcut_inconclusive = skip", {"skipped": 1}),
        (("--depthcut-inconclusive=fail",), "depthcut_inconclusive = skip", {"failed": 1}),
    ],
)
def test_not_knowing_is_what_the_suite_says(
    inner: Inner, arguments: tuple[str, ...], ini: str, outcome: dict[str, int]
) -> None:
    inner.pytester.makeini(f"[pytest]\n{ini}\n")
    inner.report(UNSURE)
    body = 'depthcut.report("report.json").assert_limits(max_slowdown="3%")'
    inner.run(body, *arguments).assert_outcomes(**outcome)


ACTIVE = "x\x1b[31m\u202e\n::error::no ##vso[task.x]"


@pytest.mark.parametrize("broken", [False, True])
def test_what_a_report_or_a_model_says_is_no_command_to_the_log(inner: Inner, broken: bool) -> None:
    report = inner.report(gate_row(), accuracy=gate_accuracy(tasks=[task(ACTIVE)]))
    if broken:
        data = {**json.loads(report.to_json()), ACTIVE: 1}
        (inner.path / "report.json").write_text(json.dumps(data))
    body = 'depthcut.report("report.json").assert_limits(max_task_drop="1%")'
    result = inner.run(body, "--junitxml=out.xml")
    result.assert_outcomes(failed=1)
    outcome = result.stdout.str() + (inner.path / "out.xml").read_text()
    assert "error" in outcome
    outcome += inner.run(f"depthcut.compare({ACTIVE!a}, 'b')", "--tb=line").stdout.str()
    assert "task.x" in outcome
    for active in ("\x1b[31m", "\u202e", "\n::error", "##vso["):
        assert active not in outcome


def test_an_earlier_report_can_be_the_measure(inner: Inner) -> None:
    gate_report([gate_row()]).write(inner.path / "baseline.json")
    inner.report(gate_row(candidate_ms=88.0))
    report = 'depthcut.report("report.json").against("baseline.json")'
    body = report + '.assert_limits(max_slowdown="{}")'
    inner.run(body.format("3%")).assert_outcomes(failed=1)
    inner.run(body.format("20%")).assert_outcomes(passed=1)
    gate_report([gate_row()], machine="Another CPU").write(inner.path / "baseline.json")
    result = inner.run(body.format("20%"))
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*RegressionError*device: Another CPU*"])


def test_results_are_properties_in_junit_and_strict_settings_do_not_mind(inner: Inner) -> None:
    inner.pytester.makeini("[pytest]\naddopts = --strict-config --strict-markers\n")
    inner.report(gate_row())
    inner.run('depthcut.report("report.json").assert_limits(min_speedup=1.1)', "--junitxml=out.xml")
    properties = {
        p.get("name"): p.get("value") for p in Xml.parse(inner.path / "out.xml").iter("property")
    }
    result = properties["depthcut prefill 128: speedup"]
    assert result is not None
    assert result.startswith("1.250x [")
    assert result.endswith(": within the limit")


@pytest.mark.parametrize("ini", ["depthcut_inconclusive = maybe", "depthcut_time_budget = long"])
def test_settings_that_make_no_sense_are_told(inner: Inner, ini: str) -> None:
    inner.pytester.makeini(f"[pytest]\n{ini}\n")
    inner.report(gate_row())
    result = inner.run('depthcut.report("report.json").assert_limits(max_kl=1)')
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*depthcut*"])


@pytest.fixture
def models(inner: Inner) -> Inner:
    """Measuring takes no time and gives what ``report.json`` holds."""
    inner.pytester.makeconftest(
        """
        import pytest
        import exporter.compare.session
        from pathlib import Path
        from exporter.artifacts import ComparisonReport

        @pytest.fixture
        def count(monkeypatch):
            calls = []
            def counting(*arms_and_options):
                calls.append(arms_and_options)
                return ComparisonReport.read(Path("report.json"))
            monkeypatch.setattr(exporter.compare.session, "compare", counting)
            return calls
        """
    )
    return inner


def test_models_are_measured_once_for_equal_arguments(models: Inner) -> None:
    models.report(gate_row())
    body = """
count = request.getfixturevalue("count")
comparison = depthcut.compare("base", "cand", threads=1, prefill=(8,))
comparison.assert_limits(min_speedup=1.2, max_kl=50)
assert depthcut.compare("base", "cand", threads=1, prefill=(8,)).report is comparison.report
(first, second, options), = count
assert (first, second, options.threads, options.prefill_lengths) == ("base", "cand", 1, (8,))
depthcut.compare("base", "cand", threads=2)
assert len(count) == 2
"""
    models.run(body).assert_outcomes(passed=1)


def test_workers_beside_it_and_unknown_options_are_told(models: Inner) -> None:
    models.report(gate_row())
    body = """
request.getfixturevalue("count")
request.config.workerinput = {"workercount": 2}
depthcut.compare("base", "cand").assert_limits(max_kl=1)
"""
    result = models.run(body)
    result.assert_outcomes(passed=1, warnings=1)
    result.stdout.fnmatch_lines(["*2 workers of pytest-xdist*"])
    result = models.run('depthcut.compare("base", "cand", colour=1)')
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*colour*"])


def test_a_suite_that_doesn_t_use_it_pays_nothing() -> None:
    """Loaded beside pytest, it brings no module but its own."""
    code = (
        "import sys, pytest; before = set(sys.modules); import depthcut_pytest;"
        "print('NEW', sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "NEW ['depthcut_pytest']" in done.stdout
