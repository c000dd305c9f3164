"""`depthcut export --stream`: the same road with weights that never come into memory together."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_pipeline import RESULTS, SHIPPED, _request, checkpoint, own_cache
from written_files import names_in

from exporter.artifacts import ImportanceReport, PruneReport
from exporter.choose.budgets.budget import Budget
from exporter.choose.selection.search_options import SearchOptions
from exporter.errors import (
    ExportError,
    TooLittleMemoryError,
    UsageError,
    VerificationError,
)
from exporter.files import sha256_file
from exporter.heal.options import HealOptions
from exporter.models.loading.sources import SourceOptions
from exporter.pipeline.request import DropRequest
from exporter.pipeline.streaming import going_on
from tests.raising import raises

pytestmark = pytest.mark.torch

__all__ = ["checkpoint", "own_cache"]  # fixtures
SHORT = ("--samples", "4", "--sequence-length", "16", "--batch-size", "2", "--drop-attn", "1")


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
    arguments = ["export", str(checkpoint), "-o", str(out), *given]
    with (
        contextlib.redirect_stdout(io.StringIO()) as told,
        contextlib.redirect_stderr(io.StringIO()) as errors,
    ):
        code = cli.run(arguments)
    return Done(code, told.getvalue(), errors.getvalue())


@pytest.fixture(scope="module")
def walked(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run that is stopped after the baseline is written, and the next one, which goes on."""
    from exporter.errors import ModelSourceError
    from exporter.export import parity
    from exporter.models.loading.checkpoint_shards import CheckpointShards

    out = tmp_path_factory.mktemp("streamed") / "out"
    read: list[str] = []
    real = CheckpointShards.read

    def reading(shards: CheckpointShards, name: str, stop: Any = None) -> Any:
        read.append(name)
        return real(shards, name, stop)

    def fails(*_: Any, **__: Any) -> Any:
        raise ModelSourceError("stopped by the test")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointShards, "read", reading)
        with patch.context() as stopped:
            stopped.setattr(parity, "check_export", fails)
            first = run(checkpoint, out, "--no-measure")
        kept = [path.name for path in (out / ".depthcut" / "unfinished" / "baseline").iterdir()]
        before = len(read)
        second = run(checkpoint, out, "--no-measure", "--checkpoint")
    return out, first, kept, second, read[:before], read[before:]


@pytest.mark.long
def test_it_writes_both_models_and_no_report(walked: Any) -> None:
    out, _, _, second, *_ = walked
    assert second.exit_code == 0, second.stderr
    assert "million parameters, not compared" in second.stdout
    found = {path.name for path in out.iterdir()}
    assert (out / "candidate" / "hf" / "README.md").is_file()
    assert "candidate against the checkpoint, decode, logits: holds" in second.stderr
    assert found == {name for name in RESULTS if not name.startswith("report")} | {".depthcut"}
    for arm in ("baseline", "candidate"):
        assert {*names_in(out / arm)} >= SHIPPED
    assert len(ImportanceReport.read(out / "importance.json").scores) == 3 * 3
    assert PruneReport.read(out / "prune.json").verification.passed


@pytest.mark.long
def test_both_are_held_against_pytorch(walked: Any) -> None:
    told = walked[3].stderr
    assert "baseline against PyTorch, decode, logits: holds" in told
    assert "candidate against PyTorch with the same modules skipped, decode, logits: holds" in told


@pytest.mark.long
def test_what_was_written_before_the_failure_is_not_read_again(walked: Any) -> None:
    out, first, kept, _, before, after = walked
    assert first.exit_code == 2
    assert "stopped by the test" in first.stderr
    assert sorted(kept) == ["model.onnx.data", "written.json"]
    once, twice = before.count("lm_head.weight"), after.count("lm_head.weight")
    # The first wrote it; the second ran it, in two steps for each model and the checkpoint, and
    # for the checkpoint before and after the cut, and copied it there.
    assert (once, twice) == (1, 6 + 3)
    assert not (out / ".depthcut" / "unfinished").exists()


@pytest.mark.parametrize(
    ("error", "kept"),
    [
        (VerificationError("wrong"), False),
        (ExportError("wrong"), False),
        (TooLittleMemoryError("can't tell"), True),
        (KeyboardInterrupt(), True),
    ],
)
def test_what_a_check_found_wrong_is_written_again(
    tmp_path: Path, error: BaseException, kept: bool
) -> None:
    run: Any = SimpleNamespace(request=SimpleNamespace(stream=True, out=tmp_path))
    data = tmp_path / "stage" / "model.onnx.data"
    data.parent.mkdir()

    def checked() -> None:
        with going_on(run, "baseline", {}, data.parent) as unfinished:
            assert unfinished is not None
            with unfinished.writer(data, ()):
                pass
            raise error

    with pytest.raises(type(error)):
        checked()
    assert (tmp_path / ".depthcut" / "unfinished" / "baseline" / data.name).exists() is kept


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
