"""Histories: drift where it is, and hardly ever where there is none; comments; the file."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from exporter.artifacts import Arms, ComparisonReport, HistoryEntry, HistoryRow
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

SERIES, WEEKS = "s" * 64, 20
WEEK = np.arange(WEEKS)[:, None]


def noise(seed: int, *shape: int, kept: float = 0.0) -> np.ndarray:
    """Noise of 1 %, of which a share ``kept`` carries over to the next run."""
    values = 0.01 * np.random.default_rng(seed).standard_normal(shape)
    for run in range(1, len(values)):
        values[run] = kept * values[run - 1] + math.sqrt(1 - kept**2) * values[run]
    return values


def entries(values: np.ndarray) -> list[HistoryEntry]:
    """Runs with these logarithms of relative time, a column a shape."""
    return [
        HistoryEntry(
            schema_version=1,
            time=f"2026-01-01T00:00:{run:02}+00:00",
            commit=f"{run:040x}",
            series=SERIES,
            candidate_sha256="c" * 64,
            verdict="within_limit",
            rows=[
                HistoryRow(subject=f"shape {n}", speedup=math.exp(-value), ci95=(0.9, 1.1))
                for n, value in enumerate(row)
                if math.isfinite(value)
            ],
        )
        for run, row in enumerate(np.atleast_2d(values.T).T)
    ]


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
    def mark(base: str, path: str) -> str:
        arms = Arms(baseline=gate_arm(base), candidate=gate_arm("cand", path=path))
        report = gate_report(arms=arms)
        return comment(check(report, Limits(max_kl=1)), report).splitlines()[0]

    pairs = [
        ("base", "a/m.onnx"),
        ("base", "b/m.onnx"),
        ("base", "a/n.onnx"),
        ("other", "a/m.onnx"),
    ]
    assert len({mark(*pair) for pair in pairs}) == 4
    assert mark(*pairs[0]) == mark(*pairs[0])


def drifting(values: np.ndarray, least: float | None = None) -> list[str]:
    """The subjects that drift."""
    more = {} if least is None else {"least": least}
    return [one.subject for one in drifts(entries(values), SERIES, **more)]


@pytest.mark.parametrize("seed", range(40))
def test_half_a_percent_a_week_is_told_though_no_step_fails(seed: int) -> None:
    (one,) = drifts(entries(noise(seed, WEEKS, 1) + 0.005 * WEEK), SERIES)
    assert one.per_entry == pytest.approx(0.005, abs=0.003)
    assert one.entries == WEEKS
    assert one.first.startswith("0000")
    old, new = (gate_report([gate_row(candidate_ms=80 * math.exp(0.005 * w))]) for w in (0, 1))
    limits = Limits(max_slowdown=0.03)  # without noise: each step by itself
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
    histories = (noise(seed, WEEKS, 3, kept=kept) for seed in range(100))
    assert sum(bool(drifting(values, least)) for values in histories) <= most


def test_what_is_faster_small_short_old_or_of_another_series_is_no_drift() -> None:
    assert drifting(-0.005 * WEEK) == []
    assert drifting(0.001 * WEEK) == []
    assert drifting(0.001 * WEEK, least=0.01) == ["shape 0"]
    assert drifting(0.02 * WEEK[:7]) == []
    assert drifting(np.concatenate([0.02 * WEEK, np.zeros((30, 1))])) == []
    assert drifts(entries(0.02 * WEEK), "other") == []
    assert drifting(np.concatenate([0.005 * WEEK, 0 * WEEK], axis=1)) == ["shape 0"]


def test_sessions_of_one_candidate_tell_how_sessions_differ() -> None:
    values = noise(1, 30)
    runs = entries(values)
    (spread,) = session_spreads(runs, SERIES, "c" * 64).values()
    deviation = values.std(ddof=1)
    assert spread == pytest.approx(math.expm1(2.045 * math.sqrt(2) * deviation), rel=1e-3)
    assert session_spreads(runs[:3], SERIES, "c" * 64) == {}
    assert session_spreads(runs, SERIES, "d" * 64) == {}


def test_what_sessions_differ_by_is_no_regression() -> None:
    old, new = gate_report([gate_row()]), gate_report([gate_row(candidate_ms=84.8)])
    limits, baseline = Limits(max_slowdown=0.03), BaselineMatch(old)
    assert check(new, limits, baseline=baseline).verdict == "regressed"
    past = History(spreads={new.latency[0].shape_name: 0.08})
    assert check(new, limits, baseline=baseline, history=past).verdict == "inconclusive"


def test_updates_and_new_shapes_continue_a_series_and_another_machine_does_not() -> None:
    mine = series(key_of(gate_report()))
    assert series(key_of(gate_report([gate_row()], versions={"onnxruntime": "2.0"}))) == mine
    assert series(key_of(gate_report(machine="Another CPU"))) != mine


# The file.


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "history.jsonl"


def request(path: Path, report: ComparisonReport | None = None, **limits: float) -> CheckRequest:
    saved = (report or gate_report()).write(path.with_name("report.json"))
    return CheckRequest(saved, limits=Limits(**limits or {"max_kl": 1}), history=path)


def test_a_run_is_a_line_and_comes_back(path: Path) -> None:
    report = gate_report()
    result = check(report, Limits(max_kl=1))
    now = datetime(2026, 5, 1, tzinfo=UTC)
    made = [entry_of(report, result, commit=c, now=now) for c in ("a" * 40, None)]
    for entry in made:
        append(path, entry)
    assert read_history(path) == made
    assert made[0].time == "2026-05-01T00:00:00+00:00"
    assert path.read_text().count("\n") == 2
    assert read_history(path.with_name("none.jsonl")) == []
    path.write_text(made[0].model_dump_json())  # without its end
    append(path, made[1])
    assert read_history(path) == made


@pytest.mark.parametrize("end", [b"", "é".encode()[:1]], ids=["between", "inside-a-character"])
def test_a_line_that_is_cut_off_is_told_and_stays(path: Path, end: bytes) -> None:
    first, second = entries(noise(0, 2))
    append(path, first)
    half = second.model_dump_json()[:50].encode() + end
    path.write_bytes(path.read_bytes() + half)
    assert read_history_file(path).cut_off == [2]
    append(path, second)
    assert read_history(path) == [first, second]
    assert half in path.read_bytes()
    notes = run_check(request(path))[0].notes
    assert len([note for note in notes if str(path) in note]) == 2  # cut off, another machine's


def test_lines_of_before_the_words_changed_are_read(path: Path) -> None:
    (entry,) = entries(np.zeros((1, 1)))
    append(path, entry)
    path.write_text(path.read_text().replace("within_limit", "unchanged"))
    assert read_history(path) == [entry]


@pytest.mark.parametrize(
    ("line", "code", "field"),
    [
        ("{]", "broken-line", "$: "),
        ('{"schema_version": 1}', "broken-line", "$.time: "),
        ("BETTER", "broken-line", "$.verdict"),
        ("SELF-99", "newer-schema", 99),
        ('{"schema_version": 99, "kept_in_2030": 1}', "newer-schema", 99),
        ("\udcff{}", "not-utf-8", "0xff"),
    ],
)
def test_a_broken_line_is_named(path: Path, line: str, code: str, field: object) -> None:
    good = entries(np.zeros((1, 1)))[0].model_dump_json()
    spoilt = {
        "SELF-99": good.replace('"schema_version":1', '"schema_version":99'),
        "BETTER": good.replace("within_limit", "better"),
    }
    path.parent.mkdir()
    path.write_text(f"{good}\n{spoilt.get(line, line)}\n{good}\n", errors="surrogateescape")
    before = path.read_bytes()
    with raises(ArtifactError, code, "history.jsonl", "line 2", field):
        run_check(request(path))
    assert path.read_bytes() == before


def test_checking_a_report_twice_is_one_run(path: Path) -> None:
    for _ in range(2):
        run_check(request(path))
    assert len(read_history(path)) == 1
    run_check(request(path, gate_report([gate_row(candidate_ms=81)])))
    assert len(read_history(path)) == 2


@pytest.mark.parametrize(("limit", "told"), [(0.0, 1), (0.03, 0)])
def test_a_limit_of_no_slowdown_is_one_for_drift_too(path: Path, limit: float, told: int) -> None:
    for number in range(12):
        report = gate_report([gate_row(candidate_ms=80 + number / 10)])
        drift = run_check(request(path, report, max_slowdown=limit))[0].drift
    assert len(drift) == told


def test_a_history_that_is_a_link_is_not_written(path: Path) -> None:
    path.parent.mkdir()
    secret = path.with_name("secret.txt")
    secret.write_text("")
    path.symlink_to(secret)
    with raises(UsageError, "linked-output", path):
        run_check(request(path))
    with raises(UsageError, "linked-output"):
        append(path, entries(np.zeros(1))[0])
    assert secret.read_text() == ""
