"""The sample of a training runs, for a few steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from exporter.artifacts import DepthsReport, StabilityReport
from tests.samples.running import run_sample

pytestmark = pytest.mark.torch


@pytest.mark.long
def test_a_training_is_followed_and_its_last_model_pruned(tmp_path: Path) -> None:
    asked = ("32", "-n", "1,2", "--eval-tokens", "512")
    done = run_sample(tmp_path, "04_checkpoints/run.sh", tmp_path / "out", *asked)
    assert done.returncode == 0, done.stderr
    report = StabilityReport.read(tmp_path / "out" / "training" / "stability.json")
    assert [point.step for point in report.points] == [1, 2, 4, 8, 16, 32]
    assert (report.over, report.is_ordered) == ("checkpoints", True)
    end = StabilityReport.read(tmp_path / "out" / "end.json")
    assert end.kinds[0].agreements[0].spearman == report.kinds[0].between(4, 5).spearman
    depths = DepthsReport.read(tmp_path / "out" / "depths.json")
    assert all(cell.damage is not None for cell in depths.cells)
    assert depths.numbers == [1, 2]
    assert (tmp_path / "out" / "depths.html").is_file()
