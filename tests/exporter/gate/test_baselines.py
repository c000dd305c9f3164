"""The key of a report, and the baselines that are found by it."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from exporter.artifacts import (
    Arms,
    ComparisonReport,
    FormRecord,
    QuantizationRecord,
)
from exporter.errors import ArtifactError, RegressionError, UsageError
from exporter.files import sha256_bytes
from exporter.gate.gate import BaselineMatch, check
from exporter.gate.history import find_baseline, read_baselines, updated
from exporter.gate.keys import differences, key_of, series
from exporter.gate.limits import Limits
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
    allowed = [difference.field for difference in differences(key_of(old), key_of(new))]
    outcome, result = find_baseline(new, {"old": old}, allowed)
    assert outcome is old
    assert [difference.field for difference in result] == allowed
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


def test_another_block_size_is_another_scheme() -> None:
    def key(**changes: Any) -> Any:
        record = EIGHT.model_copy(update=changes)
        return key_of(gate_report(arms=both("cand", quantization=record)))

    assert key(bits={"8": 6}) == key()  # how many there were
    (result,) = differences(key(block_size=64), key())
    assert (result.baseline, result.report) == (
        "int8 (rtn, blocks of 64)", "int8 (rtn, blocks of 32)"
    )  # fmt: skip


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
    assert [d.field for d in differences(first, other)] == ["versions"]
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
    with raises(UsageError, "unknown-field", "'colour'"):
        find_baseline(mine, read_baselines(tmp_path), ["colour"])
    mine.write(tmp_path / "again.json")
    with raises(RegressionError, "several-baselines", "again.json"):
        find_baseline(mine, read_baselines(tmp_path))


def test_one_file_holds_many_keys_and_each_is_renewed_alone(tmp_path: Path) -> None:
    """And a plain report is a baseline, which becomes one of many."""
    other, old, new = OTHERS["device"], gate_report(), gate_report(command=["again"])
    path = other.write(tmp_path / "baseline.json")
    assert list(read_baselines(path).values()) == [other]
    for report in (old, new):
        assert updated(path, report) == path
    assert list(read_baselines(path).values()) == [other, new]
    assert [p.name for p in tmp_path.glob("[!.]*")] == ["baseline.json"]


@pytest.mark.parametrize("name", ["baseline.json", "folder"])
def test_no_report_is_lost_where_jobs_update_one_baseline(tmp_path: Path, name: str) -> None:
    reports = [gate_report([gate_row(length)]) for length in range(1, 13)]
    with ThreadPoolExecutor(6) as jobs:  # each opens the lock by itself, as a process does
        list(jobs.map(lambda report: updated(tmp_path / name, report), reports))
    kept = read_baselines(tmp_path / name).values()
    assert sorted(report.latency[0].sequence_length for report in kept) == [*range(1, 13)]


def test_files_that_are_no_baseline_are_named(tmp_path: Path) -> None:
    with raises(RegressionError, "baseline-missing") as caught:
        read_baselines(tmp_path / "none.json")
    assert "--update-baseline" in caught.value.hint
    with raises(RegressionError, "no-report"):
        read_baselines(tmp_path)
    path = tmp_path / "x.json"
    for text, code, field in (
        ("{", "not-json", "x.json"),
        ("[]", "wrong-kind", "depthcut compare"),
        ('{"schema_version": 1, "kind": "prune_report"}', "wrong-kind", "depthcut compare"),
        ('{"schema_version": 99, "kind": "comparison_report"}', "newer-schema", 99),
        ('{"schema_version": 1, "kind": "baseline_set", "reports": [1]}', "", "$.reports[0]"),
    ):
        path.write_text(text)
        with raises(ArtifactError, code, field):
            read_baselines(path)
