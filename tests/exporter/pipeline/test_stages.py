"""Stages by themselves: quantising, those that folders share, and the end of a useless cut."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import exporter.quantize.quantize as quantizer
from exporter.artifacts import CalibrationRef, PlannedDeletion, PruningPlan, QuantizationRecord
from exporter.artifacts.plan_figures import PLAN_KINDS
from exporter.artifacts.store import StageLedger
from exporter.choose.budgets.budget import USUAL_REQUEST, Budget, Floors, Memory
from exporter.errors import (
    ComparisonError,
    DepthcutError,
    OptionError,
    QuantizationError,
    UnmetGoalError,
    UsageError,
)
from exporter.models.loading.sources import SourceOptions
from exporter.pipeline import planning, road
from exporter.pipeline.request import DropRequest, EngineRequest, ExportRequest
from exporter.pipeline.run import ARMS, QUANTIZE, QUANTIZED, Run
from exporter.pipeline.sweep.run import tidy
from exporter.progress import Quiet
from exporter.quantize.quantize import RoundingDifference
from exporter.quantize.settings import QuantizeSettings
from tests.raising import raises
from tests.reading import Heard
from tests.text_graphs import write_tiny_lm, write_tokenizer

EIGHT = QuantizeSettings(scheme="int8")
QDQ = QuantizeSettings(scheme="int8-qdq", calibration=("pydoc",))


def run_in(out: Path, **changes: Any) -> Run:
    """A run without its model: what it is asked for, and what is finished."""
    request = ExportRequest(
        source="model", out=out, drops=DropRequest(Budget(joint=1)), quantize=EIGHT
    )
    run = object.__new__(Run)
    run.request, run.progress = replace(request, **changes), Quiet()
    run.versions, run.ledger = {"onnx": "1"}, StageLedger(out)
    return run


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """An output folder with both models, as the stages before leave it."""
    out = tmp_path / "out"
    run = run_in(out)

    def make(place: Path, arm: str, layers: tuple[int, ...]) -> None:
        folder = place / arm
        write_tiny_lm(folder, layers=layers)
        write_tokenizer(folder)
        (folder / "config.json").write_text("{}")
        (folder / "genai_config.json").write_text("{}")

    run.ledger.once("export", {}, partial(make, arm="baseline", layers=(0, 1)))
    run.ledger.once("prune", {}, partial(make, arm="candidate", layers=(1,)))
    run.ledger.publish()
    return out


@pytest.fixture
def quantised(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, QuantizeSettings]]:
    """Stands for the quantiser, and notes what it is asked."""
    results: list[tuple[str, QuantizeSettings]] = []

    def stand_in(
        source: Path, output: Path, settings: QuantizeSettings, **_: Any
    ) -> quantizer.QuantizationResult:
        results.append((source.parent.name, settings))
        assert not list(output.parent.glob("model.onnx*"))  # nothing in float is shipped with it
        for file in source.parent.glob("model.onnx*"):
            shutil.copy(file, output.parent)
        record = QuantizationRecord(scheme=settings.scheme, method="rtn", bits={"8": 3})
        return quantizer.QuantizationResult(record, 9, 3, RoundingDifference(0.0, 1.0, None))

    monkeypatch.setattr("exporter.pipeline.quantizing.quantize_file", stand_in)
    return results


def used(run: Run) -> Run:
    """As after the stages before; what is as it was is reused."""
    for stage in ARMS.values():
        run.ledger.once(stage, {}, pytest.fail)
    return run


def quantize(run: Run, settings: QuantizeSettings) -> list[str]:
    """How the stages of both models were finished."""
    run.request, heard = replace(run.request, quantize=settings), Heard()
    run.progress, names = heard, list(QUANTIZE.values())
    for stage in road.order(run):
        if stage.name in names:
            run.finish(stage)
    return ["reused" if name in heard.reused else "made" for name in names]


def test_both_models_are_quantised_alike_with_all_that_belongs_to_them(
    exported: Path, quantised: list[tuple[str, QuantizeSettings]]
) -> None:
    run = used(run_in(exported))
    quantize(run, EIGHT)
    run.ledger.publish()
    assert quantised == [("baseline", EIGHT), ("candidate", EIGHT)]
    for arm, folder in QUANTIZED.items():
        names = {path.name for path in (exported / folder).iterdir()}
        assert names == {path.name for path in (exported / arm).iterdir()}
        assert {"model.onnx", "tokenizer.json", "config.json", "genai_config.json"} <= names


def other_candidate(folder: Path) -> None:
    write_tiny_lm(folder / "candidate", layers=(0,))


def test_it_is_stale_when_graphs_settings_or_text_are_others(
    exported: Path, tmp_path: Path, quantised: list[tuple[str, QuantizeSettings]]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one")
    settings = replace(EIGHT, calibration=(str(text),))
    run = used(run_in(exported))
    made, reused = ["made", "made"], ["reused", "reused"]
    assert quantize(run, settings) == made
    assert quantize(run, settings) == reused
    assert quantize(run, replace(settings, block_size=64)) == made
    assert quantize(run, settings) == made
    text.write_text("two")
    assert quantize(run, settings) == made
    run.ledger.once("prune", {"other": 1}, other_candidate)
    assert quantize(run, settings) == ["reused", "made"]  # the baseline is as it was


def test_what_fails_halfway_leaves_the_results_as_they_were(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(source: Path, *_: Any, **__: Any) -> Any:
        raise DepthcutError("no")

    before = sorted(exported.rglob("*"))
    monkeypatch.setattr("exporter.pipeline.quantizing.quantize_file", broken)
    with pytest.raises(DepthcutError):
        quantize(used(run_in(exported)), EIGHT)
    kept = [path for path in exported.rglob("*") if ".depthcut" not in str(path)]
    assert sorted(kept) == [path for path in before if ".depthcut" not in str(path)]


def test_a_run_that_quantises_nothing_keeps_only_what_is_of_its_graphs(
    exported: Path, quantised: list[tuple[str, QuantizeSettings]]
) -> None:
    run = used(run_in(exported))
    quantize(run, EIGHT)
    run.ledger.publish()
    folders = [exported / folder for folder in QUANTIZED.values()]
    for changed in (False, True):
        later = used(run_in(exported, quantize=None))
        if changed:
            later.ledger.once("prune", {"other": 1}, other_candidate)
        gone = later.ledger.publish()
        assert gone == ["quantize-candidate"] * changed
        kept = [True, not changed]  # the baseline is the same
        assert [folder.is_dir() for folder in folders] == kept
        assert [StageLedger(exported).has(stage) for stage in QUANTIZE.values()] == kept


def test_folders_that_someone_else_made_are_left_alone(exported: Path) -> None:
    run = run_in(exported)
    road.refuse_foreign_results(run)
    (exported / "candidate-quantized").mkdir()
    with raises(UsageError, "not-ours", "candidate-quantized"):
        road.refuse_foreign_results(run)
    road.refuse_foreign_results(run_in(exported, quantize=None))


@pytest.fixture
def with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exporter.pipeline.road.require", lambda *_, **__: None)


@pytest.mark.usefixtures("with_torch")
@pytest.mark.parametrize(
    ("changes", "kind", "code", "named"),
    [
        ({"engines": EngineRequest("tensorrt-rtx")}, OptionError, "options-clash", "quantize"),
        ({"target": "tensorrt"}, OptionError, "options-clash", "quantize"),
        ({"quantize": QuantizeSettings("int8-qdq")}, UsageError, "no-calibration", "calibration"),
        ({"target": "tensorrt", "quantize": QDQ, "load": SourceOptions(dtype="bfloat16")},
         QuantizationError, "wrong-dtype", "bfloat16"),
    ],
)  # fmt: skip
def test_what_can_not_be_quantised_is_refused_before_any_work(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    kind: type[DepthcutError],
    code: str,
    named: str,
) -> None:
    monkeypatch.setattr("exporter.pipeline.road.check_engines", lambda _: None)
    monkeypatch.setattr(
        "exporter.export.forms.targets.refuse_options", lambda *_, **__: None, raising=False
    )
    request = run_in(tmp_path).request
    road.check_request(request)
    with raises(kind, code, named):
        road.check_request(replace(request, **changes))


@pytest.mark.parametrize("settings", [None, QDQ])
def test_engines_are_built_from_what_was_quantised(
    exported: Path, settings: QuantizeSettings | None
) -> None:
    run = run_in(exported, quantize=settings)
    names = {arm: folder.name for arm, folder in run.built_from().items()}
    assert names == (QUANTIZED if settings else {arm: arm for arm in QUANTIZED})


def test_weights_are_not_fitted_to_the_text_that_they_are_judged_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(request: ExportRequest) -> None:
        run = run_in(tmp_path)
        run.request, run.__dict__["stacks_config"] = request, None
        road.refuse_deciding_text(run)

    monkeypatch.setattr(road, "classifies_images", lambda *_, **__: False)
    text = tmp_path / "text.txt"
    text.write_text("the value of the list is a string\n" * 20)
    request = run_in(tmp_path).request
    judged = replace(request.compare, eval_text=str(text))
    fitted = QuantizeSettings("int8-qdq", calibration=(str(text),))
    refuse(replace(request, quantize=fitted))
    with raises(ComparisonError, "same-text"):
        refuse(replace(request, quantize=fitted, compare=judged))
    refuse(replace(request, quantize=replace(fitted, scheme="int8"), compare=judged))


KEY = {"model": "m", "dtype": "float32"}


class Maker:
    """Makes a stage of a folder and a file, and counts."""

    def __init__(self, text: str = "weights") -> None:
        self.text, self.calls = text, 0

    def __call__(self, folder: Path) -> list[str]:
        self.calls += 1
        (folder / "baseline" / "sub").mkdir(parents=True)
        for name in FILES:
            (folder / name).write_text(self.text)
        return [self.text]


FILES = ("baseline/sub/w.bin", "note.json")


def walk(folder: Path, root: Path, key: Any = KEY, text: str = "weights") -> tuple[Maker, Path]:
    ledger, make = StageLedger(folder, force=True), Maker(text)
    how = ledger.once("export", key, make, shared=root)
    assert how == ("made" if make.calls else "shared")
    files = [ledger.path(name) for name in FILES]
    assert {path.read_text() for path in files} == {ledger.notes("export")[0]}
    assert ledger.once("export", key, pytest.fail) == "reused"
    return make, folder


def test_a_stage_is_made_once_for_a_key(tmp_path: Path) -> None:
    first, one = walk(tmp_path / "a", tmp_path / ".depthcut" / "shared")
    second, other = walk(tmp_path / "b", tmp_path / ".depthcut" / "shared")
    assert (first.calls, second.calls) == (1, 0)
    for name in ("baseline/sub/w.bin", "note.json"):
        assert (one / name).samefile(other / name)
    walk(tmp_path / "a", tmp_path / ".depthcut" / "shared")
    other, _ = walk(
        tmp_path / "b", tmp_path / ".depthcut" / "shared", {**KEY, "dtype": "float16"}, "halves"
    )
    assert other.calls == 1


@pytest.mark.parametrize("damage", ["file", "entry", "gone"])
def test_what_was_damaged_is_made_again(tmp_path: Path, damage: str) -> None:
    root = tmp_path / ".depthcut" / "shared"
    _, work = walk(tmp_path / "a", root)
    (place,) = root.glob("export-*")
    if damage == "entry":
        (place / ".depthcut" / "stages.json").write_text("{")
    else:
        (place / ".depthcut" / "work" / "export" / "note.json").unlink()
    if damage == "file":
        (place / ".depthcut" / "work" / "export" / "note.json").write_text("other")
    again, _ = walk(tmp_path / "b", root)
    assert again.calls == 1
    assert walk(tmp_path / "c", root)[0].calls == 0
    assert (work / "note.json").read_text() == "weights"


def test_only_what_no_folder_holds_any_more_is_removed(tmp_path: Path) -> None:
    root = tmp_path / ".depthcut" / "shared"
    walk(tmp_path / "a", root)
    _, work = walk(tmp_path / "b", root, {"model": "gone"}, "other")
    for name in FILES:
        (work / name).unlink()
    tidy(root)
    assert len(list(root.glob("export-*"))) == 1
    assert walk(tmp_path / "c", root)[0].calls == 0
    assert walk(tmp_path / "d", root, {"model": "gone"}, "other")[0].calls == 1


def run_of(
    rise: float | None,
    budget: Budget | None = None,
    refuses: bool = True,
    given: bool = False,
    figure: str = "log_perplexity_increase",
) -> Any:
    deletions = [PlannedDeletion(layer=n, kind="attention", replacement="none") for n in range(8)]
    figures = {} if rise is None else {figure: rise}
    plan = PruningPlan(deletions=deletions, predicted=figures)
    drops = SimpleNamespace(budget=None if given else budget or Budget(attention=8))
    request = SimpleNamespace(drops=drops, refuses_useless=refuses)
    return SimpleNamespace(request=request, plan=SimpleNamespace(plan=plan))


class _ForSequenceClassification:
    config: Any


def of_classes(same: float, texts: int, labels: int = 3, **more: Any) -> Any:
    result = run_of(same, figure="top1_agreement", **more)
    judged = CalibrationRef(
        source="made", samples=texts, sequence_length=8, tokens=8 * texts, sha256="0"
    )
    plan = result.plan.plan.model_copy(update={"judged_on": [judged]})
    model = _ForSequenceClassification()
    model.config = SimpleNamespace(num_labels=labels)
    return SimpleNamespace(
        request=result.request,
        plan=SimpleNamespace(plan=plan),
        choosing=SimpleNamespace(model=model),
    )


COSINE = PLAN_KINDS["embeddings"].figures[0]
TWICE = math.log(2)
"""The perplexity that it makes of one."""


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (run_of(1.6 * TWICE), ("--allow-damage",)),
        (run_of(2 * TWICE, Budget(target_speedup=1.2, at=USUAL_REQUEST)), ("--allow-damage",)),
        (run_of(2 * TWICE, Budget(parameters=0.1)), ("--allow-damage",)),
        (run_of(2 * TWICE, Budget(fits=Memory(10**6))), ("--allow-damage",)),
        (run_of(0.99 * TWICE), None),
        (run_of(5.0, refuses=False), None),
        (run_of(5.0, Budget(floors=Floors(100.0))), None),
        (run_of(5.0, given=True), None),
        (run_of(None), None),
        # An encoder whose embeddings are others.
        (run_of(0.6, figure="cosine"), ("0.600", COSINE.useless)),
        (run_of(COSINE.useless + 0.01, figure="cosine"), None),
        (run_of(0.6, refuses=False, figure="cosine"), None),
        # A classifier whose texts get other classes, if enough texts show it.
        (of_classes(0.6, 100), ("60%", "made")),
        (of_classes(0.6, 6), None),
        (of_classes(0.82, 100), None),
        (of_classes(0.6, 100, refuses=False), None),
        # Of a reranker half as many orders show it.
        (of_classes(0.5, 24), ()),
        (of_classes(0.5, 27), ()),
        (of_classes(0.5, 24, labels=1), None),
        (of_classes(0.5, 27, labels=1), None),
        (of_classes(0.5, 100, labels=1), ()),
    ],
)
def test_a_cut_that_ruins_the_model_is_refused_unless_it_is_asked_for(
    asked: Any, words: tuple[object, ...] | None
) -> None:
    if words is None:
        planning.refuse_useless(asked)
        return
    with raises(UnmetGoalError, "useless", *words):
        planning.refuse_useless(asked)
