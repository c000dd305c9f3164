from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from exporter.artifacts import PlannedDeletion
from exporter.errors import ExportError, PlanError
from tests.raising import raises
from tests.tiny_models import family_loaded

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("exports_once")]


@pytest.fixture(scope="module")
def loaded() -> Any:
    return family_loaded("llama")


@pytest.fixture(scope="module")
def exported(loaded: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from exporter.export.torch_export import export_onnx

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
        from exporter.cut.options import CutOptions
        from exporter.cut.surgery import prune_file

        prune_file(exported, tmp_path / "model.onnx", deletions, CutOptions(verify="none"))
        return tmp_path / "model.onnx"

    return prune


def deletion(layer: int, kind: Any, replacement: Any = "none") -> PlannedDeletion:
    return PlannedDeletion(layer=layer, kind=kind, replacement=replacement)


def test_an_export_is_checked_in_both_phases(loaded: Any, exported: Path) -> None:
    from exporter.export.parity import check_export

    checks = check_export(loaded, exported)
    assert [(check.phase, check.name.split(" against")[0]) for check in checks] == [
        ("prefill", "logits"),
        ("prefill", "keys and values"),
        ("decode", "logits"),
        ("decode", "keys and values"),
    ]
    assert all(check.passed and check.max_abs_error < 1e-5 for check in checks)
    assert all(check.tolerance >= 1e-4 for check in checks)


@pytest.mark.parametrize("initializer", ["model.embed_tokens.weight", "lm_head.weight_transposed"])
def test_a_changed_weight_is_noticed(
    loaded: Any, changed: Callable[..., Path], initializer: str
) -> None:
    from exporter.export.parity import check_export

    def scale(model: ir.Model) -> None:
        value = model.graph.initializers[initializer]
        value.const_value = ir.tensor(value.const_value.numpy() * 1.01, name=value.name)

    with raises(ExportError, "wrong-results", "prefill logits"):
        check_export(loaded, changed(scale))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_do_not_pass(
    loaded: Any, changed: Callable[..., Path], value: float
) -> None:
    from exporter.export.parity import check_export

    def poison(model: ir.Model) -> None:
        weight = model.graph.initializers["model.embed_tokens.weight"]
        array = weight.const_value.numpy().copy()
        array[:] = value
        weight.const_value = ir.tensor(array, name=weight.name)

    with raises(ExportError, "wrong-results", "inf"):
        check_export(loaded, changed(poison))


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
    from exporter.export.parity import check_export

    with raises(ExportError, "other-outputs", name):
        check_export(loaded, changed(change))


@pytest.mark.parametrize(
    ("told", "code", "named"),
    [((2, "mlp"), "layer-missing", (2,)), ((1, "mlp", "bias"), "numbers-missing", ("mlp 1",))],
)
def test_a_cut_that_the_model_can_not_have_is_refused(
    told: Any, code: str, named: tuple[object, ...], loaded: Any, exported: Path
) -> None:
    from exporter.export.parity import check_export

    with raises(PlanError, code, *named):
        check_export(loaded, exported, deletions=[deletion(*told)])


@pytest.mark.parametrize("kind", ["attention", "mlp", "block"])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_cut_is_checked_with_the_same_sublayers_skipped(
    loaded: Any, exported: Path, pruned: Callable[..., Path], layer: int, kind: str
) -> None:
    from exporter.export.parity import check_export

    cut = deletion(layer, kind)
    checks = check_export(loaded, pruned(cut), deletions=[cut])
    assert {check.phase for check in checks} == {"prefill", "decode"}
    assert all(check.passed and check.max_abs_error < 1e-5 for check in checks)
    assert all(check.passed for check in check_export(loaded, exported))  # it is whole again


def test_the_wrong_mlp_skipped_does_not_pass(loaded: Any, pruned: Callable[..., Path]) -> None:
    from exporter.export.parity import check_export

    checks = check_export(loaded, pruned(deletion(0, "mlp")), deletions=[deletion(1, "mlp")])
    assert not all(check.passed for check in checks)


def test_the_wrong_attention_skipped_is_told_by_its_cache(
    loaded: Any, pruned: Callable[..., Path]
) -> None:
    from exporter.export.parity import check_export

    cut, result = deletion(0, "attention"), deletion(1, "attention")
    with raises(ExportError, "other-outputs", "present.0"):
        check_export(loaded, pruned(cut), deletions=[result])


def test_float16_passes_with_its_own_tolerance(tmp_path: Path) -> None:
    from exporter.export.parity import check_export
    from exporter.export.torch_export import export_onnx

    loaded = family_loaded("llama", dtype="float16")
    checks = check_export(loaded, export_onnx(loaded, tmp_path))
    assert all(check.passed and check.tolerance >= 1e-2 for check in checks)
    assert all(0 < check.max_abs_error < 5e-3 for check in checks)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    from exporter.export.torch_export import export_onnx

    loaded = family_loaded("llama", dtype="bfloat16")
    return loaded, export_onnx(loaded, tmp_path_factory.mktemp("narrow"))


def test_bfloat16_passes_in_float32_with_its_own_tolerance(narrow: tuple[Any, Path]) -> None:
    import torch

    from exporter.export.parity import check_export

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
    from exporter.export.parity import check_export

    other = replace(narrow[0], model=deepcopy(narrow[0].model))
    other.model.lm_head.weight.mul_(1.02)
    with raises(ExportError, "wrong-results", "prefill logits", "bfloat16"):
        check_export(other, narrow[1])


def test_a_type_without_a_tolerance_is_refused_with_what_to_do(exported: Path) -> None:
    from exporter.export.parity import check_export

    with raises(ExportError, "no-tolerance", "float64") as caught:
        check_export(family_loaded("llama", dtype="float64"), exported)
    assert "float32" in caught.value.hint


def test_an_export_of_an_unknown_architecture_can_be_checked(
    loaded: Any, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from exporter.errors import UnknownArchitectureError
    from exporter.export.parity import check_export
    from exporter.models.families import FAMILIES

    def unknown(model: Any) -> Any:
        raise UnknownArchitectureError("not known")

    monkeypatch.delitem(FAMILIES, "llama")
    monkeypatch.setattr("exporter.models.architectures._discover", unknown)
    assert all(check.passed for check in check_export(loaded, exported))
    with pytest.raises(UnknownArchitectureError):
        check_export(loaded, exported, deletions=[deletion(0, "mlp")])
