"""The second sample runs, in the environments that its README names."""

from __future__ import annotations

from pathlib import Path

import pytest

from exporter.artifacts import PruneReport
from tests.samples.running import run_sample


def run(folder: Path, script: str, *arguments: str) -> str:
    done = run_sample(folder, f"02_prune_any_onnx/{script}", folder, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_verified(report: Path, cut: int) -> None:
    result = PruneReport.read(report)
    assert [entry.kind for entry in result.deleted] == ["attention"] * cut
    assert result.verification.passed is True


@pytest.mark.real_model
@pytest.mark.long
def test_an_encoder_from_pytorch(tmp_path: Path) -> None:
    output = run(tmp_path, "encoder.sh")
    assert_verified(tmp_path / "prune.json", 2)
    assert "12 sites can be cut" in output
    assert "0.60" in output.partition("before  after")[2]  # the uncut model's first pair


@pytest.mark.optimum
@pytest.mark.long
def test_an_encoder_from_optimum(tmp_path: Path) -> None:
    output = run(tmp_path, "optimum.sh", "--prefill", "32", "--rounds", "2")
    assert_verified(tmp_path / "pruned" / "prune.json", 2)
    assert (tmp_path / "report" / "report.md").is_file()
    assert "0.60" in output.partition("before  after")[2]
