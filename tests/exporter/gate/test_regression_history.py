"""The history and what it tells: slow drift, and how sessions differ by themselves."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from exporter.artifacts import Arms, HistoryEntry, HistoryRow
from exporter.errors import ArtifactError, UsageError
from exporter.gate.gate import BaselineMatch, History, check
from exporter.gate.history import (
    append,
    drifts,
    entry_of,
    read_history,
    read_history_file,
    session_spreads,
)
from exporter.gate.keys import key_of, series
from exporter.gate.limits import Limits
from exporter.gate.request import CheckRequest, run_check
from exporter.report.ci import comment
from tests.made_reports import arms_of, gate_arm, gate_report, gate_row
from tests.raising import raises

SERIES = "s" * 64
WEEKS = 20
NOISE = 0.01


def history(slowdowns: np.ndarray, *, candidate: str = "c") -> list[HistoryEntry]:
    """Runs with these logarithms of relative time, one column a shape."""
    return [
        HistoryEntry(
            schema_version=1,
            time=f"2026-01-{week + 1:02}T00:00:00+00:00",
            commit=f"{week:040x}",
            series=SERIES,
            candidate_sha256=candidate * 64,
            verdict="within_limit",
            rows=[
                HistoryRow(subject=f"shape {n}", speedup=math.exp(-value), ci95=(0.99, 1.01))
                for n, value in enumerate(row)
            ],
        )
        for week, row in enumerate(np.atleast_2d(slowdowns.T).T)
    ]


def noise(seed: int, *, runs: int = WEEKS, shapes: int = 1, kept: float = 0.0) -> np.ndarray:
    """Noise of 1 %, of which a share ``kept`` carries over to the next run."""
    rng = np.random.default_rng(seed)
    fresh = rng.normal(0, NOISE, (runs, shapes))
    for run in range(1, runs):
        fresh[run] = kept * fresh[run - 1] + math.sqrt(1 - kept**2) * fresh[run]
    return fresh


def test_half_a_percent_a_week_is_told_though_no_step_fails() -> None:
    drift = 0.005 * np.arange(WEEKS)[:, None]
    result = 0
    for seed in range(40):
        values = noise(seed) + drift
        outcome = drifts(history(values), SERIES)
        result += bool(outcome)
        for one in outcome:
            assert one.per_entry == pytest.approx(0.005, abs=0.003)
            assert one.entries == WEEKS
            assert one.first.startswith("0000")
    assert result == 40
    limits = Limits(max_slowdown=0.03)
    for week in range(1, WEEKS):  # without noise: each step by itself
        old, new = (
            gate_report([gate_row(candidate_ms=80 * math.exp(0.005 * w))]) for w in (week - 1, week)
        )
        assert check(new, limits, baseline=BaselineMatch(old)).verdict == "within_limit"


@pytest.mark.parametrize(
    ("kept", "least", "most"),
    [
        (0.0, 0.0, 4),  # the test alone: 8 of 1000 were counted
        (0.0, 0.03, 0),  # with the demanded size: 0 of 1000
        (0.5, 0.03, 3),  # neighbours resemble one another: 9 of 1000
    ],
)
def test_noise_alone_is_hardly_ever_called_drift(kept: float, least: float, most: int) -> None:
    """100 histories of three shapes each."""
    total = sum(
        bool(drifts(history(noise(seed, shapes=3, kept=kept)), SERIES, least=least))
        for seed in range(100)
    )
    assert total <= most


def test_getting_faster_is_no_drift_and_a_small_one_is_not_told() -> None:
    weeks = np.arange(WEEKS)[:, None]
    assert drifts(history(-0.005 * weeks), SERIES) == []
    assert drifts(history(0.001 * weeks), SERIES) == []
    assert len(drifts(history(0.001 * weeks), SERIES, least=0.01)) == 1


def test_few_runs_another_series_and_old_runs_say_nothing() -> None:
    steep = history(0.02 * np.arange(WEEKS)[:, None])
    assert drifts(steep[:7], SERIES) == []
    assert drifts(steep, "other") == []
    level = history(np.zeros((30, 1)))
    assert drifts([*steep, *level], SERIES) == []


def test_only_the_shape_that_drifts_is_named() -> None:
    values = np.stack([0.005 * np.arange(WEEKS), np.zeros(WEEKS)], axis=1)
    assert [one.subject for one in drifts(history(values), SERIES)] == ["shape 0"]


def test_sessions_of_one_candidate_tell_how_sessions_differ() -> None:
    entries = history(noise(1, runs=30))
    (spread,) = session_spreads(entries, SERIES, "c" * 64).values()
    deviation = noise(1, runs=30).std(ddof=1)
    assert spread == pytest.approx(math.expm1(2.045 * math.sqrt(2) * deviation), rel=1e-3)
    assert session_spreads(entries[:3], SERIES, "c" * 64) == {}
    assert session_spreads(entries, SERIES, "d" * 64) == {}


def test_what_sessions_differ_by_is_no_regression() -> None:
    old, new = gate_report([gate_row()]), gate_report([gate_row(candidate_ms=84.8)])
    limits, baseline = Limits(max_slowdown=0.03), BaselineMatch(old)
    assert check(new, limits, baseline=baseline).verdict == "regressed"
    past = History(spreads={new.latency[0].shape_name: 0.08})
    assert check(new, limits, baseline=baseline, history=past).verdict == "inconclusive"


def test_a_run_is_a_line_and_comes_back(tmp_path: Path) -> None:
    report, path = gate_report(), tmp_path / "deep" / "history.jsonl"
    result = check(report, Limits(max_kl=1))
    now = datetime(2026, 5, 1, tzinfo=UTC)
    entries = [entry_of(report, result, commit=c, now=now) for c in ("a" * 40, None)]
    for entry in entries:
        append(path, entry)
    assert read_history(path) == entries
    assert entries[0].time == "2026-05-01T00:00:00+00:00"
    assert path.read_text().count("\n") == 2
    assert read_history(tmp_path / "none.jsonl") == []


def test_lines_of_before_the_words_changed_are_read_and_no_others(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    entry = history(np.zeros((1, 1)))[0]
    old = entry.model_dump_json()
    path.write_text(old.replace("within_limit", "unchanged") + "\n")
    assert read_history(path) == [entry]
    path.write_text(old.replace("within_limit", "better") + "\n")
    with pytest.raises(ArtifactError):
        read_history(path)


def test_a_last_line_without_its_end_is_not_joined(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    entry = history(np.zeros((1, 1)))[0]
    path.write_text(entry.model_dump_json())
    append(path, entry)
    assert read_history(path) == [entry, entry]


@pytest.mark.parametrize(
    ("line", "code", "field"),
    [
        ("{]", "broken-line", "$: "),
        ('{"schema_version": 1}', "broken-line", "$.time: "),
        ("SELF-99", "newer-schema", 99),
        ('{"schema_version": 99, "kept_in_2030": 1}', "newer-schema", 99),
        ("\udcff{}", "not-utf-8", "0xff"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, code: str, field: object) -> None:
    path = tmp_path / "history.jsonl"
    good = history(np.zeros((1, 1)))[0].model_dump_json()
    if line == "SELF-99":
        line = good.replace('"schema_version":1', '"schema_version":99')
    path.write_text(f"{good}\n{line}\n{good}\n", errors="surrogateescape")
    before = path.read_bytes()
    report = gate_report().write(tmp_path / "report.json")
    request = CheckRequest(report=report, limits=Limits(max_kl=1), history=path)
    with raises(ArtifactError, code, "history.jsonl", "line 2", field):
        run_check(request)
    assert path.read_bytes() == before


def test_updates_and_new_shapes_continue_a_series_and_another_machine_does_not() -> None:
    mine = series(key_of(gate_report()))
    assert series(key_of(gate_report([gate_row()], versions={"onnxruntime": "2.0"}))) == mine
    assert series(key_of(gate_report(machine="Another CPU"))) != mine


def test_checking_a_report_twice_is_one_run(tmp_path: Path) -> None:
    path, report = tmp_path / "history.jsonl", gate_report().write(tmp_path / "report.json")
    for _ in range(2):
        run_check(CheckRequest(report=report, limits=Limits(max_kl=1), history=path))
    assert len(read_history(path)) == 1
    other = gate_report([gate_row(candidate_ms=81)]).write(tmp_path / "other.json")
    run_check(CheckRequest(report=other, limits=Limits(max_kl=1), history=path))
    assert len(read_history(path)) == 2


@pytest.mark.parametrize(("limit", "told"), [(0.0, 1), (0.03, 0)])
def test_a_limit_of_no_slowdown_is_one_for_drift_too(
    tmp_path: Path, limit: float, told: int
) -> None:
    path = tmp_path / "history.jsonl"
    for number in range(12):
        row = gate_row(candidate_ms=80 + number / 10)
        report = gate_report([row]).write(tmp_path / "report.json")
        request = CheckRequest(report=report, limits=Limits(max_slowdown=limit), history=path)
        drift = run_check(request)[0].drift
    assert len(drift) == told


def test_a_history_that_is_a_link_is_not_written(tmp_path: Path) -> None:
    kept, secret = tmp_path / "kept", tmp_path / "secret.txt"
    kept.mkdir()
    secret.write_text("")
    path = kept / "history.jsonl"
    path.symlink_to(secret)
    report = gate_report().write(tmp_path / "report.json")
    with raises(UsageError, "linked-output", path):
        run_check(CheckRequest(report, limits=Limits(max_kl=9), history=path))
    with raises(UsageError, "linked-output"):
        append(path, history(np.zeros(1))[0])
    assert secret.read_text() == ""


@pytest.mark.parametrize("end", [b"", "é".encode()[:1]], ids=["between", "inside-a-character"])
def test_a_line_that_is_cut_off_is_told_and_stays(tmp_path: Path, end: bytes) -> None:
    path, (first, second) = tmp_path / "history.jsonl", history(noise(0, runs=2))
    append(path, first)
    half = second.model_dump_json()[:50].encode() + end
    with path.open("ab") as file:
        file.write(half)
    assert read_history_file(path).cut_off == [2]
    append(path, second)
    assert read_history(path) == [first, second]
    assert half in path.read_bytes()
    report = gate_report().write(tmp_path / "report.json")
    notes = run_check(CheckRequest(report, limits=Limits(max_kl=1), history=path))[0].notes
    assert len([note for note in notes if str(path) in note]) == 2  # cut off, another machine's


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("cand/model.onnx", "cand"),
        ("work/build-a/candidate/model.onnx", "build-a"),
        ("build-a/candidate/onnx/model_q4.onnx", "build-a"),
        ("build-a/engines/candidate", "build-a"),
        ("work/whisper-a", "whisper-a"),
        ("model.onnx", "model.onnx"),
    ],
)
def test_a_comment_is_named_by_the_folder_of_its_own(path: str, name: str) -> None:
    report = gate_report(arms=arms_of("cand", path=path))
    _, title, *_ = comment(check(report, Limits(max_kl=1)), report).splitlines()
    assert title.endswith(f": {name}")


def test_two_cuts_of_one_model_have_a_comment_each() -> None:
    reports = [
        gate_report(arms=Arms(baseline=gate_arm(base), candidate=gate_arm("cand", path=path)))
        for base, path in [
            ("base", "a/m.onnx"),
            ("base", "b/m.onnx"),
            ("base", "a/n.onnx"),
            ("other", "a/m.onnx"),
        ]
    ]
    marks = [
        comment(check(report, Limits(max_kl=1)), report).splitlines()[0]
        for report in [*reports, reports[0]]
    ]
    assert len(set(marks)) == 4
    assert marks[0] == marks[4]
