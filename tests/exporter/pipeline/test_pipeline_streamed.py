"""`depthcut export --stream`: the same road with weights that never come into memory together."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from test_pipeline import RESULTS, SHIPPED, _request, checkpoint, own_cache

from exporter.artifacts import ImportanceReport, PruneReport
from exporter.choose.budgets.budget import Budget
from exporter.choose.selection.search_options import SearchOptions
from exporter.errors import (
    UsageError,
)
from exporter.files import sha256_file
from exporter.heal.options import HealOptions
from exporter.models.loading.sources import SourceOptions
from exporter.pipeline.request import DropRequest
from tests.raising import raises
from tests.reading import in_file, names_in

pytestmark = pytest.mark.torch

__all__ = ["checkpoint", "own_cache"]  # fixtures
SHORT = ("--samples", "4", "--sequence-length", "16", "batch_size: 2", "--drop-attn", "1")


@dataclass(frozen=True)
class Done:
    exit_code: int
    stdout: str
    stderr: str


def run(checkpoint: Path, out: Path, *options: str) -> Done:
    from exporter import cli

    text = out.with_name("text.txt")
    text.write_text("w1 w2 w3 w5 w8 w13 w21 w34 " * 20)
    given = ["--stream", "--calibration", str(text), *SHORT, *options]
    arguments = ["export", str(checkpoint), "-o", str(out), *in_file(out.parent, given)]
    with (
        contextlib.redirect_stdout(io.StringIO()) as result,
        contextlib.redirect_stderr(io.StringIO()) as errors,
    ):
        code = cli.run(arguments)
    return Done(code, result.getvalue(), errors.getvalue())


@pytest.fixture(scope="module")
def walked(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("streamed") / "out"
    return out, run(checkpoint, out, "--no-measure", "--checkpoint")


@pytest.mark.long
def test_it_writes_both_models_and_no_report(walked: Any) -> None:
    out, done = walked
    assert done.exit_code == 0, done.stderr
    assert "million parameters, not compared" in done.stdout
    names = {path.name for path in out.iterdir()}
    assert (out / "candidate" / "hf" / "README.md").is_file()
    assert "candidate against the checkpoint, decode, logits: holds" in done.stderr
    assert names == {name for name in RESULTS if not name.startswith("report")} | {".depthcut"}
    for arm in ("baseline", "candidate"):
        assert {*names_in(out / arm)} >= SHIPPED
    assert len(ImportanceReport.read(out / "importance.json").scores) == 3 * 3
    assert PruneReport.read(out / "prune.json").verification.passed


@pytest.mark.long
def test_both_are_held_against_pytorch(walked: Any) -> None:
    stderr = walked[1].stderr
    assert "baseline against PyTorch, decode, logits: holds" in stderr
    assert (
        "candidate against PyTorch with the same modules skipped, decode, logits: holds" in stderr
    )


@pytest.mark.parametrize(
    ("changes", "code", "told"),
    [
        ({"heal": HealOptions()}, "needs-whole-model", ("--heal",)),
        ({"search": SearchOptions(search="greedy")}, "needs-whole-model", ("--search greedy",)),
        ({"exporter": "optimum"}, "needs-whole-model", ("--exporter optimum",)),
        ({"load": SourceOptions(trust_remote_code=True)}, "", ("--trust-remote-code",)),
    ],
)
def test_what_needs_the_whole_model_is_refused(
    checkpoint: Path, tmp_path: Path, changes: dict[str, Any], code: str, told: tuple[str, ...]
) -> None:
    from exporter.pipeline.road import export_model

    with raises(UsageError, code, *told):
        export_model(_request(checkpoint, tmp_path / "out", stream=True, **changes))
    assert not (tmp_path / "out").exists()


def test_a_comparison_without_memory_for_it_is_refused_at_once(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exporter.pipeline.streaming.available_bytes", lambda: 10_000)
    done = run(checkpoint, tmp_path / "out")
    assert done.exit_code == 2
    assert "1e-05 GB" in done.stderr
    assert "--no-measure" in done.stderr
    assert not (tmp_path / "out").exists()


def test_bfloat16_without_memory_for_its_check_is_refused_at_once(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exporter.pipeline.streaming.available_bytes", lambda: 10_000)
    done = run(checkpoint, tmp_path / "out", "--no-measure", "--dtype", "bfloat16")
    assert done.exit_code == 2
    assert "float32" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_a_report_of_other_models_goes(walked: Any, checkpoint: Path) -> None:
    """The last one: it changes the folder."""
    from exporter.pipeline.road import write_models

    out = walked[0]
    stages = out / ".depthcut" / "stages.json"
    ledger = json.loads(stages.read_text())
    for name in ("report.json", "report.md"):
        (out / name).write_text("{}")
        ledger["published"][name] = sha256_file(out / name)
    files = {name: ledger["published"][name] for name in ("report.json", "report.md")}
    ledger["stages"]["measure"] = {"key": "of other models", "files": files, "notes": None}
    stages.write_text(json.dumps(ledger))
    (out / "report.md").write_text("edited by hand")
    request = _request(
        checkpoint, out, stream=True, compared=False, drops=DropRequest(Budget(attention=1))
    )
    write_models(request)
    assert not (out / "report.json").exists()
    assert (out / "report.md").read_text() == "edited by hand"
    assert (out / "candidate" / "model.onnx").exists()
