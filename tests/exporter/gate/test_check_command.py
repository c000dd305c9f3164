"""`depthcut check` on files: exit codes, what is kept, what is printed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import exporter.cli as command_line
from exporter.artifacts import CheckReport, LatencyRow
from exporter.errors import UsageError
from exporter.gate.gate import check
from exporter.gate.history import append, entry_of, read_baselines
from exporter.gate.keys import FIELDS
from exporter.gate.limits import Limits
from tests.made_reports import gate_report, gate_row
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


@dataclass
class Told:
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str


Run = Callable[..., Told]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Checks a report, or one of a row."""

    def call(what: Path | LatencyRow, *arguments: str | Path) -> Told:
        new = tmp_path / "report.json"
        report = what if isinstance(what, Path) else gate_report([what]).write(new)
        code = command_line.run(["check", str(report), *in_file(tmp_path, map(str, arguments))])
        return Told(code, *capsys.readouterr())

    return call


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
    run: Run, baseline: Path, row: LatencyRow, more: tuple[str, ...], code: int
) -> None:
    assert run(row, "--baseline", baseline, *TIME, *more).code == code


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
    run: Run, tmp_path: Path, arguments: tuple[str, ...], message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    told = run(SAME, *arguments)
    assert (told.code, told.out) == (2, "")
    assert message in told.err
    assert "Traceback" not in told.err


def test_every_field_of_the_key_may_be_allowed() -> None:
    (allow,) = [o for o in command_line.cli.get_command(None, "check").params if o.name == "allow"]
    assert allow.to_info_dict()["type"]["choices"] == FIELDS


def test_broken_reports_and_full_disks_are_no_regression(
    run: Run, tmp_path: Path, baseline: Path
) -> None:
    broken = tmp_path / "broken.json"
    for text in ("{", '{"schema_version": 99, "kind": "comparison_report"}', '{"kind": 1}'):
        broken.write_text(text)
        told = run(broken, "--baseline", baseline)
        assert told.code == 2
        assert str(broken) in told.err
    told = run(SAME, "--baseline", baseline, "--junit", tmp_path)
    assert told.code == 2
    assert "directory" in told.err


def test_another_machine_s_baseline_is_refused_until_it_is_accepted(
    run: Run, tmp_path: Path
) -> None:
    other = gate_report([gate_row()], machine="Another CPU").write(tmp_path / "other.json")
    told = run(SLOW, "--baseline", other)
    assert told.code == 2
    assert "device: Another CPU, 2 CPUs, x86_64 there, Test CPU, 2 CPUs, x86_64 here" in told.err
    assert "--allow device" in told.err
    told = run(SLOW, "--baseline", other, "--allow", "device")
    assert told.code == 1
    assert "Accepted difference. device" in told.out


@pytest.mark.parametrize("name", ["one.json", "many"])
def test_the_first_run_makes_the_baseline_and_the_next_is_held_against_it(
    run: Run, tmp_path: Path, name: str
) -> None:
    path = tmp_path / name
    first = run(SAME, "--baseline", path, "--update-baseline")
    assert first.code == 0
    assert "nothing was checked" in first.out
    assert run(SLOW, "--baseline", path).code == 1
    assert run(SLOW, "--baseline", path, "--update-baseline").code == 0
    assert run(SLOW, "--baseline", path).code == 0
    assert len(read_baselines(path)) == 1
    other = gate_report([gate_row()], machine="Another CPU").write(tmp_path / "other.json")
    assert run(other, "--baseline", path).code == 2
    # An unknown key joins the others of a folder, and takes a file's place.
    assert run(other, "--baseline", path, "--update-baseline").code == 0
    assert run(other, "--baseline", path).code == 0
    assert len(read_baselines(path)) == (2 if name == "many" else 1)
    if name != "many":
        path.write_text(path.read_text().replace('"schema_version": ', '"schema_version": 9'))
        assert run(other, "--baseline", path).code == 2
        assert run(other, "--baseline", path, "--update-baseline").code == 0
        assert run(other, "--baseline", path).code == 0


def test_what_is_read_is_never_written_over(run: Run, tmp_path: Path, baseline: Path) -> None:
    report = gate_report([SAME]).write(tmp_path / "report.json")
    before = report.read_bytes(), baseline.read_bytes()
    for more in (
        ("--baseline", baseline, "-o", baseline),
        ("--baseline", baseline, "--junit", report),
        ("--baseline", baseline, "--history", report),
        ("--baseline", report, "--update-baseline"),
    ):
        with ends_in(UsageError, "overwrites-input"):
            assert run(report, *more).code == 2
    assert (report.read_bytes(), baseline.read_bytes()) == before
    baseline.write_text("{")
    assert run(report, "--baseline", baseline, "--update-baseline").code == 2
    assert baseline.read_text() == "{"


def test_the_history_may_lie_beside_the_baselines(run: Run, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    calls = ("--baseline", kept, "--history", kept / "history.jsonl")
    assert run(SAME, *calls, "--update-baseline").code == 0
    assert run(SLOW, *calls).code == 1
    assert {path.suffix for path in kept.glob("[!.]*")} == {".json", ".jsonl"}


def test_json_is_the_whole_check_and_nothing_else(run: Run, tmp_path: Path, baseline: Path) -> None:
    output = tmp_path / "check.json"
    told = run(SLOW, "--baseline", baseline, "--json", "--github", "-o", output)
    assert told.code == 1
    result = CheckReport.model_validate_json(told.out)
    assert result == CheckReport.read(output)
    assert result.verdict == "regressed"
    assert "::error" in told.err


def test_drift_is_told_and_does_not_fail(run: Run, tmp_path: Path) -> None:
    """Half a percent a week, each week the baseline of the next."""
    history = tmp_path / "history.jsonl"
    weeks = [gate_report([gate_row(candidate_ms=80 * 1.005**week)]) for week in range(12)]
    for report in weeks[:-1]:
        append(history, entry_of(report, check(report, Limits(max_kl=1)), commit="c"))
    baseline = weeks[-2].write(tmp_path / "baseline.json")
    calls = ("--baseline", baseline, "--history", history, *TIME, "--commit", "c11", "--github")
    told = run(weeks[-1].latency[0], *calls)
    assert told.code == 0
    assert "Drift. prefill, batch 1, length 128: over 12 runs, from c (" in told.out
    assert "::warning title=prefill%2C batch 1%2C length 128%3A drift::" in told.out
    assert json.loads(history.read_text().splitlines()[-1])["commit"] == "c11"


def test_on_github_the_step_has_annotations_and_a_summary(
    run: Run, tmp_path: Path, baseline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = tmp_path / "summary.md"
    summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    told = run(SLOW, "--baseline", baseline, *TIME)
    assert told.code == 1
    assert "::error title=prefill 128%3A time::" in told.out
    assert summary.read_text().startswith("before\n## depthcut check")
    told = run(SLOW, "--baseline", baseline, *TIME, "--no-github")
    assert told.code == 1
    assert "::error" not in told.out
