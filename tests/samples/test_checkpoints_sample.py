"""The sample of a training runs, for a few steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from exporter.artifacts import DepthsReport, ScoreComparison
from tests.samples.running import run_sample

pytestmark = pytest.mark.torch


@pytest.mark.long
def test_a_training_is_followed_and_its_last_model_pruned(tmp_path: Path) -> None:
    result = ("32", "-n", "1,2", "--eval-tokens", "512")
    done = run_sample(tmp_path, "04_checkpoints/run.sh", tmp_path / "out", *result)
    assert done.returncode == 0, done.stderr
    report = ScoreComparison.read(tmp_path / "out" / "training.json")
    assert [Path(name).stem for name in report.models] == ["1", "2", "4", "8", "16", "32"]
    assert len({model.sha256 for model in report.models.values()}) == 6
    assert len({text.sha256 for text in report.texts.values()}) == 1
    assert {pair.kind for pair in report.agreements} == {"attention", "mlp", "block"}
    assert (tmp_path / "out" / "training.html").is_file()
    depths = DepthsReport.read(tmp_path / "out" / "depths.json")
    assert all(cell.damage is not None for cell in depths.cells)
    assert depths.numbers == [1, 2]
    assert (tmp_path / "out" / "depths.html").is_file()
