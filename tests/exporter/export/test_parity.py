"""A healed graph is held against PyTorch with the same numbers in the branches' places."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from exporter.artifacts import ParityCheck, PlannedDeletion
from exporter.artifacts.loaded_plan import LoadedPlan, Replacements
from exporter.cut.branch_replacements import branch_replacements_of
from exporter.cut.options import CutOptions
from exporter.cut.surgery import prune_file
from exporter.errors import ExportError, PlanError, UnknownArchitectureError
from exporter.export.forms.targets import write_form
from exporter.models.families import FAMILIES
from graph_passes import ReplacementTensors, SublayerRef
from tests.raising import raises
from tests.tiny_models import (
    check_export,
    export_onnx,
    family_loaded,
    planned,
    random_replacements,
    tiny_loaded,
)

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("exports_once")]


@pytest.fixture(scope="module")
def loaded() -> Any:
    return family_loaded("llama")


@pytest.fixture(scope="module")
def exported(loaded: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_onnx(loaded, tmp_path_factory.mktemp("baseline"))


@pytest.fixture
def changed(exported: Path, tmp_path: Path) -> Callable[[Callable[[ir.Model], None]], Path]:
    """Writes a changed copy of the exported graph."""

    def write(change: Callable[[ir.Model], None]) -> Path:
        model = ir.load(exported)
        change(model)
        ir.save(model, tmp_path / "changed.onnx", external_data="changed.onnx.data")
        return tmp_path / "changed.onnx"

    return write


@pytest.fixture
def pruned(exported: Path, tmp_path: Path) -> Callable[..., Path]:
    def prune(*deletions: PlannedDeletion) -> Path:
        prune_file(exported, tmp_path / "model.onnx", deletions, CutOptions(verify="none"))
        return tmp_path / "model.onnx"

    return prune


def deletion(layer: int, kind: Any, replacement: Any = "none") -> PlannedDeletion:
    return PlannedDeletion(layer=layer, kind=kind, replacement=replacement)


def test_an_export_is_checked_in_both_phases(loaded: Any, exported: Path) -> None:
    checks = check_export(loaded, exported)
    assert [(check.phase, check.name.split(" against")[0]) for check in checks] == [
        ("prefill", "logits"),
        ("prefill", "keys and values"),
        ("decode", "logits"),
        ("decode", "keys and values"),
    ]
    assert all(check.passed and check.max_abs_error < 1e-5 for check in checks)
    assert all(check.tolerance >= 1e-4 for check in checks)


@pytest.mark.parametrize(
    ("initializer", "number", "named"),
    [
        ("model.embed_tokens.weight", None, "prefill logits"),
        ("lm_head.weight_transposed", None, "prefill logits"),
        ("model.embed_tokens.weight", float("nan"), "inf"),
        ("model.embed_tokens.weight", float("inf"), "inf"),
    ],
)
def test_a_changed_weight_is_noticed(
    loaded: Any, changed: Callable[..., Path], initializer: str, number: float | None, named: str
) -> None:
    def spoil(model: ir.Model) -> None:
        value = model.graph.initializers[initializer]
        array = value.const_value.numpy() * 1.01
        value.const_value = ir.tensor(
            array if number is None else np.full_like(array, number), name=value.name
        )

    with raises(ExportError, "wrong-results", named):
        check_export(loaded, changed(spoil))


def shows_probabilities(model: ir.Model) -> None:
    node = next(node for node in model.graph if node.op_type == "Softmax")
    node.outputs[0].name = "probabilities"
    model.graph.outputs.append(node.outputs[0])


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda model: model.graph.outputs.pop(), "present.1"),
        (shows_probabilities, "probabilities"),
    ],
)
def test_other_outputs_are_an_error(
    change: Any, name: str, loaded: Any, changed: Callable[..., Path]
) -> None:
    with raises(ExportError, "other-outputs", name):
        check_export(loaded, changed(change))


@pytest.mark.parametrize(
    ("told", "code", "named"),
    [((2, "mlp"), "layer-missing", (2,)), ((1, "mlp", "bias"), "numbers-missing", ("mlp 1",))],
)
def test_a_cut_that_the_model_can_not_have_is_refused(
    told: Any, code: str, named: tuple[object, ...], loaded: Any, exported: Path
) -> None:
    with raises(PlanError, code, *named):
        check_export(loaded, exported, deletions=[deletion(*told)])


@pytest.mark.parametrize("kind", ["attention", "mlp", "block"])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_cut_is_checked_with_the_same_sublayers_skipped(
    loaded: Any, exported: Path, pruned: Callable[..., Path], layer: int, kind: str
) -> None:
    cut = deletion(layer, kind)
    checks = check_export(loaded, pruned(cut), deletions=[cut])
    assert {check.phase for check in checks} == {"prefill", "decode"}
    assert all(check.passed and check.max_abs_error < 1e-5 for check in checks)
    assert all(check.passed for check in check_export(loaded, exported))  # it is whole again


def test_the_wrong_sublayer_skipped_does_not_pass(loaded: Any, pruned: Callable[..., Path]) -> None:
    checks = check_export(loaded, pruned(deletion(0, "mlp")), deletions=[deletion(1, "mlp")])
    assert not all(check.passed for check in checks)
    with raises(ExportError, "other-outputs", "present.0"):  # an attention's by its cache
        cut = pruned(deletion(0, "attention"))
        check_export(loaded, cut, deletions=[deletion(1, "attention")])


def test_float16_passes_with_its_own_tolerance(tmp_path: Path) -> None:
    loaded = family_loaded("llama", dtype="float16", num_hidden_layers=1)
    checks = check_export(loaded, export_onnx(loaded, tmp_path))
    assert all(check.passed and check.tolerance >= 1e-2 for check in checks)
    assert all(0 < check.max_abs_error < 5e-3 for check in checks)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    loaded = family_loaded("llama", dtype="bfloat16")
    return loaded, export_onnx(loaded, tmp_path_factory.mktemp("narrow"))


def test_bfloat16_passes_in_float32_with_its_own_tolerance(narrow: tuple[Any, Path]) -> None:
    import torch

    loaded, path = narrow
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    checks = check_export(loaded, path)
    assert len(checks) == 4
    assert all(check.passed and check.max_abs_error < 2e-4 for check in checks)
    assert all(2e-3 <= check.tolerance < 5e-3 for check in checks)
    assert all(check.name.endswith("against PyTorch, bfloat16 as float32") for check in checks)
    for name, tensor in loaded.model.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])


def test_a_weight_that_differs_in_bfloat16_is_noticed(narrow: tuple[Any, Path]) -> None:
    other = replace(narrow[0], model=deepcopy(narrow[0].model))
    other.model.lm_head.weight.mul_(1.02)
    with raises(ExportError, "wrong-results", "prefill logits", "bfloat16"):
        check_export(other, narrow[1])


def test_an_export_of_an_unknown_architecture_can_be_checked(
    loaded: Any, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(model: Any) -> Any:
        raise UnknownArchitectureError("not known")

    monkeypatch.delitem(FAMILIES, "llama")
    monkeypatch.setattr("exporter.models.architectures.candidate_layers", unknown)
    assert all(check.passed for check in check_export(loaded, exported))
    with pytest.raises(UnknownArchitectureError):
        check_export(loaded, exported, deletions=[deletion(0, "mlp")])


PLAN = planned(("attention", 0, "linear"), ("mlp", 0, "bias"), ("mlp", 1, "linear"))


def checks_of(
    loaded: Any, source: Path, target: Path, given: Replacements, told: Replacements
) -> list[ParityCheck]:
    """Cuts with some numbers and compares with others."""
    prune_file(source, target, LoadedPlan.of(PLAN, given), CutOptions(verify="none"))
    return check_export(loaded, target, deletions=PLAN, replacements=told)


@pytest.mark.parametrize("family", ["llama", "gemma2", "bert"])  # and others
def test_every_family_agrees_and_other_numbers_do_not(family: str, tmp_path: Path) -> None:
    loaded = family_loaded(family)
    source, target = export_onnx(loaded, tmp_path / "source", opset=20), tmp_path / "m.onnx"
    given = random_replacements(loaded.model.config.hidden_size, PLAN)
    assert all(check.passed for check in checks_of(loaded, source, target, given, given))
    ref = SublayerRef(0, "attention")
    changed: Any = np.array(given.tensors[ref].weight)
    changed[3, 5] += 0.3  # a single number
    one = {**given.tensors, ref: ReplacementTensors(given.tensors[ref].bias, changed)}
    wrong = Replacements(given.path, given.sha256, one)
    assert not all(check.passed for check in checks_of(loaded, source, target, given, wrong))


def test_bfloat16_rounds_the_numbers_on_both_sides(
    narrow: tuple[Any, Path], tmp_path: Path
) -> None:
    """In float32 the two are compared, with the numbers that bfloat16 has left."""
    loaded, source = narrow
    given = random_replacements(loaded.model.config.hidden_size, PLAN)
    checks = checks_of(loaded, source, tmp_path / "m.onnx", given, given)
    # float32's rounding and the graph's own bfloat16 constants; the numbers' rounding is 4e-3.
    assert all(check.passed and check.max_abs_error < 1e-3 for check in checks)


@pytest.mark.parametrize(
    ("hidden", "entries", "code", "fields"),
    [
        (64, PLAN, "wrong-shape", ("attention.0.bias", "[64]", "[96]")),
        (96, planned(("mlp", 7, "bias")), "layer-missing", (7, 0, 1)),
    ],
)
def test_replacements_of_another_model_are_refused(
    hidden: int, entries: Any, code: str, fields: tuple[object, ...]
) -> None:
    given = random_replacements(hidden, entries)
    with raises(PlanError, code, *fields):
        branch_replacements_of(entries, given, family_loaded("llama").model)


def test_numbers_that_are_not_finite_are_refused() -> None:
    given = random_replacements(96, PLAN)
    bias: Any = given.tensors[SublayerRef(0, "mlp")].bias
    bias[4] = float("nan")
    with raises(PlanError, "not-finite", "mlp.0.bias", "float32"):
        branch_replacements_of(PLAN, given, family_loaded("llama").model)


@pytest.mark.genai
@pytest.mark.parametrize("target", ["onnxruntime-cpu", "tensorrt"])
def test_fused_forms_agree_too(target: Any, tmp_path: Path) -> None:
    """Caches in place, packed products, norms fused with sums; one plan for all of them."""
    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "head_dim": 16}
    loaded = tiny_loaded("qwen2", vocab_size=96, **sizes)
    (tmp_path / "whole").mkdir()
    write_form(loaded, tmp_path / "whole", target=target)
    given = random_replacements(64, PLAN)
    source, target_file = tmp_path / "whole" / "model.onnx", tmp_path / "cut" / "model.onnx"
    assert all(check.passed for check in checks_of(loaded, source, target_file, given, given))
    other = random_replacements(64, PLAN, seed=1)
    checks = checks_of(loaded, source, target_file, given, other)
    assert not all(check.passed for check in checks)
