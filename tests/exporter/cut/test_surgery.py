"""ONNX file in, ONNX file out: whole or not at all, and held against the masked original."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest

from exporter.artifacts import GraphSizeEntry, PlannedDeletion, PruneReport, PruningPlan
from exporter.artifacts.loaded_plan import LoadedPlan
from exporter.cut import surgery
from exporter.cut.options import CutOptions
from exporter.cut.surgery import prune_file
from exporter.errors import OnnxFileError, SurgeryError, UsageError, VerificationError
from exporter.files import sha256_file, sha256_files
from graph_passes.files import placing, storage
from graph_passes.files.storage import load_model, save_model
from graph_passes.pipeline import graph_size
from tests.exporter.cut_models import PLAN, content, source
from tests.raising import raises
from tests.reading import all_data_of, data_of, names_in
from tests.tiny_graphs import TinySpec, tiny_model

__all__ = ["source"]  # a fixture


def test_a_file_is_cut_and_the_report_stands_beside_it(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out" / "pruned.onnx"
    report = prune_file(source, target, LoadedPlan(PruningPlan(deletions=PLAN), sha256="abc"))
    names = ["USE.md", "prune.json", "pruned.onnx", "pruned.onnx.*.data"]
    assert names_in(target.parent) == names
    assert PruneReport.read(target.parent / "prune.json") == report
    assert [(e.layer, e.kind) for e in report.deleted] == [
        (1, "attention"), (2, "attention"), (2, "mlp"),
    ]  # fmt: skip
    assert report.deleted[0].inputs_removed == ["past_key_values.1.key", "past_key_values.1.value"]
    assert report.verification.passed
    assert report.verification.runs == 2
    assert report.verification.max_abs_error == pytest.approx(0.0, abs=1e-5)
    written = graph_size(load_model(target))
    assert report.after == GraphSizeEntry.model_validate(asdict(written))
    assert written.bytes == 4 * written.parameters
    assert report.after.parameters < report.before.parameters
    onnx.checker.check_model(str(target), full_check=True)


def test_the_report_names_its_parents(source: Path, tmp_path: Path) -> None:
    report = prune_file(
        source,
        tmp_path / "o" / "m.onnx",
        LoadedPlan(PruningPlan(deletions=PLAN), sha256="abc"),
        CutOptions(verify="none"),
    )
    assert report.made_from == {
        "model": sha256_file(source),
        "weights": sha256_files([data_of(source)], source.parent),
        "plan": "abc",
    }


def test_without_verification_the_report_says_so(source: Path, tmp_path: Path) -> None:
    report = prune_file(source, tmp_path / "o" / "m.onnx", PLAN, CutOptions(verify="none"))
    assert report.verification.model_dump() == {
        "method": "none", "runs": 0, "max_abs_error": None, "tolerance": None, "passed": None,
    }  # fmt: skip


def test_shared_weights_are_verified_too(source: Path) -> None:
    target = source.with_name("pruned.onnx")
    report = prune_file(source, target, PLAN, CutOptions(weights="share"))
    assert report.verification.passed
    assert all_data_of(target) == []
    assert "weights" not in report.made_from


def test_renumbered_caches_are_verified_too(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "o" / "m.onnx"
    plan = [PlannedDeletion(layer=0, kind="attention")]
    report = prune_file(source, target, plan, CutOptions(renumber_kv=True))
    assert report.verification.passed
    assert report.kv_renumbering["present.2.value"] == "present.1.value"


@pytest.mark.parametrize("spec", [
    TinySpec(form="post_norm", cache=False), TinySpec(form="parallel"), TinySpec(fused=True),
    TinySpec(mask_in_branch=True, past_from=2),
])  # fmt: skip
def test_other_forms_are_verified_too(spec: TinySpec, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    save_model(tiny_model(spec), path)
    report = prune_file(path, tmp_path / "o" / "m.onnx", PLAN)
    assert report.verification.runs == (2 if spec.cache else 1)


def test_the_same_cut_gives_the_same_files(source: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        prune_file(source, tmp_path / name / "m.onnx", PLAN, CutOptions(verify="none"))
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_a_wrong_cut_is_caught_and_nothing_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import graph_passes

    prune = graph_passes.prune_graph

    def wrong_layer(model: ir.Model, value: Any, **options: Any) -> Any:
        _, report = prune(model, value, **options)
        moved = [type(d)((d.layer + 1) % 3, d.kind) for d in value]
        pruned, _ = prune(model, moved, **options)
        return pruned, report

    monkeypatch.setattr(graph_passes, "prune_graph", wrong_layer)
    with raises(VerificationError, "wrong-results"):
        prune_file(source, tmp_path / "o" / "m.onnx", [PlannedDeletion(layer=1, kind="mlp")])
    assert not (tmp_path / "o").exists()


def test_outputs_that_are_lost_are_caught(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import graph_passes

    prune = graph_passes.prune_graph

    def forgetful(model: ir.Model, value: Any, **options: Any) -> Any:
        pruned, report = prune(model, value, **options)
        del pruned.graph.outputs[-1]
        return pruned, report

    monkeypatch.setattr(graph_passes, "prune_graph", forgetful)
    with raises(VerificationError, "other-outputs"):
        prune_file(source, tmp_path / "o" / "m.onnx", PLAN)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("target", ["model.onnx", "its weights", "../source/model.onnx"])
def test_the_source_can_not_be_the_target(source: Path, target: str) -> None:
    before = content(source.parent)
    place = data_of(source) if target == "its weights" else source.parent / target
    with pytest.raises((UsageError, OnnxFileError)):
        prune_file(source, place, PLAN)
    assert content(source.parent) == before


def test_a_link_to_the_source_can_not_be_the_target(source: Path) -> None:
    link = source.with_name("link.onnx")
    link.symlink_to(source.name)
    with raises(UsageError, "overwrites-input", link):
        prune_file(source, link, PLAN)


def test_the_report_can_not_be_the_source(source: Path, tmp_path: Path) -> None:
    with raises(UsageError, "overwrites-input", source):
        prune_file(source, tmp_path / "o" / "m.onnx", PLAN, CutOptions(report_path=source))


def test_the_report_may_stand_elsewhere(source: Path, tmp_path: Path) -> None:
    report_path = tmp_path / "reports" / "cut.json"
    prune_file(
        source, tmp_path / "o" / "m.onnx", PLAN, CutOptions(verify="none", report_path=report_path)
    )
    assert json.loads(report_path.read_text())["kind"] == "prune_report"
    assert not (tmp_path / "o" / "prune.json").exists()


@pytest.mark.parametrize("plan", [
    [PlannedDeletion(layer=9, kind="mlp")],
    [PlannedDeletion(layer=n, kind="block") for n in range(3)],
    [],
])  # fmt: skip
def test_a_plan_that_does_not_fit_leaves_no_trace(
    source: Path, tmp_path: Path, plan: list[PlannedDeletion]
) -> None:
    with pytest.raises(SurgeryError):
        prune_file(source, tmp_path / "o" / "m.onnx", plan)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("moment", ["write_files", "verify_candidate", "place"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interruption_leaves_the_earlier_result_whole(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, error: BaseException
) -> None:
    target = tmp_path / "o" / "m.onnx"
    prune_file(source, target, PLAN)
    before = content(target.parent)
    home = {"write_files": storage, "verify_candidate": surgery, "place": placing}[moment]

    def fails(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(home, moment, fails)
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else OnnxFileError
    with pytest.raises(expected):
        prune_file(source, target, PLAN[:1])
    assert content(target.parent) == before


def test_surgery_needs_no_torch(source: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from exporter.cut.surgery import prune_file\n"
        "from exporter.artifacts import PlannedDeletion as D\n"
        f"prune_file(Path({str(source)!r}), Path({str(tmp_path / 'o.onnx')!r}),"
        " [D(layer=0, kind='mlp')])\n"
        "heavy = {'torch', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
