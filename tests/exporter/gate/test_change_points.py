"""Steps in histories: found where they are, and hardly ever where there are none."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from exporter.artifacts import Arms, CheckReport, HistoryEntry, HistoryRow
from exporter.gate.curves import ALL_SHAPES, FEWEST, SHARE_OF_ALL, curves, steps
from exporter.gate.gate import check
from exporter.gate.history import append, entry_of, read_history, read_history_file
from exporter.gate.limits import Limits
from exporter.gate.request import CheckRequest, run_check
from exporter.report.checks import sparkline
from exporter.report.ci import annotation_lines, comment, junit
from tests.made_reports import arms_of, gate_arm, gate_report, gate_row

SERIES, NOISE, RUNS = "s" * 64, 0.02, 60


def noise(seed: int, runs: int = RUNS) -> np.ndarray:
    return NOISE * np.random.default_rng(seed).standard_normal(runs)


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


@pytest.mark.parametrize("at", [12, 30, 48])
def test_a_clear_step_is_found_at_its_run_with_its_size(at: int) -> None:
    for seed in range(3):
        values = noise(seed)
        values[at:] += 0.08
        (one,) = steps(values)
        assert abs(one.at - at) <= 1
        assert one.ci95[0] < one.size < one.ci95[1]
        assert one.size == pytest.approx(0.08, abs=0.02)


@pytest.mark.parametrize("count", [10, 30])
@pytest.mark.parametrize("at", [30, RUNS - 4])
def test_a_clear_step_is_found_however_many_curves_share_the_error(count: int, at: int) -> None:
    values = noise(3)
    assert steps(values, share=1 / count) == []
    values[at:] += 0.3
    (one,) = steps(values, share=1 / count)
    assert one.at == at


def test_two_steps_are_two_and_a_shrunk_time_is_one_too() -> None:
    values = noise(5)
    values[20:] += 0.1
    values[40:] -= 0.15
    result = steps(values)
    assert [round(one.at / 2) for one in result] == [10, 20]
    assert result[0].size > 0 > result[1].size


def test_noise_has_hardly_ever_a_step() -> None:
    assert sum(len(steps(noise(seed))) for seed in range(30)) <= 1


def test_a_step_of_the_last_runs_is_found_before_there_are_many() -> None:
    values = noise(3)
    values[-3:] += 0.1
    (one,) = steps(values)
    assert one.at >= RUNS - 4


@pytest.mark.parametrize(("size", "least", "most"), [(0.035, 7, 8), (0.0, 0, 0)])
def test_a_step_is_still_told_when_it_is_ten_runs_old(size: float, least: int, most: int) -> None:
    histories = [noise(seed) + size * (np.arange(RUNS) >= RUNS - 10) for seed in range(8)]
    assert least <= sum(bool(steps(values)) for values in histories) <= most


@pytest.mark.parametrize(("kept", "most"), [(0.3, 1), (0.6, 3)])
def test_runs_that_resemble_their_neighbours_hardly_ever_have_a_step(
    kept: float, most: int
) -> None:
    result = 0
    for seed in range(40):
        values = noise(seed, RUNS + 20)
        for run in range(1, len(values)):
            values[run] += kept * values[run - 1]
        result += len(steps(values[20:]))
    assert result <= most


def test_single_outliers_are_no_step() -> None:
    for seed in range(3):
        values = noise(seed)
        values[[20, RUNS - 1]] += 0.5
        assert steps(values) == []


def test_drift_is_no_step() -> None:
    assert steps(noise(1) + 0.004 * np.arange(RUNS)) == []


@pytest.mark.parametrize(("scale", "level"), [(0.25, 0.0), (64.0, 0.0), (1.0, 8.0)])
def test_steps_move_with_scale_and_level(scale: float, level: float) -> None:
    values = noise(4)
    values[35:] += 0.07
    result, moved = steps(values), steps(values * scale + level)
    assert [one.at for one in result] == [one.at for one in moved] == [35]
    assert moved[0].size == pytest.approx(result[0].size * scale)


@pytest.mark.parametrize("values", [np.zeros(RUNS), np.zeros(0), np.ones(3), noise(0, FEWEST - 1)])
def test_nothing_is_found_where_there_is_nothing(values: np.ndarray) -> None:
    assert steps(values) == []


def test_an_exact_step_without_noise_is_found() -> None:
    values = np.where(np.arange(RUNS) < 40, 0.0, 0.03)
    (one,) = steps(values)
    assert (one.at, one.ci95) == (40, (pytest.approx(0.03), pytest.approx(0.03)))


def test_all_shapes_together_find_what_none_of_them_shows_alone() -> None:
    values = np.stack([noise(seed) for seed in range(4)], axis=1)
    values[-5:] += 0.03
    whole, *others = curves(entries(values), SERIES)
    assert whole.subject == ALL_SHAPES
    (point,) = whole.points
    assert abs(point.run - (RUNS - 5)) <= 2
    assert point.commit == f"{point.run:040x}"
    assert not any(curve.points for curve in others)


@pytest.mark.parametrize("count", [2, 5])
def test_all_shapes_have_half_of_the_error_however_many_they_are(count: int) -> None:
    values = noise(2)
    values[-5:] += 0.03
    whole, *_ = curves(entries(np.stack([values] * count, axis=1)), SERIES)
    assert [point.run for point in whole.points] == [RUNS - 5]
    assert [one.at for one in steps(values, share=SHARE_OF_ALL)] == [RUNS - 5]
    assert steps(values, share=1 / 6) == []


@pytest.mark.parametrize(("change", "found"), [(1e-15, 0), (0.01, 1)])
def test_a_change_by_rounding_is_no_step(change: float, found: int) -> None:
    values = np.full(40, 3.4)
    values[20:] += change
    assert len(steps(values)) == found


@pytest.mark.filterwarnings("error")
def test_a_side_that_is_constant_has_an_interval_about_the_size() -> None:
    values = np.full(40, 3.4)
    values[20:] += 0.05 + 0.001 * np.random.default_rng(1).standard_normal(20)
    (step,) = steps(values)
    assert step.ci95[0] < step.size < step.ci95[1]
    assert step.ci95 == pytest.approx((0.05, 0.05), abs=0.002)


def test_gaps_and_other_machines_leave_the_rest() -> None:
    values = np.stack([noise(1), noise(2)], axis=1)
    values[30:] += 0.1
    values[10:20, 1] = np.nan
    mine = entries(values)
    other = [entry.model_copy(update={"series": "o" * 64}) for entry in entries(noise(3))]
    whole, first, second = curves([*other, *mine], SERIES)
    assert [len(curve.runs) for curve in (whole, first, second)] == [50, 60, 50]
    assert abs(whole.points[0].run - 20) <= 1
    assert whole.points[0].commit == mine[10 + whole.points[0].run].commit


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
    arms = arms_of("cand", path=path)
    report = gate_report(arms=arms)
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


def checked_history(tmp_path: Path, slower: int) -> tuple[CheckReport, Path]:
    """A history of 41 runs whose last ones are slower, and what a check finds in it."""
    path, limits = tmp_path / "history.jsonl", Limits(max_kl=1)
    for run, value in enumerate(noise(2, 41)):
        ms = 80 * math.exp(value + 0.1 * (run >= 41 - slower))
        report = gate_report([gate_row(candidate_ms=ms)])
        if run < 40:
            append(path, entry_of(report, check(report, limits), commit=f"{run:08}"))
    saved = report.write(tmp_path / "report.json")
    result, _ = run_check(CheckRequest(saved, limits=limits, history=path, commit=f"{run:08}"))
    return result, path


def test_a_check_tells_the_step_its_run_and_draws_it(tmp_path: Path) -> None:
    result, _ = checked_history(tmp_path, slower=4)
    (curve,) = result.curves
    (point,) = curve.points
    assert point.commit is not None
    assert abs(int(point.commit) - 37) <= 1
    assert len(annotation_lines(result)) == 1
    text = comment(result, gate_report())
    assert point.commit in junit(result)
    assert text.startswith("<!-- depthcut check")
    assert point.commit in text
    assert "┊" in text
    assert CheckReport.model_validate_json(result.to_json()) == result


def test_an_old_step_is_told_and_no_longer_warned_of(tmp_path: Path) -> None:
    result, _ = checked_history(tmp_path, slower=20)
    assert len(result.curves[0].points) == 1
    assert annotation_lines(result) == []


@pytest.mark.parametrize("end", [b"", "é".encode()[:1]], ids=["between", "inside-a-character"])
def test_a_line_that_is_cut_off_is_told_and_stays(tmp_path: Path, end: bytes) -> None:
    path, (first, second) = tmp_path / "history.jsonl", entries(noise(0, 2))
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


def test_a_curve_as_text_has_a_bar_a_run() -> None:
    assert sparkline([]) == ""
    assert sparkline([0, 1], [1]) == "▁┊█"
    low, high = sparkline([1, 1.001])
    assert "▁" < low <= high < "█"
