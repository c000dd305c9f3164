"""The demo runs on a tiny model: two cuts and the whole model, in float and int8, in one table."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from exporter.artifacts import ComparisonReport, PruningPlan
from tests.exporter.tiny_lm import write_llama_folder

pytestmark = pytest.mark.torch
pytest.importorskip("torch")

SAMPLE = Path(__file__).parents[2] / "samples" / "01_quickstart" / "run.sh"
SMALL = [
    *("--drop-attn", "1", "--threads", "1", "--samples", "24", "--sequence-length", "16"),
    *("--prefill", "8", "--rounds", "2", "--eval-tokens", "64"),
]


@pytest.mark.parametrize("quick", ["", "1"])
def test_the_demo_puts_both_cuts_in_one_table(tmp_path: Path, quick: str) -> None:
    write_llama_folder(tmp_path / "model")
    out, path = (
        tmp_path / "out",
        os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    )
    asked = {"MODEL": str(tmp_path / "model"), "PAPER": "1", "QUICK": quick}
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PATH": path}
    done = subprocess.run(
        ["sh", SAMPLE, out, *SMALL], env={**os.environ, **asked, **cache},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = ComparisonReport.read(out / "report.json")
    assert [(c.arm, c.whole, c.pruned) for c in report.corners] == [
        ("float baseline", None, False),
        ("float candidate", "float baseline", True),
        ("baseline", None, False),
        ("candidate", "baseline", True),
        ("paper", "float baseline", True),
        ("paper-int8", "baseline", True),
    ]
    assert all(corner.perplexity and corner.other_perplexity for corner in report.corners)
    assert report.healing is not None
    assert (report.healing.training is None) == bool(quick)
    assert {deletion.replacement for deletion in report.plan} == {"none"}
    assert {d.replacement for d in PruningPlan.read(out / "paper-plan.json").deletions} == {"none"}
    assert str(out / "report.html") in done.stdout
