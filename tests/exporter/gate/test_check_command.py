"""`depthcut check` on files: exit codes, what is kept, what is printed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import exporter.cli as command_line
from exporter.artifacts import (
    CheckReport,
)
from exporter.errors import UsageError
from exporter.gate.gate import BaselineMatch, check
from exporter.gate.history import append, entry_of, read_baselines
from exporter.gate.keys import FIELDS
from exporter.gate.limits import Limits
from exporter.report.ci import model_lines
from tests.made_reports import arms_of, gate_report, gate_row
from tests.raising import ends_in
from tests.reading import in_file

TIME = ("--max-slowdown", "3%")
SLOW, UNSURE = gate_row(candidate_ms=88.0), gate_row(candidate_ms=83.0, width=0.05)
FAST, SAME = gate_row(candidate_ms=60.0), gate_row(candidate_ms=80.2)


@pytest.fixture
def baseline(tmp_path: Path) -> Path:
    return gate_report([gate_row()]).write(tmp_path / "baseline.json")


@pytest.fixture(autouse=True)
def not_on_github(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY", "GITHUB_SHA", "CI_COMMIT_SHA"):
        monkeypatch.delenv(name, raising=False)


def run(tmp_path: Path, row: Any, *arguments: str | Path) -> int:
    report = gate_report([row]).write(tmp_path / "report.json")
    words = in_file(tmp_path, map(str, arguments))
    return command_line.run(["check", str(report), *words])


@pytest.mark.parametrize(
    ("row", "more", "code"),
    [
        (SAME, (), 0),
        (FAST, (), 0),
        (SLOW, (), 1),
        (UNSURE, (), 3),
        (UNSURE, ("--inconclusive", "pass"), 0),
        (UNSURE, ("--inconclusive", "fail"), 1),
        (SLOW, ("--inconclusive", "pass"), 1),
        (SLOW, ("--max-slowdown", "20%"), 0),
        (SLOW, ("noise_floor: 20%",), 3),
        (SLOW, ("--update-baseline",), 0),
    ],
)
def test_the_exit_code_is_the_verdict(
    tmp_path: Path, baseline: Path, row: Any, more: tuple[str, ...], code: int
) -> None:
    assert run(tmp_path, row, "--baseline", baseline, *TIME, *more) == code


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing to check"),
        (("--baseline", "nowhere.json"), "there is no baseline"),
        (("--max-slowdown", "fast"), "--max-slowdown"),
        (("--min-top1-agreement", "95"), "--min-top1-agreement"),
        (("--max-slowdown", "3"), "--max-slowdown"),
        (("--min-top1-agreement", "105%"), "--min-top1-agreement"),
        (("--allow", "colour"), "colour"),
        (("--allow", "device", "--max-kl", "1"), "--baseline"),
        (("--update-baseline", "--max-kl", "1"), "--baseline"),
    ],
)
def test_everything_else_is_2(
    tmp_path: Path,
    arguments: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(tmp_path, SAME, *arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert "Traceback" not in printed.err
    assert printed.out == ""


def test_every_field_of_the_key_may_be_allowed() -> None:
    (allow,) = [o for o in command_line.cli.get_command(None, "check").params if o.name == "allow"]
    assert allow.to_info_dict()["type"]["choices"] == FIELDS


def test_broken_reports_and_full_disks_are_no_regression(
    tmp_path: Path, baseline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.json"
    for text in ("{", '{"schema_version": 99, "kind": "comparison_report"}', '{"kind": 1}'):
        broken.write_text(text)
        assert command_line.run(["check", str(broken), "--baseline", str(baseline)]) == 2
        assert str(broken) in capsys.readouterr().err
    folder = tmp_path / "folder"
    folder.mkdir()
    assert run(tmp_path, SAME, "--baseline", baseline, "--junit", folder) == 2
    assert "directory" in capsys.readouterr().err


def test_another_machine_s_baseline_is_refused_until_it_is_accepted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = gate_report([gate_row()], machine="Another CPU").write(tmp_path / "other.json")
    assert run(tmp_path, SLOW, "--baseline", other) == 2
    printed = capsys.readouterr().err
    assert "device: Another CPU, 2 CPUs, x86_64 there, Test CPU, 2 CPUs, x86_64 here" in printed
    assert "--allow device" in printed
    assert run(tmp_path, SLOW, "--baseline", other, "--allow", "device") == 1
    assert "Accepted difference. device" in capsys.readouterr().out


def test_the_first_run_makes_the_baseline_and_the_next_is_held_against_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (tmp_path / "one.json", tmp_path / "many"):
        assert run(tmp_path, SAME, "--baseline", path, "--update-baseline") == 0
        assert "nothing was checked" in capsys.readouterr().out
        assert run(tmp_path, SLOW, "--baseline", path) == 1
        assert run(tmp_path, SLOW, "--baseline", path, "--update-baseline") == 0
        assert run(tmp_path, SLOW, "--baseline", path) == 0
        assert len(read_baselines(path)) == 1


def test_an_unknown_key_joins_the_others(tmp_path: Path, baseline: Path) -> None:
    other = gate_report([gate_row()], machine="Another CPU").write(tmp_path / "other.json")
    call = ["check", str(other), "--baseline", str(baseline)]
    assert command_line.run(call) == 2
    assert command_line.run([*call, "--update-baseline"]) == 0
    assert command_line.run(call) == 0
    assert len(read_baselines(baseline)) == 2


def test_a_broken_baseline_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_text("{")
    assert run(tmp_path, SAME, "--baseline", path, "--update-baseline") == 2
    assert path.read_text() == "{"


def test_what_is_read_is_never_written_over(tmp_path: Path, baseline: Path) -> None:
    report = gate_report([SAME]).write(tmp_path / "report.json")
    before = report.read_bytes(), baseline.read_bytes()
    for more in (
        ("--baseline", baseline, "-o", baseline),
        ("--baseline", baseline, "--junit", report),
        ("--baseline", baseline, "--history", report),
        ("--baseline", report, "--update-baseline"),
    ):
        with ends_in(UsageError, "overwrites-input"):
            assert command_line.run(["check", str(report), *map(str, more)]) == 2
    assert (report.read_bytes(), baseline.read_bytes()) == before


def test_the_history_may_lie_beside_the_baselines(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    calls = ("--baseline", kept, "--history", kept / "history.jsonl")
    assert run(tmp_path, SAME, *calls, "--update-baseline") == 0
    assert run(tmp_path, SLOW, *calls) == 1
    assert {path.suffix for path in kept.glob("[!.]*")} == {".json", ".jsonl"}


def test_the_table_says_what_and_why(
    tmp_path: Path, baseline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, SLOW, "--baseline", baseline, *TIME)
    out = capsys.readouterr().out
    assert "prefill 128: time" in out
    assert "+10.0 %" in out
    assert "at most +3.0 %" in out
    assert "Regression: 1 regression." in out
    assert "relative to the unpruned arm" in out


def test_the_judged_models_are_named(
    tmp_path: Path, baseline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = tmp_path / "summary.md"
    run(tmp_path, SAME, "--baseline", baseline, *TIME, "--comment", summary)
    result = (capsys.readouterr().out, summary.read_text())
    assert all(f"{name}/model.onnx" in text for text in result for name in ("base", "cand"))
    assert all("earlier report:" in text for text in result)

    run(tmp_path, SAME, *TIME)
    alone = capsys.readouterr().out
    assert "cand/model.onnx" in alone
    assert "earlier report:" not in alone


def test_the_earlier_report_s_candidate_is_told_apart() -> None:
    old = gate_report(arms=arms_of("then"))
    result = check(gate_report(), Limits(max_slowdown=0.03), baseline=BaselineMatch(old))
    assert result.models is not None
    assert result.models.candidate == "cand/model.onnx"
    assert result.models.earlier == "then/model.onnx"
    older = CheckReport.model_validate(result.model_dump(exclude={"models"}))
    assert model_lines(older) == []


def test_sizes_are_told_so_that_the_table_fits(
    tmp_path: Path, baseline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, SAME, "--baseline", baseline)
    out = capsys.readouterr().out
    assert re.search(r"^files: size +1\.0 MB +1\.0 MB ", out, re.MULTILINE)
    assert re.search(r"^KV cache per token: memory +4,096 B ", out, re.MULTILINE)
    table = out.split("\n\n")[1].splitlines()
    assert max(map(len, table)) <= 100


def test_json_is_the_whole_check_and_nothing_else(
    tmp_path: Path, baseline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "check.json"
    assert run(tmp_path, SLOW, "--baseline", baseline, "--json", "--github", "-o", output) == 1
    printed = capsys.readouterr()
    result = CheckReport.model_validate_json(printed.out)
    assert result == CheckReport.read(output)
    assert result.verdict == "regressed"
    assert "::error" in printed.err


def test_drift_is_told_and_does_not_fail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half a percent a week, each week the baseline of the next."""
    history = tmp_path / "history.jsonl"
    weeks = [gate_report([gate_row(candidate_ms=80 * 1.005**week)]) for week in range(12)]
    for report in weeks[:-1]:
        append(history, entry_of(report, check(report, Limits(max_kl=1)), commit="c"))
    baseline = weeks[-2].write(tmp_path / "baseline.json")
    calls = ("--baseline", baseline, "--history", history, *TIME, "--commit", "c11", "--github")
    assert run(tmp_path, weeks[-1].latency[0], *calls) == 0
    out = capsys.readouterr().out
    assert "Drift. prefill, batch 1, length 128: over 12 runs, from c (" in out
    assert "::warning title=prefill%2C batch 1%2C length 128%3A drift::" in out
    assert json.loads(history.read_text().splitlines()[-1])["commit"] == "c11"


def test_on_github_the_step_has_annotations_and_a_summary(
    tmp_path: Path,
    baseline: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    summary = tmp_path / "summary.md"
    summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    assert run(tmp_path, SLOW, "--baseline", baseline, *TIME) == 1
    assert "::error title=prefill 128%3A time::" in capsys.readouterr().out
    assert summary.read_text().startswith("before\n## depthcut check")
    assert run(tmp_path, SLOW, "--baseline", baseline, *TIME, "--no-github") == 1
    assert "::error" not in capsys.readouterr().out
