"""A healed graph is held against PyTorch with the same numbers in the branches' places."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from exporter.artifacts import ParityCheck
from exporter.artifacts.loaded_plan import LoadedPlan, Replacements
from exporter.cut.options import CutOptions
from exporter.cut.surgery import prune_file
from exporter.errors import PlanError
from graph_passes import ReplacementTensors, SublayerRef
from tests.raising import raises
from tests.tiny_models import RANK, family_loaded, planned, random_replacements

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("exports_once")]

PLAN = planned(("attention", 0, "linear"), ("mlp", 0, "bias"), ("mlp", 1, "linear"))
FAMILIES = ["llama", "gemma2", "bert"]  # gpt2, gpt_neox, bloom and mixtral agree too


def hidden_size(loaded: Any) -> int:
    return int(loaded.model.config.hidden_size)


def exported(loaded: Any, folder: Path) -> Path:
    from exporter.export.torch_export import export_onnx

    return export_onnx(loaded, folder, opset=20)


def checks_of(
    loaded: Any, source: Path, target: Path, given: Replacements, told: Replacements
) -> list[ParityCheck]:
    """Cuts with some numbers and compares with others."""
    from exporter.export.parity import check_export

    prune_file(source, target, LoadedPlan.of(PLAN, given), CutOptions(verify="none"))
    return check_export(loaded, target, deletions=PLAN, replacements=told)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_agrees_and_other_numbers_do_not(family: str, tmp_path: Path) -> None:
    loaded = family_loaded(family)
    source, target = exported(loaded, tmp_path / "source"), tmp_path / "m.onnx"
    given = random_replacements(hidden_size(loaded), PLAN, rank=RANK)
    assert all(check.passed for check in checks_of(loaded, source, target, given, given))
    ref = SublayerRef(0, "attention")
    down, up = given.tensors[ref].factors or ()
    changed: Any = down.copy()
    changed[3, 5] += 0.3  # a single number
    one = {**given.tensors, ref: ReplacementTensors(given.tensors[ref].bias, None, (changed, up))}
    wrong = Replacements(given.path, given.sha256, one)
    assert not all(check.passed for check in checks_of(loaded, source, target, given, wrong))


def test_bfloat16_rounds_the_numbers_on_both_sides(tmp_path: Path) -> None:
    """In float32 the two are compared, with the numbers that bfloat16 has left."""
    loaded = family_loaded("llama", dtype="bfloat16")
    source, target = exported(loaded, tmp_path / "source"), tmp_path / "m.onnx"
    given = random_replacements(hidden_size(loaded), PLAN)
    checks = checks_of(loaded, source, target, given, given)
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
    from exporter.cut.branch_replacements import branch_replacements_of

    given = random_replacements(hidden, entries)
    with raises(PlanError, code, *fields):
        branch_replacements_of(entries, given, family_loaded("llama").model)


def test_numbers_that_are_not_finite_are_refused() -> None:
    from exporter.cut.branch_replacements import branch_replacements_of

    given = random_replacements(96, PLAN)
    bias: Any = given.tensors[SublayerRef(0, "mlp")].bias
    bias[4] = float("nan")
    with raises(PlanError, "not-finite", "mlp.0.bias", "float32"):
        branch_replacements_of(PLAN, given, family_loaded("llama").model)


@pytest.mark.genai
@pytest.mark.parametrize("target", ["onnxruntime-cpu", "tensorrt"])
def test_fused_forms_agree_too(target: Any, tmp_path: Path) -> None:
    """Caches in place, packed products, norms fused with sums; one plan for all of them."""
    from exporter.export.forms.targets import write_form
    from tests.tiny_models import family_loaded as fusable

    loaded = fusable("qwen2", vocab_size=96, hidden_size=64, head_dim=16)
    (tmp_path / "whole").mkdir()
    write_form(loaded, tmp_path / "whole", target=target)
    given = random_replacements(64, PLAN, rank=RANK)
    source, target_file = tmp_path / "whole" / "model.onnx", tmp_path / "cut" / "model.onnx"
    assert all(check.passed for check in checks_of(loaded, source, target_file, given, given))
    other = random_replacements(64, PLAN, rank=RANK, seed=1)
    checks = checks_of(loaded, source, target_file, given, other)
    assert not all(check.passed for check in checks)
