"""The demo runs on a tiny model: two cuts and the whole model, in float and int8, in one table."""

from __future__ import annotations

from pathlib import Path

import pytest

from exporter.artifacts import ComparisonReport, PruningPlan
from exporter.cli import cli
from exporter.cli.command import SchemaCommand
from exporter.cli.export import ExportCall
from tests.samples.running import SAMPLES, run_sample

SAMPLE = SAMPLES / "01_quickstart" / "run.sh"
SMALL = [
    *("--drop-attn", "1", "--threads", "1", "--samples", "24", "--sequence-length", "16"),
    *("--prefill", "8", "--rounds", "2", "--eval-tokens", "1024"),
]


def _asked(config: str) -> ExportCall:
    command = cli.get_command(None, "export")
    assert isinstance(command, SchemaCommand)
    call = command.read(["MODEL", "-o", "out", "--config", str(SAMPLE.with_name(config))])
    assert isinstance(call, ExportCall)
    return call


def test_the_quick_demo_asks_for_the_same_cut_and_trains_nothing() -> None:
    full, quick = _asked("plan.yaml").request, _asked("quick.yaml").request
    assert quick.drops == full.drops
    assert quick.quantize == full.quantize
    assert (full.heal.kind, quick.heal.kind) == ("distill", "fold")
    assert quick.heal.calibration == full.heal.calibration


@pytest.mark.parametrize("config", ["plan.yaml", "quick.yaml"])
def test_the_demo_judges_on_sixteen_windows(config: str) -> None:
    options = _asked(config).request.compare
    assert options.eval_tokens >= 16 * options.eval_sequence_length
    assert options.timing.reload or config == "quick.yaml"


@pytest.mark.torch
@pytest.mark.genai
def test_the_demo_puts_both_cuts_of_one_size_in_one_table(tmp_path: Path) -> None:
    from tests.text_graphs import write_llama_folder

    write_llama_folder(tmp_path / "model")
    out = tmp_path / "out"
    done = run_sample(
        tmp_path, "01_quickstart/run.sh", out, *SMALL,
        MODEL=str(tmp_path / "model"), XDG_CACHE_HOME=str(tmp_path / "cache"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = ComparisonReport.read(out / "report.json")
    assert [(c.arm, c.whole, c.pruned) for c in report.corners] == [
        ("float baseline", None, False),
        ("float candidate", "float baseline", True),
        ("baseline", None, False),
        ("candidate", "baseline", True),
        ("cut-bare", "float baseline", True),
        ("paper-bare", "float baseline", True),
    ]
    for corner in report.corners:
        if corner.whole is not None:
            assert corner.log_perplexity_increase is not None
            assert corner.other_log_perplexity_increase is not None
            assert corner.over_whole.keys() == corner.verdicts.keys() != set()
    assert all(corner.perplexity and corner.other_perplexity for corner in report.corners)
    assert report.healing is not None
    assert report.healing.training is not None
    assert {deletion.replacement for deletion in report.plan} == {"none"}
    plans = [PruningPlan.read(out / name) for name in ("plan.json", "paper-plan.json")]
    assert [len(plan.deletions) for plan in plans] == [1, 1]
    assert str(out / "report.html") in done.stdout
