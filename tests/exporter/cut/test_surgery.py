"""ONNX file in, ONNX file out: what is written, what it may replace, and what a failure leaves."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest

import exporter.cli as command_line
import graph_passes
from exporter.artifacts import (
    FORM_KEY,
    FormRecord,
    GraphSizeEntry,
    PlannedDeletion,
    PruneReport,
    PruningPlan,
)
from exporter.artifacts.loaded_plan import LoadedPlan
from exporter.cut import surgery
from exporter.cut.options import CutOptions
from exporter.cut.surgery import prune_file
from exporter.errors import (
    MissingDependencyError,
    OnnxFileError,
    SurgeryError,
    UnsafeInputError,
    UsageError,
    VerificationError,
)
from exporter.files import sha256_file, sha256_files
from graph_passes.files import placing, storage
from graph_passes.files.storage import data_files, load_model
from graph_passes.pipeline import graph_size
from tests.raising import raises
from tests.reading import all_data_of, data_of, names_in
from tests.text_graphs import contents
from tests.tiny_graphs import TinySpec, saved, tiny_model

PLAN = [PlannedDeletion(layer=1, kind="attention"), PlannedDeletion(layer=2, kind="block")]
NAMES = ["USE.md", "m.onnx", "m.onnx.*.data"]


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(storage, "_INLINE_BYTES", 32)  # tiny weights go to the data file too
    return saved(tiny_model(TinySpec(tied=True)), tmp_path / "source")


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "o" / "m.onnx"


def cut(source: Path, target: Path, plan: Any = PLAN, **options: Any) -> PruneReport:
    """A cut that isn't verified."""
    return prune_file(source, target, plan, CutOptions(verify="none", **options))


def test_a_file_is_cut_and_the_report_stands_beside_it(source: Path, target: Path) -> None:
    plan = LoadedPlan(PruningPlan(deletions=PLAN), sha256="abc")
    report = prune_file(source, target, plan)
    assert names_in(target.parent) == [*NAMES, "prune.json"]
    assert PruneReport.read(target.parent / "prune.json") == report
    assert [(e.layer, e.kind) for e in report.deleted] == [
        (1, "attention"), (2, "attention"), (2, "mlp"),
    ]  # fmt: skip
    assert report.deleted[0].inputs_removed == ["past_key_values.1.key", "past_key_values.1.value"]
    assert report.made_from == {
        "model": sha256_file(source),
        "weights": sha256_files([data_of(source)], source.parent),
        "plan": "abc",
    }
    assert (report.verification.passed, report.verification.runs) == (True, 2)
    assert "cheaper" not in report.verification.method
    assert report.verification.max_abs_error == pytest.approx(0.0, abs=1e-5)
    written = graph_size(load_model(target))
    assert report.after == GraphSizeEntry.model_validate(asdict(written))
    assert written.bytes == 4 * written.parameters
    assert report.after.parameters < report.before.parameters
    onnx.checker.check_model(str(target), full_check=True)


def test_the_same_cut_gives_the_same_files_and_says_that_nothing_was_verified(
    source: Path, tmp_path: Path
) -> None:
    reports = [cut(source, tmp_path / name / "m.onnx") for name in ("one", "two")]
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert reports[0].verification.model_dump() == {
        "method": "none", "runs": 0, "max_abs_error": None, "tolerance": None, "passed": None,
    }  # fmt: skip


def test_shared_weights_and_renumbered_caches_are_verified_too(source: Path, target: Path) -> None:
    beside = source.with_name("pruned.onnx")
    report = prune_file(source, beside, PLAN, CutOptions(weights="share"))
    assert report.verification.passed
    assert all_data_of(beside) == []
    assert "weights" not in report.made_from
    plan = [PlannedDeletion(layer=0, kind="attention")]
    report = prune_file(source, target, plan, CutOptions(renumber_kv=True))
    assert report.verification.passed
    assert report.kv_renumbering["present.2.value"] == "present.1.value"


def test_outputs_that_are_lost_are_caught(
    source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prune = graph_passes.prune_graph

    def forgetful(model: ir.Model, value: Any, **options: Any) -> Any:
        pruned, report = prune(model, value, **options)
        del pruned.graph.outputs[-1]
        return pruned, report

    monkeypatch.setattr(graph_passes, "prune_graph", forgetful)
    with raises(VerificationError, "other-outputs"):
        prune_file(source, target, PLAN)
    assert not target.parent.exists()


@pytest.mark.parametrize(
    ("place", "kind", "code"),
    [
        ("source/model.onnx", UsageError, "overwrites-input"),
        ("source/../source/model.onnx", UsageError, "overwrites-input"),
        ("source/link.onnx", UsageError, "overwrites-input"),
        ("source/DATA", UsageError, "overwrites-input"),
        ("other/m.onnx", SurgeryError, "not-ours"),
        ("source", SurgeryError, "is-a-folder"),
        ("source/", SurgeryError, "is-a-folder"),
        ("source/..", SurgeryError, "is-a-folder"),
        (".", SurgeryError, "is-a-folder"),
        ("new/" + "x" * 300 + "/m.onnx", OnnxFileError, "write-failed"),
    ],
)
def test_places_that_are_taken_or_none_are_refused(
    place: str, kind: Any, code: str, source: Path, tmp_path: Path
) -> None:
    source.with_name("link.onnx").symlink_to(source.name)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "prune.json").write_bytes(b"precious")
    before = contents(tmp_path)
    target = Path() if place == "." else tmp_path / place.replace("DATA", data_of(source).name)
    with raises(kind, code):
        cut(source, target)
    assert contents(tmp_path) == before
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("moment", ["write_files", "verify_candidate", "place"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interruption_leaves_the_earlier_result_whole(
    source: Path, target: Path, monkeypatch: pytest.MonkeyPatch, moment: str, error: BaseException
) -> None:
    prune_file(source, target, PLAN)
    before = contents(target.parent)
    home = {"write_files": storage, "verify_candidate": surgery, "place": placing}[moment]

    def fails(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(home, moment, fails)
    with pytest.raises(KeyboardInterrupt if error.args == () else OnnxFileError):
        prune_file(source, target, PLAN[:1])
    assert contents(target.parent) == before


@pytest.mark.parametrize("name", ["x.onnx.data", "x.onnx.0123456789abcdef.data"])
def test_a_source_named_like_the_targets_data_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    source = saved(tiny_model(), tmp_path, name)  # weights inline, so no data file of its own
    before = source.read_bytes()
    monkeypatch.setattr(storage, "_INLINE_BYTES", 32)
    for plan in (PLAN, PLAN[:1]):
        cut(source, tmp_path / "x.onnx", plan)
    assert source.read_bytes() == before
    assert len(data_files(load_model(tmp_path / "x.onnx"))) == 1


def test_data_that_another_model_shares_stays(source: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "o" / "b.onnx", tmp_path / "o" / "c.onnx"
    cut(source, first, PLAN[:1])
    shared = data_of(first)
    cut(first, second, PLAN[1:], weights="share")
    before = contents(tmp_path)
    for weights in ("compact", "share"):
        with raises(OnnxFileError, "weights-in-use"):
            cut(source, shared, weights=weights)
    assert contents(tmp_path) == before
    cut(source, first)
    assert data_files(load_model(second)) == [shared]
    assert shared.read_bytes() == before[f"o/{shared.name}"]
    assert data_files(load_model(first)) == [file for file in all_data_of(first) if file != shared]
    second.unlink()
    cut(source, first, PLAN[:1])
    cut(source, first)
    assert shared.name not in contents(tmp_path / "o")


@pytest.mark.parametrize("reader", ["nobody", "other", "none", "itself"])
def test_the_data_of_an_earlier_result_goes_unless_it_is_needed_or_foreign(
    source: Path, reader: str
) -> None:
    target, start, plan = source.with_name("pruned.onnx"), source, PLAN
    cut(source, target)
    data = data_of(target)
    if reader == "other":
        shutil.copy(target, source.with_name("copy.onnx"))
    elif reader == "none":
        target.unlink()
    elif reader == "itself":
        start, plan = source.with_name("copy.onnx"), [PlannedDeletion(layer=0, kind="mlp")]
        target.rename(start)
    cut(start, target, plan, weights="share")
    assert data.exists() == (reader != "nobody")
    assert load_model(target)


def test_a_second_cut_in_a_folder_has_a_report_of_its_own(source: Path, tmp_path: Path) -> None:
    folder, second = tmp_path / "o", tmp_path / "o" / "second.onnx"
    cut(source, folder / "first.onnx")
    cut(source, folder / "first.onnx", PLAN[:1])  # replaced
    before = (folder / "prune.json").read_bytes()
    cut(source, second)
    assert (folder / "prune.json").read_bytes() == before
    assert PruneReport.read(folder / "second.onnx.prune.json").target == "second.onnx"
    (folder / "first.onnx").unlink()
    cut(source, second)  # the usual place is free now
    assert PruneReport.read(folder / "prune.json").target == "second.onnx"
    assert not (folder / "second.onnx.prune.json").exists()


def test_config_and_tokenizer_go_with_a_cut_unless_told_not_to(
    source: Path, tmp_path: Path
) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer.py", "report.json"):
        source.with_name(name).write_text("{}")
    for copied, folder in ((True, tmp_path / "o"), (False, tmp_path / "bare")):
        cut(source, folder / "m.onnx", companions=copied)
        wanted = ["USE.md", "config.json", "tokenizer.json"] if copied else []
        assert names_in(folder) == sorted([*wanted, "m.onnx", "m.onnx.*.data", "prune.json"])
    (tmp_path / "secret").write_text("secret")
    source.with_name("vocab.txt").symlink_to(tmp_path / "secret")
    with raises(UnsafeInputError):
        cut(source, tmp_path / "third" / "m.onnx")
    assert not (tmp_path / "third").exists()


def test_a_prune_json_of_someone_else_is_not_overwritten(source: Path, target: Path) -> None:
    cut(source, target)
    place = target.with_name("prune.json")
    report = json.loads(place.read_text())
    del report["target"]  # that of an earlier version may be
    place.write_text(json.dumps(report))
    cut(source, target.with_name("n.onnx"))
    shutil.rmtree(target.parent)
    target.parent.mkdir()
    place.write_text('{"trees": 3}')
    with raises(SurgeryError, "not-ours"):
        cut(source, target)
    assert contents(target.parent) == {"prune.json": b'{"trees": 3}'}


@pytest.mark.parametrize(("name", "code"), [("m.onnx.data", 0), ("m.onnx", 2)])
def test_the_plan_is_not_overwritten(source: Path, tmp_path: Path, name: str, code: int) -> None:
    plan = tmp_path / name
    plan.write_text(PruningPlan(deletions=PLAN).to_json())
    before = plan.read_bytes()
    call = ["prune", str(source), "-o", str(tmp_path / "m.onnx"), "--plan", str(plan)]
    assert command_line.run([*call, "--verify", "none"]) == code
    assert plan.read_bytes() == before


def test_a_missing_runtime_is_told_before_the_source_is_read(
    source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for place in (source, source.with_name("not_there.onnx")):
        with raises(MissingDependencyError, "", "--verify none"):
            prune_file(place, target, PLAN)
    assert not target.parent.exists()
    assert cut(source, target)


@pytest.mark.parametrize("note", [None, "of another kind", "a record"])
def test_the_note_of_a_form_counts_what_is_left(
    source: Path, tmp_path: Path, note: str | None
) -> None:
    model = load_model(source)
    count = sum(node.op_type == "Softmax" for node in model.graph)
    made = FormRecord(target="portable", writer="torch", fused={"Softmax": count, "Gelu": 1})
    if note is not None:
        model.metadata_props[FORM_KEY] = made.model_dump_json() if note == "a record" else note
    cut(saved(model, tmp_path, "noted.onnx"), tmp_path / "cut.onnx")
    noted = load_model(tmp_path / "cut.onnx").metadata_props.get(FORM_KEY)
    if note != "a record":
        assert noted == note
        return
    left = made.model_copy(update={"fused": {"Softmax": count - 2}})
    assert FormRecord.model_validate_json(noted) == left
