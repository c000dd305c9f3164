"""`depthcut export --quantize`: its stage, what makes it stale, what is refused, the options."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import exporter.quantize.quantize as quantizer
from exporter.artifacts import QuantizationRecord
from exporter.artifacts.store import StageLedger
from exporter.choose.budgets.budget import Budget
from exporter.cli.export import export
from exporter.errors import ComparisonError, DepthcutError, OptionError, UsageError
from exporter.pipeline.quantizing import quantize, quantize_key
from exporter.pipeline.refusals import refuse_bad_options, refuse_foreign_results
from exporter.pipeline.request import DropRequest, EngineRequest, ExportRequest
from exporter.pipeline.run import QUANTIZE, QUANTIZED, Run, files_below
from exporter.progress import Quiet
from exporter.quantize.quantize import RoundingDifference
from exporter.quantize.settings import QuantizeSettings
from tests.raising import raises
from tests.reading import lines_of, run_lines
from tests.text_graphs import write_tiny_lm, write_tokenizer

EIGHT = QuantizeSettings(scheme="int8")
QDQ = QuantizeSettings(scheme="int8-qdq", calibration=("pydoc",))
FP8 = QuantizeSettings(scheme="fp8", calibration=("pydoc",), modelopt=Path("python"))


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
    for arm, stage in {"baseline": "export", "candidate": "prune"}.items():
        folder = run.ledger.work / arm
        write_tiny_lm(folder, layers=(0, 1) if arm == "baseline" else (1,))
        write_tokenizer(folder)
        (folder / "config.json").write_text("{}")
        (folder / "genai_config.json").write_text("{}")
        run.ledger.record(stage, {}, files_below(folder))
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


def test_both_models_are_quantised_alike_with_all_that_belongs_to_them(
    exported: Path, quantised: list[tuple[str, QuantizeSettings]]
) -> None:
    run = run_in(exported)
    files, notes = quantize(run, EIGHT)
    run.ledger.record(QUANTIZE, quantize_key(run, EIGHT), files, notes)
    run.ledger.publish()
    assert quantised == [("baseline", EIGHT), ("candidate", EIGHT)]
    for arm, folder in QUANTIZED.items():
        names = {path.name for path in (exported / folder).iterdir()}
        assert names == {path.name for path in (exported / arm).iterdir()} | {"USE.md"}
        lines = lines_of((exported / folder / "USE.md").read_text())["ONNX Runtime"]
        assert run_lines(lines, exported / folder)[0]
        assert {"model.onnx", "tokenizer.json", "config.json", "genai_config.json"} <= names
    assert len(files) == 2 * len(names)
    assert notes == run.sources()


def test_it_is_stale_when_graphs_settings_or_text_are_others(
    exported: Path, tmp_path: Path, quantised: list[tuple[str, QuantizeSettings]]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one")
    settings = replace(EIGHT, calibration=(str(text),))
    run = run_in(exported)
    run.ledger.record(QUANTIZE, quantize_key(run, settings), *quantize(run, settings))

    def valid(quantize_settings: QuantizeSettings) -> bool:
        return run.ledger.valid(QUANTIZE, quantize_key(run, quantize_settings))

    assert valid(settings)
    assert not valid(replace(settings, block_size=64))
    text.write_text("two")
    assert not valid(settings)
    text.write_text("one")
    assert valid(settings)
    run.ledger.record("prune", {}, [])
    assert not valid(settings)


def test_what_fails_halfway_leaves_the_results_as_they_were(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(source: Path, *_: Any, **__: Any) -> Any:
        raise DepthcutError("no")

    before = sorted(exported.rglob("*"))
    monkeypatch.setattr("exporter.pipeline.quantizing.quantize_file", broken)
    with pytest.raises(DepthcutError):
        quantize(run_in(exported), EIGHT)
    kept = [path for path in exported.rglob("*") if ".depthcut" not in str(path)]
    assert sorted(kept) == [path for path in before if ".depthcut" not in str(path)]


def test_a_run_that_quantises_nothing_keeps_only_what_is_of_its_graphs(
    exported: Path, quantised: list[tuple[str, QuantizeSettings]]
) -> None:
    run = run_in(exported)
    run.ledger.record(QUANTIZE, quantize_key(run, EIGHT), *quantize(run, EIGHT))
    run.ledger.publish()
    folders = [exported / folder for folder in QUANTIZED.values()]
    for changed in (False, True):
        later = run_in(exported, quantize=None)
        if changed:
            later.ledger.record("prune", {}, [])
        later.forget_others(QUANTIZE)
        later.ledger.publish()
        assert [folder.is_dir() for folder in folders] == [not changed] * 2
        assert StageLedger(exported).has(QUANTIZE) != changed


def test_folders_that_someone_else_made_are_left_alone(exported: Path) -> None:
    run = run_in(exported)
    refuse_foreign_results(run)
    (exported / "candidate-quantized").mkdir()
    with raises(UsageError, "not-ours", "candidate-quantized"):
        refuse_foreign_results(run)
    refuse_foreign_results(run_in(exported, quantize=None))


@pytest.fixture
def with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exporter.pipeline.refusals.require", lambda *_, **__: None)


@pytest.mark.usefixtures("with_torch")
@pytest.mark.parametrize(
    ("changes", "code", "named"),
    [
        ({"engines": EngineRequest("tensorrt-rtx")}, "needs-modelopt", "int8"),
        ({"target": "tensorrt"}, "needs-modelopt", "fp8"),
        ({"target": "tensorrt", "quantize": QDQ}, "needs-modelopt", "int8-qdq;"),
        ({"target": "onnxruntime-cpu", "quantize": FP8}, "other-target", "onnxruntime-cpu"),
        (
            {"target": "tensorrt", "quantize": FP8, "cache_length": 4096},
            "caches-in-place",
            "ModelOpt",
        ),
        ({"quantize": QuantizeSettings("int8-qdq")}, "no-calibration", "--calibration"),
    ],
)
def test_what_can_not_be_quantised_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], code: str, named: str
) -> None:
    monkeypatch.setattr("exporter.pipeline.refusals._refuse_engines", lambda _: None)
    monkeypatch.setattr(
        "exporter.export.forms.targets.refuse_options", lambda *_, **__: None, raising=False
    )
    request = run_in(tmp_path).request
    refuse_bad_options(request)
    with raises(UsageError, code, named):
        refuse_bad_options(replace(request, **changes))


@pytest.mark.parametrize(("settings", "room"), [(None, None), (EIGHT, None), (FP8, 0)])
def test_engines_are_built_from_what_modelopt_quantised_and_caches_grow(
    exported: Path, settings: QuantizeSettings | None, room: int | None
) -> None:
    run = run_in(exported, quantize=settings)
    for arm in QUANTIZED.values():
        (run.ledger.work / arm).mkdir(parents=True, exist_ok=True)
    names = {arm: folder.name for arm, folder in run.built_from().items()}
    assert names == (QUANTIZED if settings is FP8 else {arm: arm for arm in QUANTIZED})
    assert run.request.cache_room == room


@pytest.mark.usefixtures("with_torch")
def test_weights_are_not_fitted_to_the_text_that_they_are_judged_on(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the value of the list is a string\n" * 20)
    request = run_in(tmp_path).request
    judged = replace(request.compare, eval_text=str(text))
    fitted = QuantizeSettings("int8-qdq", calibration=(str(text),))
    refuse_bad_options(replace(request, quantize=fitted))
    with raises(ComparisonError, "same-text"):
        refuse_bad_options(replace(request, quantize=fitted, compare=judged))
    refuse_bad_options(replace(request, quantize=replace(fitted, scheme="int8"), compare=judged))


def asked(*options: str) -> QuantizeSettings | None:
    line = ["model", "-o", "out", "--drop-joint", "1", *options]
    return export.read(line).request.quantize


def test_options_become_settings_and_the_rest_is_the_settings_own(tmp_path: Path) -> None:
    assert asked() is None
    assert asked("--quantize", "int8") == EIGHT
    config = tmp_path / "few.yaml"
    config.write_text(
        "block_size: 64\nsymmetric: false\naccuracy_level: 0\nembedding_bits: none\nhead_bits: 4\n"
        "quantize_method: rtn\n"
    )
    assert asked(
        "--quantize", "int4", "--calibration", "text.txt", "--config", str(config),
    ) == QuantizeSettings(
        "int4", "rtn", block_size=64, symmetric=False, accuracy_level=0, embedding_bits=None,
        head_bits=4, calibration=("text.txt",),
    )  # fmt: skip
    sampled = asked("--quantize", "int8", "--calibration", "self")
    assert sampled is not None
    mixed = asked("--quantize", "int8", "--calibration", "self", "--calibration", "pydoc")
    assert mixed.calibration == ("pydoc",)
    assert sampled.calibration == ()  # the model that would write it is gone by then


@pytest.mark.parametrize(
    ("key", "value"),
    [("block_size", 64), ("accuracy_level", 0), ("head_bits", "none"), ("quantize_method", "hqq")],
)
def test_how_is_nothing_without_into_what(tmp_path: Path, key: str, value: object) -> None:
    config = tmp_path / "few.yaml"
    config.write_text(f"{key}: {value}\n")
    with pytest.raises(OptionError) as caught:
        asked("--config", str(config))
    assert "quantize" in caught.value.keys
