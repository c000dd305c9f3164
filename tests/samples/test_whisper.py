"""The sample for Whisper, on random weights and tones."""

from __future__ import annotations

from pathlib import Path

import pytest

from exporter.artifacts import ComparisonReport
from tests.samples.running import run_sample
from tests.tiny_models import write_recordings, write_source

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("exports_once")]


def test_the_sample_cuts_and_transcribes(tmp_path: Path) -> None:
    pytest.importorskip("jiwer")
    model, out = write_source(tmp_path / "model", "whisper"), tmp_path / "out"
    texts = [write_recordings(tmp_path / name, at, 2) for name, at in (("a", 0), ("b", 4))]
    options = ("--drop-cross", "1", "--protect", "encoder", "--rounds", "2", "--threads", "1")
    done = run_sample(tmp_path, "13_whisper/run.sh", model, *texts, out, *options)
    assert done.returncode == 0, done.stderr
    report = ComparisonReport.read(out / "report.json")
    assert [deletion.kind for deletion in report.plan] == ["cross_attention"]
    assert report.accuracy is not None
    assert report.accuracy.tasks[0].metric == "wer"
    assert [line.split(":")[0] for line in done.stdout.splitlines()[-2:]] == ["4.wav", "5.wav"]
