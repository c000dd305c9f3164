"""Costs of a PyTorch model's branches: what is left out isn't computed, and the rest as before."""

from __future__ import annotations

import pytest

from exporter.choose.costs.measuring import CostSettings, measure_on
from exporter.choose.costs.request_shape import RequestShape
from exporter.choose.costs.table import groups_of, variants
from exporter.choose.costs.timing import Effort
from exporter.errors import CostError
from graph_passes.types import SublayerRef
from tests.raising import raises
from tests.tiny_models import family_loaded

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")

from exporter.choose.costs.torch_cost_runner import (  # noqa: E402
    random_stand_in,
    torch_runner,
    variant_model,
)
from exporter.choose.costs.weighing import module_sizes  # noqa: E402
from exporter.models.ablation.branch_replacements import (  # noqa: E402
    BranchReplacement,
    branches_replaced,
)

QUICK = Effort(seconds=0.3, rounds=2, reload=False)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_a_variant_computes_what_the_model_with_replacements(family: str) -> None:
    loaded = family_loaded(family)
    model, sizes, ids = loaded.model, module_sizes(loaded), torch.arange(12).reshape(2, 6)
    whole = model(input_ids=ids).logits
    for group in groups_of(sizes, list(sizes.sublayers)):
        for variant in variants(group, sizes, ("bias", "linear")):
            replacement = random_stand_in(sizes.hidden or 0, variant.replacement, model.dtype)
            with branches_replaced(model, dict.fromkeys(variant.names, replacement)):
                wanted = model(input_ids=ids).logits
            cut = variant_model(model, {*variant.names}, replacement)
            # The same sums, in the same order.
            torch.testing.assert_close(cut(input_ids=ids).logits, wanted, rtol=1e-5, atol=1e-6)
            assert not torch.equal(wanted, whole)
    torch.testing.assert_close(model(input_ids=ids).logits, whole, rtol=0, atol=0)


def test_a_variant_has_the_models_own_weights_and_computes_no_branch() -> None:
    model = family_loaded("llama").model
    cut = variant_model(model, {SublayerRef(1, "mlp")}, BranchReplacement())
    own = {id(weight) for weight in model.parameters()}
    assert {id(weight) for weight in cut.parameters()} == own
    called: list[int] = []
    for number, layer in enumerate(cut.model.layers):
        layer.mlp.up_proj.register_forward_hook(lambda *_, n=number: called.append(n))
    cut(input_ids=torch.zeros(1, 3, dtype=torch.long))
    assert called == [0]


def test_costs_are_measured() -> None:
    settings = CostSettings(RequestShape(1, 4, 1), threads=1, replacements=(), effort=QUICK)
    table = measure_on(torch_runner(family_loaded("llama")), settings, [(1, "attention")])
    assert table.backend == "pytorch"
    assert table.names == [(0, "attention"), (1, "attention")]
    assert table.saved_ms((0, "attention")) < table.baseline_ms


def test_layers_of_another_window_are_a_group_of_their_own() -> None:
    sizes = module_sizes(family_loaded("gemma2"))  # every second layer has a window
    assert sizes[0, "attention"].signature != sizes[1, "attention"].signature
    sizes = module_sizes(family_loaded("llama"))
    assert sizes[0, "attention"].signature == sizes[1, "attention"].signature
    assert sizes[0, "mlp"].signature != sizes[0, "attention"].signature


def test_a_branch_that_nothing_can_stand_for_is_refused() -> None:
    with raises(CostError, "branch-without-stand-in", "bloom"):
        variant_model(family_loaded("bloom").model, {SublayerRef(0, "mlp")}, BranchReplacement())
