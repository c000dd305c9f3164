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
from exporter.cut.options import CutOptions
from exporter.cut.surgery import prune_file
from exporter.errors import (
    MissingDependencyError,
    OnnxFileError,
    SurgeryError,
    UnsafeInputError,
)
from graph_passes.files import exchange as exchanging
from graph_passes.files import record, storage
from graph_passes.files.storage import data_files, load_model, save_model
from tests.exporter.cut_models import PLAN, content, source
from tests.raising import raises
from tests.reading import all_data_of, data_of, names_in
from tests.tiny_graphs import tiny_model

__all__ = ["source"]  # a fixture


@pytest.mark.parametrize("name", ["x.onnx.data", "x.onnx.0123456789abcdef.data"])
def test_a_source_named_like_the_targets_data_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    source = tmp_path / name  # weights inline, so no data file of its own
    save_model(tiny_model(), source)
    before = source.read_bytes()
    monkeypatch.setattr(storage, "_INLINE_BYTES", 32)
    for plan in (PLAN, PLAN[:1]):
        prune_file(source, tmp_path / "x.onnx", plan)
    assert source.read_bytes() == before
    assert len(data_files(load_model(tmp_path / "x.onnx"))) == 1


def test_the_report_and_the_weights_each_have_a_file(source: Path, tmp_path: Path) -> None:
    """A report may have any name: that of the weights says what is in them."""
    target, report_path = tmp_path / "o" / "m.onnx", tmp_path / "o" / "m.onnx.data"
    for plan in (PLAN, PLAN[:1]):
        report = prune_file(source, target, plan, CutOptions(report_path=report_path))
        assert PruneReport.read(report_path) == report
        assert names_in(target.parent) == ["USE.md", "m.onnx", "m.onnx.*.data", "m.onnx.data"]


def test_the_report_can_not_stand_in_for_the_result(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "o" / "m.onnx"
    with raises(SurgeryError, "same-file"):
        prune_file(source, target, PLAN, CutOptions(report_path=target))
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("name", [".", "..", "folder", "folder/"])
def test_a_folder_can_not_be_the_target(source: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    with raises(SurgeryError, "is-a-folder"):
        prune_file(
            source, Path(name) if name == "." else tmp_path / name, PLAN, CutOptions(verify="none")
        )


def test_data_that_another_model_shares_stays(source: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "o" / "b.onnx", tmp_path / "o" / "c.onnx"
    prune_file(source, first, PLAN[:1], CutOptions(verify="none"))
    shared, report_path = data_of(first), tmp_path / "c.json"
    prune_file(
        first, second, PLAN[1:], CutOptions(weights="share", verify="none", report_path=report_path)
    )
    before = content(tmp_path)
    for weights in ("compact", "share"):
        with raises(OnnxFileError, "weights-in-use"):
            prune_file(
                source, shared, PLAN, CutOptions(weights=weights, report_path=tmp_path / "b.json")
            )
    assert content(tmp_path) == before
    prune_file(source, first, PLAN, CutOptions(verify="none"))
    assert data_files(load_model(second)) == [shared]
    assert shared.read_bytes() == before[f"o/{shared.name}"]
    assert data_files(load_model(first)) == [file for file in all_data_of(first) if file != shared]
    second.unlink()
    prune_file(source, first, PLAN[:1], CutOptions(verify="none"))
    prune_file(source, first, PLAN, CutOptions(verify="none"))
    assert shared.name not in content(tmp_path / "o")


def test_the_data_of_an_earlier_result_goes_when_weights_are_shared(source: Path) -> None:
    target = source.with_name("pruned.onnx")
    prune_file(source, target, PLAN, CutOptions(verify="none"))
    data = data_of(target)
    prune_file(source, target, PLAN, CutOptions(weights="share", verify="none"))
    assert not data.exists()
    assert load_model(target)


@pytest.mark.parametrize("reader", ["other", "none", "itself"])
def test_data_that_is_needed_or_foreign_stays(source: Path, reader: str) -> None:
    target = source.with_name("pruned.onnx")
    prune_file(source, target, PLAN, CutOptions(verify="none"))
    data = data_of(target)
    start = source
    if reader == "other":
        shutil.copy(target, source.with_name("copy.onnx"))
    elif reader == "none":
        target.unlink()
    else:
        start = source.with_name("copy.onnx")
        target.rename(start)
    plan = PLAN if start == source else [PlannedDeletion(layer=0, kind="mlp")]
    prune_file(start, target, plan, CutOptions(weights="share", verify="none"))
    assert data.exists()


def test_a_failed_move_brings_all_back_from_two_file_systems(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, report_path = source.with_name("m.onnx"), tmp_path / "reports" / "r.json"
    prune_file(source, target, PLAN, CutOptions(verify="none", report_path=report_path))
    before = content(tmp_path)
    rename, exchange = Path.rename, exchanging._exchange

    def one_system(one: Path, other: Path) -> None:
        if one.is_relative_to(source.parent) != Path(other).is_relative_to(source.parent):
            raise OSError(errno.EXDEV, "Invalid cross-device link")

    def renamed(self: Path, final: Path) -> Path:
        one_system(self, final)
        return rename(self, final)

    def exchanged(one: Path, other: Path) -> None:
        one_system(one, other)
        exchange(one, other)

    def interrupted(_folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", renamed)
    monkeypatch.setattr(exchanging, "_exchange", exchanged)
    monkeypatch.setattr(record, "sync_folders", interrupted)  # after the last move
    for weights in ("compact", "share"):
        with pytest.raises(KeyboardInterrupt):
            prune_file(
                source,
                target,
                PLAN[:1],
                CutOptions(weights=weights, verify="none", report_path=report_path),
            )
        assert content(tmp_path) == before


def test_one_failing_step_back_does_not_stop_the_others(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "o" / "m.onnx"
    prune_file(source, target, PLAN, CutOptions(verify="none"))
    before = content(target.parent)
    exchange, taken_back = exchanging._exchange, record.take_back

    def fails(staged: Path, final: Path) -> None:
        if final.name == target.name:
            raise OSError(errno.EIO, "Input/output error")
        exchange(staged, final)

    def fails_once(staged: Path, final: Path, **options: Any) -> None:
        taken_back(staged, final, **options)
        if final.name == "prune.json":
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(exchanging, "_exchange", fails)
    monkeypatch.setattr(record, "take_back", fails_once)
    with raises(OnnxFileError, "write-failed", "Input/output error"):
        prune_file(source, target, PLAN[:1], CutOptions(verify="none"))
    assert content(target.parent) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_failure_while_folders_are_made_leaves_none(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    mkdir = Path.mkdir

    def interrupted(self: Path, *arguments: Any, **options: Any) -> None:
        mkdir(self, *arguments, **options)
        if self.name == "new" and ".depthcut" in self.parts:
            raise error

    monkeypatch.setattr(Path, "mkdir", interrupted)
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else OnnxFileError):
        prune_file(source, tmp_path / "new" / "deep" / "m.onnx", PLAN, CutOptions(verify="none"))
    assert not (tmp_path / "new").exists()


def test_a_name_that_is_too_long_leaves_no_folder(source: Path, tmp_path: Path) -> None:
    with raises(OnnxFileError, "write-failed"):
        prune_file(
            source, tmp_path / "new" / ("x" * 300) / "m.onnx", PLAN, CutOptions(verify="none")
        )
    assert not (tmp_path / "new").exists()


def test_a_second_cut_in_a_folder_has_a_report_of_its_own(source: Path, tmp_path: Path) -> None:
    folder, second = tmp_path / "o", tmp_path / "o" / "second.onnx"
    prune_file(source, folder / "first.onnx", PLAN, CutOptions(verify="none"))
    prune_file(source, folder / "first.onnx", PLAN[:1], CutOptions(verify="none"))  # replaced
    before = (folder / "prune.json").read_bytes()
    prune_file(source, second, PLAN, CutOptions(verify="none"))
    assert (folder / "prune.json").read_bytes() == before
    assert PruneReport.read(folder / "second.onnx.prune.json").target == "second.onnx"
    (folder / "first.onnx").unlink()
    prune_file(source, second, PLAN, CutOptions(verify="none"))  # the usual place is free now
    assert PruneReport.read(folder / "prune.json").target == "second.onnx"
    assert not (folder / "second.onnx.prune.json").exists()


def test_config_and_tokenizer_go_with_a_cut_unless_told_not_to(
    source: Path, tmp_path: Path
) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer.py", "report.json"):
        source.with_name(name).write_text("{}")
    for copied, folder in ((True, tmp_path / "o"), (False, tmp_path / "bare")):
        options = CutOptions(
            verify="none", companions=copied, report_path=folder / "tokenizer.json"
        )
        prune_file(source, folder / "m.onnx", PLAN, options)
        there = names_in(folder)
        wanted = ["USE.md", "config.json"] if copied else []
        assert there == [*wanted, "m.onnx", "m.onnx.*.data", "tokenizer.json"]
        assert PruneReport.read(folder / "tokenizer.json").target == "m.onnx"


def test_a_cut_that_fails_leaves_no_config(source: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    source.with_name("config.json").write_text("{}")
    source.with_name("vocab.txt").symlink_to(tmp_path / "secret")
    with raises(UnsafeInputError):
        prune_file(source, tmp_path / "o" / "m.onnx", PLAN, CutOptions(verify="none"))
    assert not (tmp_path / "o").exists()


def test_a_prune_json_of_someone_else_is_not_overwritten(source: Path, tmp_path: Path) -> None:
    other = tmp_path / "o" / "prune.json"
    other.parent.mkdir()
    other.write_text('{"trees": 3}')
    with raises(SurgeryError, "not-a-report"):
        prune_file(source, tmp_path / "o" / "m.onnx", PLAN, CutOptions(verify="none"))
    assert content(other.parent) == {"prune.json": b'{"trees": 3}'}


def test_the_report_of_an_earlier_version_may_be_replaced(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "o" / "m.onnx"
    prune_file(source, target, PLAN, CutOptions(verify="none"))
    report = json.loads(target.with_name("prune.json").read_text())
    del report["target"]
    target.with_name("prune.json").write_text(json.dumps(report))
    prune_file(source, target.with_name("n.onnx"), PLAN, CutOptions(verify="none"))


def test_the_command_takes_a_place_for_the_report(source: Path, tmp_path: Path) -> None:
    target, report_path = tmp_path / "o" / "m.onnx", tmp_path / "reports" / "cut.json"
    call = ["prune", str(source), "-o", str(target), "--drop", "mlp:1", "--verify", "none"]
    assert command_line.run([*call, "--report", str(report_path)]) == 0
    assert PruneReport.read(report_path).target == "m.onnx"
    assert names_in(target.parent) == ["USE.md", "m.onnx", "m.onnx.*.data"]


@pytest.mark.parametrize(("name", "code"), [("m.onnx.data", 0), ("m.onnx", 2)])
def test_the_plan_is_not_overwritten(source: Path, tmp_path: Path, name: str, code: int) -> None:
    plan = tmp_path / name
    plan.write_text(PruningPlan(deletions=PLAN).to_json())
    before = plan.read_bytes()
    call = ["prune", str(source), "-o", str(tmp_path / "m.onnx"), "--plan", str(plan)]
    assert command_line.run([*call, "--verify", "none"]) == code
    assert plan.read_bytes() == before


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
    with raises(MissingDependencyError, "", "--verify none"):
        prune_file(tmp_path / "not_there.onnx", tmp_path / "m.onnx", PLAN)


def test_a_place_that_is_asked_for_may_hold_a_report_but_nothing_else(
    source: Path, tmp_path: Path
) -> None:
    target, other = tmp_path / "o" / "m.onnx", tmp_path / "other.onnx"
    other.write_bytes(b"precious")
    with raises(SurgeryError, "not-a-report"):
        prune_file(source, target, PLAN, CutOptions(verify="none", report_path=other))
    assert other.read_bytes() == b"precious"
    assert not target.exists()
    for _ in range(2):
        prune_file(source, target, PLAN, CutOptions(verify="none", report_path=tmp_path / "r.json"))


def test_the_note_of_a_form_counts_what_is_left(source: Path, tmp_path: Path) -> None:
    model = load_model(source)
    softmaxes = sum(node.op_type == "Softmax" for node in model.graph)
    record = FormRecord(target="portable", writer="torch", fused={"Softmax": softmaxes, "Gelu": 1})
    model.metadata_props[FORM_KEY] = record.model_dump_json()
    save_model(model, tmp_path / "noted.onnx")
    prune_file(tmp_path / "noted.onnx", tmp_path / "cut.onnx", PLAN, CutOptions(verify="none"))
    noted = load_model(tmp_path / "cut.onnx").metadata_props[FORM_KEY]
    left = record.model_copy(update={"fused": {"Softmax": softmaxes - 2}})
    assert FormRecord.model_validate_json(noted) == left


@pytest.mark.parametrize("note", [None, "of another kind"])
def test_no_note_of_a_form_is_made_up(source: Path, tmp_path: Path, note: str | None) -> None:
    model = load_model(source)
    if note is not None:
        model.metadata_props[FORM_KEY] = note
    save_model(model, tmp_path / "noted.onnx")
    prune_file(tmp_path / "noted.onnx", tmp_path / "cut.onnx", PLAN, CutOptions(verify="none"))
    assert load_model(tmp_path / "cut.onnx").metadata_props.get(FORM_KEY) == note
