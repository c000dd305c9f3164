"""Rule 1: a deleted branch equals the same model with that branch multiplied by zero."""

from __future__ import annotations

import pytest
from graph_support import (
    GRAPHS,
    SPECS,
    all_deletions,
    check_clean,
    check_tidy,
    feeds,
    largest_difference,
    oracle_error,
    proper_subsets,
    run,
    session,
    sites_of,
    smaller,
    tiny,
    tolerance,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graph_passes import Deletion, SurgeryError, prune_graph
from graph_passes.testing import masked_model
from tests.raising import raises
from tests.tiny_graphs import TinySpec, tiny_model


@pytest.mark.parametrize("name", GRAPHS)
def test_all_subsets_equal_the_masked_original(name: str) -> None:
    """To the bit, where no norm is taken apart."""
    model = smaller(name)
    subsets = proper_subsets(all_deletions(model))
    assert len(subsets) == 14
    assert max(oracle_error(model, subset) for subset in subsets) <= tolerance(name)


@pytest.mark.parametrize("name", SPECS)
def test_everything_is_bit_exact_where_it_is_allowed(name: str) -> None:
    model = smaller(name)
    everything = all_deletions(model)
    assert oracle_error(model, everything, allow_all=True) == 0.0
    pruned, report = prune_graph(model, everything, allow_all=True)
    assert len(report.deleted) == len(everything)
    check_clean(pruned)
    assert not [site for site in sites_of(pruned) if site.kind in ("attention", "mlp")]


@pytest.mark.parametrize("name", ["pre_norm", "parallel_in_turn"])
def test_all_subsets_of_three_layers_are_bit_exact(name: str) -> None:
    model = tiny(name)
    subsets = proper_subsets(all_deletions(model))
    assert len(subsets) == 62
    assert max(oracle_error(model, subset) for subset in subsets) == 0.0


@pytest.mark.parametrize("name", GRAPHS)
def test_with_the_runtimes_optimisations_on(name: str) -> None:
    model = smaller(name)
    subsets = proper_subsets(all_deletions(model))[::4]
    # ONNX Runtime fuses the Adds of the two graphs differently, so sums round differently.
    assert max(oracle_error(model, subset, optimise=True) for subset in subsets) <= 1e-5


@pytest.mark.parametrize("name", GRAPHS)
def test_every_result_is_clean_and_its_report_adds_up(name: str) -> None:
    model = smaller(name)
    for subset in proper_subsets(all_deletions(model)):
        pruned, report = prune_graph(model, subset)
        (check_clean if name in SPECS else check_tidy)(pruned)
        weights = report.before.parameters - report.after.parameters
        assert sum(entry.parameters_removed for entry in report.deleted) == weights
        nodes = report.before.nodes - report.after.nodes
        assert sum(entry.nodes_removed for entry in report.deleted) == pytest.approx(
            nodes, abs=2 if name in SPECS else 0
        )


_forms = st.sampled_from(
    ["pre_norm", "post_norm", "sandwich", "multiplier", "parallel", "parallel_in_turn", "split_mlp"]
)
# ONNX Runtime's Attention takes no mask that broadcasts over the queries, as an encoder's does.
_specs = st.builds(
    TinySpec, form=_forms, layers=st.integers(1, 4), cache=st.booleans(), past_from=st.just(0),
    gather_past=st.booleans(), fused=st.booleans(), tied=st.booleans(), router=st.booleans(),
    mask_in_branch=st.booleans(), annotated=st.booleans(),
).filter(lambda spec: spec.cache or not spec.fused)  # fmt: skip


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(spec=_specs, data=st.data())
def test_any_model_any_subset(spec: TinySpec, data: st.DataObject) -> None:
    model = tiny_model(spec, seed=1)
    everything = all_deletions(model)
    assert len(everything) == 2 * spec.layers
    subset = data.draw(
        st.lists(st.sampled_from(everything), min_size=1, max_size=len(everything) - 1, unique=True)
    )
    assert oracle_error(model, subset) == 0.0
    check_clean(prune_graph(model, subset)[0])


@pytest.mark.parametrize("name", GRAPHS)
def test_the_oracle_catches_the_wrong_layer(name: str) -> None:
    model = smaller(name)
    for item, done in ((0, 1), (1, 0)):
        for kind in ("attention", "mlp"):
            expected = session(masked_model(model, [Deletion(item, kind)]), optimise=False)
            wrong = session(prune_graph(model, [Deletion(done, kind)])[0], optimise=False)
            for feed in feeds(model):
                want, have = run(expected, feed), run(wrong, feed)
                assert (
                    largest_difference({"logits": want["logits"]}, {"logits": have["logits"]})
                    > 1e-3
                )


def test_masking_is_not_the_identity() -> None:
    model = tiny("pre_norm")
    masked = session(masked_model(model, [Deletion(1, "mlp")]), optimise=False)
    plain = session(model, optimise=False)
    for feed in feeds(model):
        assert largest_difference(run(plain, feed), run(masked, feed)) > 1e-3


def test_the_oracle_refuses_to_mask_what_is_not_there() -> None:
    with raises(SurgeryError, "sublayer-missing", "attention 7"):
        masked_model(tiny("pre_norm"), [Deletion(7, "attention")])
