"""A linear map in two factors equals the masked original plus the same, as one weight does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from fused_graphs import FUSED, fused_model
from graph_support import SPECS, check_clean, check_tidy, tiny
from replacement_support import numbers, plan, replaced_error
from test_runtime_graphs import CASES as QUANTISED
from test_runtime_graphs import MAKERS

from graph_passes import ReplacementTensors, SublayerRef, SurgeryError, prune_graph
from graph_passes.files.storage import load_model, save_model
from tests.raising import raises
from tests.tiny_graphs import tiny_model

# Sums are taken in another order, and a bias is rounded once more; relative to the largest output.
TOLERANCE = 2e-6
REF = SublayerRef(1, "attention")
RANK = 3
PLAN = plan(("attention", 1, "linear"), ("mlp", 0, "linear"), ("mlp", 1, "bias"))
ONE = plan(("attention", 1, "linear"))
FORMS = [
    *("pre_norm", "post_norm_decoder", "sandwich", "multiplier", "parallel", "split_mlp", "tied"),
    *("router", "unannotated", "genai", "genai_bias", "genai_layer_norm", "genai_parallel", "gpt2"),
]


@pytest.mark.parametrize("name", FORMS)
def test_two_factors_equal_the_masked_original(name: str) -> None:
    fused = name in FUSED
    model = fused_model(replace(FUSED[name], layers=3)) if fused else tiny(name)
    given = numbers(model, PLAN, rank=RANK)
    assert replaced_error(model, PLAN, given) <= TOLERANCE
    turned = {
        ref: one for ref, one in numbers(model, PLAN, rank=RANK, seed=1).items() if ref == REF
    }
    assert replaced_error(model, PLAN, given, other={**given, **turned}) > 1e-3
    pruned, report = prune_graph(model, PLAN, replacements=given)
    (check_tidy if fused else check_clean)(pruned)
    hidden = 32 if fused else 8
    added = {entry.kind + str(entry.layer): entry.parameters_added for entry in report.deleted}
    assert added["attention1"] in (2 * RANK * hidden, (2 * RANK + 1) * hidden)  # a bias may fold
    assert [
        pruned.graph.initializers[f"depthcut.attention.1.{factor}"].shape
        for factor in ("weight_down", "weight_up")
    ] == [(hidden, RANK), (RANK, hidden)]


def test_two_factors_equal_their_product() -> None:
    model = tiny("pre_norm")
    given = numbers(model, ONE, rank=RANK)
    down, up = given[REF].factors or ()
    product = {REF: ReplacementTensors(given[REF].bias, up @ down)}
    assert replaced_error(model, ONE, given, other=product) <= TOLERANCE
    swapped = {REF: ReplacementTensors(given[REF].bias, (up @ down).T)}
    assert replaced_error(model, ONE, given, other=swapped) > 1e-3


@pytest.mark.parametrize(("maker", "name"), QUANTISED[::3])
def test_quantised_and_optimised_graphs(maker: str, name: str, tmp_path: Path) -> None:
    form = (
        fused_model(replace(FUSED[name], layers=2))
        if name in FUSED
        else tiny_model(replace(SPECS[name], layers=2))
    )
    model = MAKERS[maker](form, tmp_path)
    given = numbers(model, ONE, rank=RANK)
    assert replaced_error(model, ONE, given) <= TOLERANCE
    assert replaced_error(model, ONE, given, other=numbers(model, ONE, rank=RANK, seed=1)) > 1e-3


def test_the_file_holds_both_factors_and_no_product(tmp_path: Path) -> None:
    model = tiny("pre_norm")
    pruned, _ = prune_graph(model, ONE, replacements=numbers(model, ONE, rank=RANK))
    save_model(pruned, tmp_path / "m.onnx")
    kept = load_model(tmp_path / "m.onnx").graph
    names = {name for name in kept.initializers if name.startswith("depthcut.")}
    assert names == {
        f"depthcut.attention.1.{part}" for part in ("bias", "weight_down", "weight_up")
    }
    products = [node.name for node in kept if node.name and node.name.startswith("depthcut.")]
    assert products[:2] == ["depthcut.attention.1.matmul_down", "depthcut.attention.1.matmul_up"]


def matrix(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


@pytest.mark.parametrize(
    ("given", "code", "fields"),
    [
        (ReplacementTensors(matrix(8), factors=(matrix(3, 7), matrix(8, 3))),
         "wrong-shape", ("weight_down", "attention 1", [3, 7])),
        (ReplacementTensors(matrix(8), factors=(matrix(3, 8), matrix(8, 4))),
         "wrong-shape", ("weight_up", "attention 1", [8, 4], [8, 3])),
        (ReplacementTensors(matrix(8), factors=(matrix(0, 8), matrix(8, 0))),
         "wrong-shape", ("weight_down",)),
        (ReplacementTensors(matrix(8), factors=(matrix(3, 8) * np.nan, matrix(8, 3))),
         "not-finite", ("weight_down", "attention 1")),
        (ReplacementTensors(matrix(8), matrix(8, 8), factors=(matrix(3, 8), matrix(8, 3))),
         "weight-given-twice", ("attention 1",)),
    ],
)  # fmt: skip
def test_wrong_factors_are_refused(
    given: ReplacementTensors, code: str, fields: tuple[object, ...]
) -> None:
    with raises(SurgeryError, code, *fields):
        prune_graph(tiny("pre_norm"), ONE, replacements={REF: given})


def test_factors_for_a_bias_are_refused() -> None:
    given = {REF: ReplacementTensors(matrix(8), factors=(matrix(3, 8), matrix(8, 3)))}
    with raises(SurgeryError, "unasked-weight"):
        prune_graph(tiny("pre_norm"), plan(("attention", 1, "bias")), replacements=given)


def test_in_a_graph_of_another_type_the_map_is_cast() -> None:
    """The factors are rounded to the stream's dtype, as one weight is."""
    model = tiny("pre_norm")
    given = numbers(model, ONE, rank=RANK, dtype=np.float64)
    pruned, _ = prune_graph(model, ONE, replacements=given)
    down = pruned.graph.initializers["depthcut.attention.1.weight_down"].const_value
    assert down is not None
    assert down.dtype == ir.DataType.FLOAT
