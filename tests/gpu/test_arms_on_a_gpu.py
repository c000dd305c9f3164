"""Engines compared on a GPU, with ONNX Runtime and PyTorch as witnesses."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine_models import RANGES, skip_unserved, write_tiny_llama

from exporter.compare.options import CompareOptions
from exporter.compare.session import compare
from exporter.engines.build.build import build_engines

pytestmark = pytest.mark.gpu


def test_engines_run_and_are_held_against_onnx_runtime(tmp_path: Path) -> None:
    skip_unserved("tensorrt-rtx")
    onnx = write_tiny_llama(tmp_path)
    for name, builds in (("baseline", 2), ("candidate", 2)):
        build_engines(onnx, tmp_path / "engines" / name, builds=builds, ranges=RANGES)
    options = CompareOptions(
        threads=1,
        prefill_lengths=(8,),
        decode_past_lengths=(64,),
        eval_tokens=64,
        eval_sequence_length=16,
    )
    arms = (tmp_path / "engines/baseline", tmp_path / "engines/candidate")
    report = compare(*arms, options, references=[onnx])
    for arm in (report.arms.baseline, report.arms.candidate):
        assert arm.backend == "tensorrt-rtx"
        assert arm.not_run is None
        assert len(arm.engines) == 2
        assert arm.device_memory_bytes
    assert report.environment.gpu is not None
    assert len(report.parity) == 3
    assert all(check.passed for check in report.parity)
    assert report.accuracy is not None
    assert report.accuracy.kl_divergence == pytest.approx(0, abs=1e-4)
    assert all(row.references["model.onnx"].median_ms > 0 for row in report.latency)
