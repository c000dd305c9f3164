"""Times that trtexec and polygraphy took, as arms."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_lm import write_tiny_lm

from exporter.artifacts import ComparisonReport
from exporter.compare.imported import read_times
from exporter.compare.session import compare
from exporter.errors import ComparisonError
from tests.made_reports import as_markdown, as_text
from tests.raising import raises


def trtexec(path: Path, compute_ms: Sequence[float], *, begin_ms: float = 200.0) -> Path:
    """A file as trtexec writes it, with two runs of warm-up before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    runs = []
    for number, ms in enumerate([99.0, 99.0, *compute_ms]):
        start = begin_ms + 10 * (number - 2)
        runs.append(
            {
                "startEnqMs": start, "endEnqMs": start, "startH2dMs": start, "endH2dMs": start,
                "startComputeMs": start, "endComputeMs": start + ms, "startD2hMs": start + ms,
                "endD2hMs": start + ms, "h2dMs": 1.0, "computeMs": ms, "d2hMs": 1.0,
                "latencyMs": ms + 2, "endToEndMs": ms + 2,
            }
        )  # fmt: skip
    path.write_text(json.dumps(runs))
    return path


def polygraphy(path: Path, runtimes_s: Sequence[float], *runners: str) -> Path:
    """A file as polygraphy run --save-results writes it."""
    array = {"values": {"arr": "AAAA", "polygraphy_class": "ndarray"}}
    results = [
        [
            name,
            [
                {
                    "outputs": {"logits": array}, "runtime": runtime, "runner_name": name,
                    "polygraphy_class": "IterationResult",
                }
                for runtime in runtimes_s
            ],
        ]
        for name in runners or ("trt-runner",)
    ]  # fmt: skip
    path.write_text(json.dumps({"lst": results, "polygraphy_class": "RunResults"}))
    return path


def around(ms: float, seed: int, count: int = 40) -> list[float]:
    return list(ms * np.random.default_rng(seed).uniform(0.99, 1.01, count))


def compared(baseline: Path, candidate: Path) -> ComparisonReport:
    return compare(f"times:{baseline}", f"times:{candidate}")


def test_a_warm_up_is_left_out_where_trtexec_writes_it(tmp_path: Path) -> None:
    times = around(4.0, 0)
    old = trtexec(tmp_path / "old.json", times)
    runs = [
        {k: v for k, v in run.items() if k != "endToEndMs"} for run in json.loads(old.read_text())
    ]
    new = tmp_path / "new.json"  # trtexec --warmUp=0 of a version that has no warm-up in its file
    new.write_text(json.dumps(runs))
    assert read_times(old).samples_ms == tuple(times)
    assert read_times(new).samples_ms == (99.0, 99.0, *times)


def test_one_file_an_arm_gives_a_ratio_and_no_verdict(tmp_path: Path) -> None:
    first = trtexec(tmp_path / "a.json", around(4.0, 0))
    report = compared(first, trtexec(tmp_path / "b.json", around(2.0, 1, 55)))
    (row,) = report.latency
    assert row.imported
    assert (row.phase, row.clock, row.rounds) == ("run", "device", 1)
    assert row.speedup.ratio == pytest.approx(2.0, rel=0.02)
    assert row.verdict == "inconclusive"
    assert (len(row.baseline.samples_ms), len(row.candidate.samples_ms)) == (40, 55)
    assert report.arms.baseline.backend == "trtexec"
    assert report.accuracy is None
    assert ComparisonReport.read(report.write(tmp_path / "report.json")) == report
    text = as_markdown(report)
    assert "Another tool timed the arms" in text
    assert "took turns in one process" not in text
    assert "gets no verdict: that takes 6 rounds" in text
    assert "## Size" not in text
    assert "run, ms" in as_text(report)


def test_sessions_in_turns_give_a_verdict(tmp_path: Path) -> None:
    for number in range(6):
        trtexec(tmp_path / "a" / f"{number}.json", around(4.0, number))
        trtexec(tmp_path / "b" / f"{number}.json", around(3.0, 10 + number, 30))
    report = compared(tmp_path / "a", tmp_path / "b")
    (row,) = report.latency
    assert (row.rounds, row.verdict) == (6, "faster")
    assert len(row.candidate.samples_ms) == 6 * 30
    alike = compared(tmp_path / "a", tmp_path / "a" / "*.json").latency[0]
    assert alike.verdict == "same"


def test_polygraphy_tells_seconds_of_the_host(tmp_path: Path) -> None:
    first = polygraphy(tmp_path / "a.json", [0.004, 0.004, 0.004])
    report = compared(first, polygraphy(tmp_path / "b.json", [0.002, 0.002, 0.002]))
    (row,) = report.latency
    assert row.clock == "host"
    assert row.baseline.median_ms == pytest.approx(4.0)
    assert row.speedup.ratio == pytest.approx(2.0)
    assert report.arms.baseline.backend == "polygraphy, trt-runner"


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ("[", "not-json"),
        ("[]", "too-few-times"),
        ("{}", "unknown-format"),
        ("3", "unknown-format"),
        ('[{"latencyMs": 1}]', "unknown-format"),
        ('{"polygraphy_class": "AccuracyResult", "lst": []}', "unknown-format"),
        ('{"polygraphy_class": "RunResults", "lst": []}', "several-runners"),
        ('[{"startComputeMs": 300, "computeMs": -1}, {"startComputeMs": 301, "computeMs": 1}]',
         "time-not-positive"),
    ],
)  # fmt: skip
def test_other_files_are_refused(tmp_path: Path, content: str, code: str) -> None:
    path = tmp_path / "times.json"
    path.write_text(content)
    with raises(ComparisonError, code):
        compared(path, path)


def test_what_cannot_be_compared_is_told(tmp_path: Path) -> None:
    first = trtexec(tmp_path / "a.json", around(4.0, 0))
    other = polygraphy(tmp_path / "b.json", [0.004, 0.004])
    cases: list[tuple[tuple[Any, Any], str]] = [
        ((first, other), "different-tools"),
        ((first, tmp_path / "none.json"), "file-missing"),
        ((first, tmp_path / "[ab].json"), "different-tools"),
        ((first, polygraphy(tmp_path / "c.json", [0.1, 0.1], "trt", "onnxrt")), "several-runners"),
    ]
    for arms, code in cases:
        with raises(ComparisonError, code):
            compared(*arms)
    late = trtexec(tmp_path / "e.json", around(4.0, 0, 12), begin_ms=20)
    with raises(ComparisonError, "too-few-times", 0):
        compared(first, late)


def test_times_stand_beside_times_alone(tmp_path: Path) -> None:
    times = f"times:{trtexec(tmp_path / 'a.json', around(4.0, 0))}"
    onnx = write_tiny_lm(tmp_path / "model")
    with raises(ComparisonError, "different-kinds"):
        compare(times, onnx)
    with raises(ComparisonError, "untimed-reference", "a.json"):
        compare(onnx, onnx, references=[times])
    with raises(ComparisonError, "untimed-reference"):
        compare(times, times, references=[onnx])
