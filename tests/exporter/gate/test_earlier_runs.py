"""Earlier runs: baselines, which a report's key finds, and histories, with their drift."""

from __future__ import annotations

import json
import math
import re
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.artifacts import (
    Arms,
    ComparisonReport,
    FormRecord,
    HistoryEntry,
    HistoryRow,
    QuantizationRecord,
)
from exporter.errors import ArtifactError, RegressionError, UsageError
from exporter.files import sha256_bytes
from exporter.gate.gate import BaselineMatch, History, check
from exporter.gate.history import (
    append,
    drifts,
    entry_of,
    find_baseline,
    read_baselines,
    read_history,
    read_history_file,
    session_spreads,
    updated,
)
from exporter.gate.keys import differences, key_of, series
from exporter.gate.limits import Limits
from exporter.gate.request import CheckRequest, run_check
from exporter.report.ci import comment
from tests.made_reports import (
    arms_of,
    gate_accuracy,
    gate_arm,
    gate_report,
    gate_row,
    made_engine,
    made_environment,
)
from tests.raising import raises

FUSED = FormRecord(target="onnxruntime-cpu", writer="genai 0.18")
EIGHT = QuantizationRecord(scheme="int8", method="rtn", bits={"8": 7}, block_size=32)


def both(candidate: str = "c", **changes: Any) -> Arms:
    """Two arms that are alike in something."""
    return Arms(baseline=gate_arm("base", **changes), candidate=gate_arm(candidate, **changes))


OTHERS: dict[str, ComparisonReport] = {
    "model": gate_report(arms=Arms(baseline=gate_arm("other"), candidate=gate_arm("cand"))),
    "backend": gate_report(arms=both(backend="b"), versions={"onnxruntime": "1.32.0"}),
    "provider": gate_report(arms=arms_of("c", provider="CUDA")),
    "precision": gate_report(arms=arms_of("c", precision="fp16")),
    "device": gate_report(machine="Another CPU"),
    "threads": gate_report(environment=made_environment(threads=1)),
    "shapes": gate_report([gate_row(128)]),
    "text": gate_report(accuracy=gate_accuracy(tokens=512)),
    "versions": gate_report(versions={"onnxruntime": "1.25.0"}),
    "form": gate_report(arms=arms_of("c", form=FUSED)),
    "quantization": gate_report(arms=both(quantization=EIGHT)),
}


@pytest.mark.parametrize("field", OTHERS)
def test_unlike_runs_are_refused_and_a_named_difference_is_accepted(field: str) -> None:
    old, new = OTHERS[field], gate_report()
    with raises(RegressionError, "other-conditions", f"{field}:") as e:
        find_baseline(new, {"old": old})
    assert f"--allow {field}" in e.value.hint
    allowed = differences(key_of(old), key_of(new)).keys()
    outcome, result = find_baseline(new, {"old": old}, allowed)
    assert outcome is old
    assert result.keys() == allowed
    assert field in allowed
    accepted = BaselineMatch(outcome, result)
    assert check(new, Limits(max_slowdown=0.03), baseline=accepted).verdict == "within_limit"


def test_shapes_that_are_accepted_and_none_of_them_in_common_leave_times_undecided() -> None:
    old, new = gate_report([gate_row(128)]), gate_report([gate_row(64)])
    accepted = BaselineMatch(*find_baseline(new, {"old": old}, ["shapes"]))
    result = check(new, baseline=accepted)
    assert result.verdict == "inconclusive"
    times = [one.verdict for one in result.checks if one.quantity == "time"]
    assert times == ["inconclusive"]


def test_a_shape_that_is_new_and_accepted_is_held_to_the_least_speedup() -> None:
    old, new = (
        gate_report([gate_row(128)]),
        gate_report([gate_row(128), gate_row(512, candidate_ms=200)]),
    )
    accepted = BaselineMatch(*find_baseline(new, {"old": old}, ["shapes"]))
    result = check(new, Limits(min_speedup=1.1), baseline=accepted)
    assert [one.verdict for one in result.checks] == ["within_limit", "regressed"]


def test_a_key_without_form_and_quantisation_hashes_as_before() -> None:
    key = key_of(gate_report())
    result = key.model_dump(exclude={"shapes", "text", "versions", "form", "quantization"})
    assert series(key) == sha256_bytes(json.dumps(result, separators=(",", ":")).encode())
    assert series(key) != series(key.model_copy(update={"form": FUSED.name}))


@pytest.mark.parametrize(
    ("arm", "library"),
    [
        ({"backend": "pytorch"}, "torch"),
        ({"backend": "torch.compile"}, "torch"),
        ({"backend": "tensorrt_rtx"}, "tensorrt-rtx"),
        ({"backend": "tensorrt"}, "tensorrt"),
        ({"backend": "onnxruntime"}, "onnxruntime"),
    ],
)
def test_the_version_of_what_ran_counts(arm: dict[str, Any], library: str) -> None:
    versions = {"torch": "1", "tensorrt-rtx": "2", "tensorrt": "3", "onnxruntime": "4"}
    key = key_of(gate_report(arms=both(**arm), versions=versions | {"depthcut": "0.2.0"}))
    assert key.versions == {library: versions[library]}


def test_the_gpu_counts_and_its_driver_and_its_engines_are_versions() -> None:
    first, other = (
        key_of(gate_report(environment=made_environment(gpu=f"NVIDIA L4, {driver}")))
        for driver in ("580.10", "590.20")
    )
    assert [*differences(first, other)] == ["versions"]
    assert "L4" in first.device
    built = key_of(gate_report(arms=arms_of("c", engines=[made_engine(1)])))
    assert built.versions["engines"] == "11"


def test_the_nearest_of_several_is_named_and_the_right_one_found(tmp_path: Path) -> None:
    mine = gate_report()
    for report in (OTHERS["device"], OTHERS["backend"], mine):
        updated(tmp_path, report)
    assert len(list(tmp_path.glob("*.json"))) == 3
    assert find_baseline(mine, read_baselines(tmp_path))[0] == mine
    with raises(RegressionError, "other-conditions", 3):
        find_baseline(OTHERS["threads"], read_baselines(tmp_path))
    mine.write(tmp_path / "again.json")
    with raises(RegressionError, "several-baselines", "again.json"):
        find_baseline(mine, read_baselines(tmp_path))


def test_no_report_is_lost_where_jobs_update_one_baseline(tmp_path: Path) -> None:
    reports = [gate_report([gate_row(length)]) for length in range(1, 13)]
    with ThreadPoolExecutor(6) as jobs:  # each opens the lock by itself, as a process does
        list(jobs.map(lambda report: updated(tmp_path / "folder", report), reports))
    kept = read_baselines(tmp_path / "folder").values()
    assert sorted(report.latency[0].sequence_length for report in kept) == [*range(1, 13)]


def test_files_that_are_no_baseline_are_named(tmp_path: Path) -> None:
    with raises(RegressionError, "no-baseline") as caught:
        read_baselines(tmp_path / "none.json")
    assert "--update-baseline" in caught.value.hint
    with raises(RegressionError, "no-baseline"):
        read_baselines(tmp_path)
    path = tmp_path / "x.json"
    for text, code, field in (
        ("{", "", "x.json"),
        ("[]", "wrong-kind", "depthcut compare"),
        ('{"schema_version": 1, "kind": "prune_report"}', "wrong-kind", "depthcut compare"),
        ('{"schema_version": 99, "kind": "comparison_report"}', "other-schema", 99),
    ):
        path.write_text(text)
        with raises(ArtifactError, code, field):
            read_baselines(path)


# Histories.

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


@pytest.mark.parametrize(
    ("whole", "cut", "names"),
    [
        ("minilm/baseline", "minilm/candidate", ["minilm"]),
        ("whole/model.onnx", "cut-2/model.onnx", ["cut-2", "whole"]),
    ],
)
def test_a_comment_s_title_names_its_models(whole: str, cut: str, names: list[str]) -> None:
    arms = Arms(baseline=gate_arm("b", path=whole), candidate=gate_arm("c", path=cut))
    report = gate_report(arms=arms)
    title = comment(check(report, Limits(max_kl=1)), report).splitlines()[1]
    assert re.findall(r"minilm|whole|cut-2", title) == names


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
        (0.7, 0.03, 6),  # 27 of 1000; 63 where they count as independent
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


@pytest.mark.parametrize("end", [b"", "é".encode()[:1]])
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


@pytest.mark.parametrize(
    ("line", "code", "field"),
    [
        ("{]", "broken-line", "$: "),
        ("\udcff{}", "broken-line", "$: "),
        ("<<<<<<< ours", "broken-line", "$: "),
        ('{"schema_version": 1}', "broken-line", "$.time: "),
        ("BETTER", "broken-line", "$.verdict"),
        ("SELF-99", "other-schema", 99),
        ('{"schema_version": 99, "kept_in_2030": 1}', "other-schema", 99),
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
