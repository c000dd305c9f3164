"""The files that the surgery writes: what they may replace, and what a failure leaves behind."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import exporter.cli as command_line
from exporter.artifacts import (
    FORM_KEY,
    FormRecord,
    PlannedDeletion,
    PruneReport,
    PruningPlan,
)
from exporter.errors import MissingDependencyError, OnnxFileError, SurgeryError
from exporter.surgery import prune_file
from graph_passes.files import placing, storage
from graph_passes.files.storage import load_model, save_model
from graph_passes.tiny_graphs import TinySpec, tiny_model

PLAN = [PlannedDeletion(layer=1, kind="attention"), PlannedDeletion(layer=2, kind="block")]


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(storage, "_INLINE_BYTES", 32)  # tiny weights go to the data file too
    path = tmp_path / "source" / "model.onnx"
    save_model(tiny_model(TinySpec(tied=True)), path)
    return path


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_source_named_like_the_targets_data_is_not_overwritten(tmp_path: Path) -> None:
    source = tmp_path / "x.onnx.data"  # weights inline, so no data file of its own
    save_model(tiny_model(), source)
    before = content(tmp_path)
    with pytest.raises(SurgeryError, match="never changed"):
        prune_file(source, tmp_path / "x.onnx", PLAN)
    assert content(tmp_path) == before


def test_the_report_can_not_stand_in_for_the_weights(source: Path, tmp_path: Path) -> None:
    report_path = tmp_path / "o" / "m.onnx.data"
    with pytest.raises(SurgeryError, match="a file each"):
        prune_file(source, tmp_path / "o" / "m.onnx", PLAN, report_path=report_path)
    prune_file(source, source.with_name("m.onnx"), PLAN, weights="share", verify="none")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("name", [".", "..", "folder", "folder/"])
def test_a_folder_can_not_be_the_target(source: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(SurgeryError, match="is a folder"):
        prune_file(source, Path(name) if name == "." else tmp_path / name, PLAN, verify="none")


def test_data_that_another_model_shares_is_not_overwritten(source: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "o" / "b.onnx", tmp_path / "o" / "c.onnx"
    prune_file(source, first, PLAN[:1], verify="none")
    report_path = tmp_path / "c.json"
    prune_file(first, second, PLAN[1:], weights="share", verify="none", report_path=report_path)
    before = content(tmp_path)
    for weights in ("compact", "share"):
        with pytest.raises(OnnxFileError, match=r"holds weights of [bc]\.onnx"):
            prune_file(
                source,
                tmp_path / "o" / "b.onnx.data",
                PLAN,
                weights=weights,
                report_path=tmp_path / "b.json",
            )
    with pytest.raises(OnnxFileError, match=r"holds weights of c\.onnx"):
        prune_file(source, first, PLAN, verify="none")
    assert content(tmp_path) == before
    second.unlink()
    prune_file(source, first, PLAN, verify="none")


def test_the_data_of_an_earlier_result_goes_when_weights_are_shared(source: Path) -> None:
    target = source.with_name("pruned.onnx")
    data = source.with_name("pruned.onnx.data")
    prune_file(source, target, PLAN, verify="none")
    assert data.exists()
    prune_file(source, target, PLAN, weights="share", verify="none")
    assert not data.exists()
    assert load_model(target)


@pytest.mark.parametrize("reader", ["other", "none", "itself"])
def test_data_that_is_needed_or_foreign_stays(source: Path, reader: str) -> None:
    target, data = source.with_name("pruned.onnx"), source.with_name("pruned.onnx.data")
    prune_file(source, target, PLAN, verify="none")
    start = source
    if reader == "other":
        shutil.copy(target, source.with_name("copy.onnx"))
    elif reader == "none":
        target.unlink()
    else:
        start = source.with_name("copy.onnx")
        target.rename(start)
    plan = PLAN if start == source else [PlannedDeletion(layer=0, kind="mlp")]
    prune_file(start, target, plan, weights="share", verify="none")
    assert data.exists()


def test_a_failed_move_brings_all_back_from_two_file_systems(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, report_path = source.with_name("m.onnx"), tmp_path / "reports" / "r.json"
    prune_file(source, target, PLAN, verify="none", report_path=report_path)
    before = content(tmp_path)
    replace, sync = Path.replace, placing._sync

    def within_one_folder(self: Path, final: Path) -> Path:
        if self.is_relative_to(source.parent) != Path(final).is_relative_to(source.parent):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return replace(self, final)

    def interrupted(path: Path) -> None:
        if path.is_dir():
            raise KeyboardInterrupt
        sync(path)

    monkeypatch.setattr(Path, "replace", within_one_folder)
    monkeypatch.setattr(placing, "_sync", interrupted)  # after the last move
    for weights in ("compact", "share"):
        with pytest.raises(KeyboardInterrupt):
            prune_file(
                source, target, PLAN[:1], weights=weights, verify="none",
                report_path=report_path,
            )  # fmt: skip
        assert content(tmp_path) == before


def test_one_failing_step_back_does_not_stop_the_others(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "o" / "m.onnx"
    prune_file(source, target, PLAN, verify="none")
    before = content(target.parent)
    replace = Path.replace

    def fails(self: Path, final: Path) -> Path:
        if Path(final).name == "prune.json":
            raise OSError(errno.EIO, "Input/output error")
        return replace(self, final)

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(OnnxFileError, match="Input/output error"):
        prune_file(source, target, PLAN[:1], verify="none")
    assert content(target.parent) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_failure_while_folders_are_made_leaves_none(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    mkdir = Path.mkdir

    def interrupted(self: Path, *arguments: Any, **options: Any) -> None:
        mkdir(self, *arguments, **options)
        if self.name.endswith(".part"):
            raise error

    monkeypatch.setattr(Path, "mkdir", interrupted)
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else OnnxFileError):
        prune_file(source, tmp_path / "new" / "deep" / "m.onnx", PLAN, verify="none")
    assert not (tmp_path / "new").exists()


def test_a_name_that_is_too_long_leaves_no_folder(source: Path, tmp_path: Path) -> None:
    with pytest.raises(OnnxFileError, match="can't be written"):
        prune_file(source, tmp_path / "new" / ("x" * 300) / "m.onnx", PLAN, verify="none")
    assert not (tmp_path / "new").exists()


def test_another_models_report_is_not_overwritten(source: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "o" / "first.onnx", tmp_path / "o" / "second.onnx"
    prune_file(source, first, PLAN, verify="none")
    prune_file(source, first, PLAN[:1], verify="none")  # its own may be
    before = content(tmp_path)
    with pytest.raises(SurgeryError, match=r"is the report of first\.onnx.*--report"):
        prune_file(source, second, PLAN, verify="none")
    assert content(tmp_path) == before
    prune_file(source, second, PLAN, verify="none", report_path=tmp_path / "o" / "second.json")
    assert PruneReport.read(tmp_path / "o" / "second.json").target == "second.onnx"
    first.unlink()
    prune_file(source, second, PLAN, verify="none")
    assert PruneReport.read(tmp_path / "o" / "prune.json").target == "second.onnx"


def test_a_prune_json_of_someone_else_is_not_overwritten(source: Path, tmp_path: Path) -> None:
    other = tmp_path / "o" / "prune.json"
    other.parent.mkdir()
    other.write_text('{"trees": 3}')
    with pytest.raises(SurgeryError, match="no report of a cut"):
        prune_file(source, tmp_path / "o" / "m.onnx", PLAN, verify="none")
    assert content(other.parent) == {"prune.json": b'{"trees": 3}'}


def test_the_report_of_an_earlier_version_may_be_replaced(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "o" / "m.onnx"
    prune_file(source, target, PLAN, verify="none")
    report = json.loads(target.with_name("prune.json").read_text())
    del report["target"]
    target.with_name("prune.json").write_text(json.dumps(report))
    prune_file(source, target.with_name("n.onnx"), PLAN, verify="none")


def test_the_command_takes_a_place_for_the_report(source: Path, tmp_path: Path) -> None:
    target, report_path = tmp_path / "o" / "m.onnx", tmp_path / "reports" / "cut.json"
    call = ["prune", str(source), "-o", str(target), "--drop", "mlp:1", "--verify", "none"]
    assert command_line.run([*call, "--report", str(report_path)]) == 0
    assert PruneReport.read(report_path).target == "m.onnx"
    assert sorted(content(target.parent)) == ["m.onnx", "m.onnx.data"]


def test_the_plan_is_not_overwritten_by_the_weights(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "m.onnx.data"
    plan.write_text(PruningPlan(deletions=PLAN).to_json())
    before = plan.read_bytes()
    call = ["prune", str(source), "-o", str(tmp_path / "m.onnx"), "--plan", str(plan)]
    assert command_line.run([*call, "--verify", "none"]) == 2
    assert "is an input" in capsys.readouterr().err
    assert plan.read_bytes() == before


def test_nothing_left_to_delete_is_told_in_the_plural(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    once, again = tmp_path / "once.onnx", tmp_path / "o" / "again.onnx"
    for given, made in ((source, once), (once, again)):
        call = ["prune", str(given), "-o", str(made), "--drop", "mlp:1", "--verify", "none"]
        assert command_line.run(call) == 0
    told = capsys.readouterr().out
    assert "1 sublayer deleted" in told
    assert "0 sublayers deleted" in told


_WITHOUT_RUNTIME = """
import sys
from pathlib import Path
sys.modules["onnxruntime"] = None
import exporter.cli
sys.exit(exporter.cli.run(sys.argv[1:]))
"""


@pytest.mark.parametrize("verify", ["oracle", "none"])
def test_without_onnx_runtime_the_way_out_is_told_first(
    source: Path, tmp_path: Path, verify: str
) -> None:
    call = ["prune", str(source), "-o", str(tmp_path / "o" / "m.onnx"), "--drop", "mlp:1"]
    command = [sys.executable, "-c", _WITHOUT_RUNTIME, *call, "--verify", verify]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ran.returncode == 0) == (verify == "none"), ran.stderr
    assert ("--verify none" in ran.stderr) == (verify == "oracle")
    assert (tmp_path / "o").exists() == (verify == "none")


def test_a_missing_runtime_is_told_before_the_source_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match="--verify none"):
        prune_file(tmp_path / "not_there.onnx", tmp_path / "m.onnx", PLAN)


def test_a_place_that_is_asked_for_may_hold_a_report_but_nothing_else(
    source: Path, tmp_path: Path
) -> None:
    target, other = tmp_path / "o" / "m.onnx", tmp_path / "other.onnx"
    other.write_bytes(b"precious")
    with pytest.raises(SurgeryError, match="is no report of a cut"):
        prune_file(source, target, PLAN, verify="none", report_path=other)
    assert other.read_bytes() == b"precious"
    assert not target.exists()
    for _ in range(2):
        prune_file(source, target, PLAN, verify="none", report_path=tmp_path / "r.json")


def test_the_note_of_a_form_counts_what_is_left(source: Path, tmp_path: Path) -> None:
    model = load_model(source)
    softmaxes = sum(node.op_type == "Softmax" for node in model.graph)
    record = FormRecord(target="portable", writer="torch", fused={"Softmax": softmaxes, "Gelu": 1})
    model.metadata_props[FORM_KEY] = record.model_dump_json()
    save_model(model, tmp_path / "noted.onnx")
    prune_file(tmp_path / "noted.onnx", tmp_path / "cut.onnx", PLAN, verify="none")
    noted = load_model(tmp_path / "cut.onnx").metadata_props[FORM_KEY]
    left = record.model_copy(update={"fused": {"Softmax": softmaxes - 2}})
    assert FormRecord.model_validate_json(noted) == left


@pytest.mark.parametrize("note", [None, "of another kind"])
def test_no_note_of_a_form_is_made_up(source: Path, tmp_path: Path, note: str | None) -> None:
    model = load_model(source)
    if note is not None:
        model.metadata_props[FORM_KEY] = note
    save_model(model, tmp_path / "noted.onnx")
    prune_file(tmp_path / "noted.onnx", tmp_path / "cut.onnx", PLAN, verify="none")
    assert load_model(tmp_path / "cut.onnx").metadata_props.get(FORM_KEY) == note
