"""Folding into the last products of kept branches, on tiny models of several families."""

from __future__ import annotations

from typing import Any

import pytest

from exporter.errors import HealingError, UsageError
from exporter.heal.options import HealOptions
from graph_passes.types import SublayerRef
from tests.raising import raises
from tests.tiny_models import hook_count, tiny_loaded

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")

from exporter.heal.fitting import Fitting  # noqa: E402
from exporter.heal.fold_places import (  # noqa: E402
    places_of,
    writers_of,
)
from exporter.heal.folded import folded  # noqa: E402
from exporter.heal.refit import refitted  # noqa: E402
from exporter.heal.ridge import LinearMap  # noqa: E402
from exporter.heal.texts import HealingTexts  # noqa: E402
from exporter.models.ablation.branch_replacements import NOTHING, branches_replaced  # noqa: E402
from exporter.models.architectures import layer_modules  # noqa: E402
from exporter.progress import QUIET  # noqa: E402
from tests.exporter.distill_cases import text  # noqa: E402

ATTENTION, MLP = SublayerRef(1, "attention"), SublayerRef(2, "mlp")
BLOCK = [SublayerRef(1, "attention"), SublayerRef(1, "mlp")]


def fitting(loaded: Any, names: list[SublayerRef], **options: Any) -> Fitting:
    first = text(40)
    texts = HealingTexts(first, (first.ref,), (text(8, seed=1),), None)
    return Fitting(loaded, texts, names, HealOptions(kind="fold", **options), None, QUIET)


def logits(model: Any, ids: Any) -> Any:
    with torch.inference_mode():
        return model(torch.from_numpy(ids)).logits.double()


def stream(model: Any, ids: Any) -> torch.Tensor:
    """What a model's backbone gives, also that of an encoder."""
    from exporter.models.residual_stream import run_backbone

    with torch.inference_mode():
        return run_backbone(model, {"input_ids": torch.from_numpy(ids)})[0].double()


@pytest.mark.parametrize("family", ["llama", "granite", "gpt2", "opt", "gpt_neox", "mixtral"])
@pytest.mark.parametrize("names", [[ATTENTION, MLP], BLOCK])
def test_answers_come_nearer_and_the_model_is_as_it_was(
    family: str, names: list[SublayerRef]
) -> None:
    loaded, judged = tiny_loaded(family), text(8, seed=2).input_ids
    before, hooks = logits(loaded.model, judged), hook_count(loaded.model)
    cut = dict.fromkeys(names, NOTHING)
    with branches_replaced(loaded.model, cut):
        bare = logits(loaded.model, judged)
    with folded(fitting(loaded, names)) as made:
        assert made.within is not None
        assert made.weights
        assert all(replacement is NOTHING for replacement in made.branch_replacements.values())
        with made.within(), branches_replaced(loaded.model, cut):
            healed = logits(loaded.model, judged)
    assert torch.equal(logits(loaded.model, judged), before)
    assert hook_count(loaded.model) == hooks
    assert (healed - before).square().mean() < 0.9 * (bare - before).square().mean()


def tapped_streams(model: Any, ids: Any, cut: Any, product: Any) -> tuple[Any, list[Any], Any]:
    """What a product reads and gives, and the streams of each layer, in one run of the model."""
    from exporter.models.residual_stream import hooked, run_backbone, tapped

    states: list[Any] = []
    heard: list[Any] = []

    def hear(_module: Any, args: Any, output: Any) -> None:
        heard[:] = [args[0].clone(), output.clone()]

    with (
        branches_replaced(model, cut),
        tapped(layer_modules(model), states.append),
        hooked([product.register_forward_hook(hear)]),
    ):
        run_backbone(model, {"input_ids": torch.from_numpy(ids)})
    return heard[0].flatten(0, -2), states, heard[1].flatten(0, -2)


@pytest.mark.parametrize("family", ["llama", "granite", "gpt2", "opt", "gpt_neox"])
def test_the_first_fold_is_the_map_beside_the_product(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand from runs of the whole model: weighted least squares, added as an operator."""
    monkeypatch.setattr("exporter.heal.folded.writers_of", lambda *_: [])
    loaded, fitted_on = tiny_loaded(family), text(40)
    cut = dict.fromkeys(BLOCK, NOTHING)
    place = places_of(loaded.model, layer_modules(loaded.model), BLOCK)[0][0]
    assert place.gap == tuple(BLOCK)
    assert place.part.ref == SublayerRef(0, "mlp")
    ids, factor = fitted_on.input_ids, place.part.multiplier
    _, whole, _ = tapped_streams(loaded.model, ids, {}, place.product)
    u, bare, given = tapped_streams(loaded.model, ids, cut, place.product)
    wanted = whole[1].leaving.flatten(0, -2).double()
    now = bare[0].leaving.flatten(0, -2).double()
    x = u.double()
    if place.product.bias is not None:
        x = torch.cat([x, torch.ones(len(x), 1)], 1)
    roots = wanted.square().mean(-1, keepdim=True).rsqrt()
    operator = torch.linalg.lstsq(x * roots, (wanted - now) * roots).solution
    with folded(fitting(loaded, BLOCK, ridge=1e-12)) as made:
        assert made.within is not None
        with made.within():
            v, _, result = tapped_streams(loaded.model, ids, cut, place.product)
    assert torch.equal(u, v)
    # Both are float32 models; the fits are float64.
    torch.testing.assert_close(
        result.double(), given.double() + x @ operator / factor, rtol=0, atol=2e-4
    )
    assert (result - given).abs().max() > 0.01


@pytest.mark.parametrize("names", [BLOCK, [ATTENTION, MLP]])
@pytest.mark.parametrize("family", ["llama", "granite"])
def test_a_factor_multiplies_the_stream_before_a_gap_and_nothing_that_branches_read(
    family: str, names: list[SublayerRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    def doubled(first: Any, later: Any, ridges: Any) -> Any:
        return None, 2.0

    monkeypatch.setattr("exporter.heal.refit.map_and_factor", doubled)
    monkeypatch.setattr("exporter.heal.folded._refuse_loss", lambda *_: None)
    loaded, ids = tiny_loaded(family), text(8, seed=2).input_ids
    layers, cut = layer_modules(loaded.model), dict.fromkeys(names, NOTHING)
    places = places_of(loaded.model, layers, names)[0]
    assert len(writers_of(loaded.model, layers, names, places)) >= 3
    read, bare, _ = tapped_streams(loaded.model, ids, cut, places[0].product)
    with folded(fitting(loaded, names)) as made:
        assert made.within is not None
        with made.within():
            read_now, now, _ = tapped_streams(loaded.model, ids, cut, places[0].product)
    # A norm's epsilon is all that can tell the two apart.
    torch.testing.assert_close(read_now, read, rtol=0, atol=2e-3)
    factor = 2.0 ** len(places)
    torch.testing.assert_close(now[0].leaving, factor * bare[0].leaving, rtol=0, atol=2e-2)


@pytest.mark.parametrize("mapped", [False, True])
def test_weights_of_16_bits_are_rounded_once_whatever_the_number_of_gaps(
    mapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    factors = iter([1.003, 1.003, 1.003])
    torch.manual_seed(0)
    change = LinearMap(torch.randn(32, 48) * 1e-3, torch.zeros(32))
    maps = iter([change if mapped else None, None, None])
    monkeypatch.setattr(
        "exporter.heal.refit.map_and_factor", lambda *_: (next(maps), next(factors))
    )
    loaded = tiny_loaded("llama", num_hidden_layers=4)
    loaded.model.to(torch.bfloat16)
    names = [SublayerRef(layer, "attention") for layer in (1, 2, 3)]
    layers = layer_modules(loaded.model)
    places = places_of(loaded.model, layers, names)[0]
    writers = writers_of(loaded.model, layers, names, places)
    assert len(places) == 3
    cut = dict.fromkeys(names, NOTHING)
    fitted = refitted(loaded.model, text(8), layers, cut, places, writers=writers)
    values = {value.name: value for value in fitted}
    embedding = values["model.embed_tokens.weight"]
    wide, again = embedding.parameter.double() * 1.003**3, embedding.parameter
    for _ in range(3):
        again = (again.double() * 1.003).bfloat16()
    assert torch.equal(embedding.other, wide.bfloat16())
    assert not torch.equal(embedding.other, again)
    first = values[f"{places[0].name}.weight"]
    wide = first.parameter.double() * 1.003**3
    if mapped:
        wide = wide + change.weight.double() * 1.003**2
    torch.testing.assert_close(first.other, wide.bfloat16(), rtol=2**-8, atol=0)


@pytest.mark.parametrize(
    ("family", "tied"),
    [
        ("llama", True),  # the head reads the embedding's weight
        ("bloom", False),  # a norm follows the embedding
        ("gemma2", False),  # a norm follows each product
        ("mixtral", False),  # experts
    ],
)
def test_no_factor_where_not_all_that_writes_to_the_stream_can_be_multiplied(
    family: str, tied: bool
) -> None:
    llama = tiny_loaded("llama").model
    model = tiny_loaded(family, tie_word_embeddings=tied).model
    places = places_of(llama, layer_modules(llama), BLOCK)[0]
    assert writers_of(llama, layer_modules(llama), BLOCK, places)
    assert writers_of(model, layer_modules(model), BLOCK, places) == []


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([SublayerRef(1, "attention")], [(0, "mlp")]),
        ([ATTENTION, MLP], [(0, "mlp"), (2, "attention")]),
        (BLOCK, [(0, "mlp")]),
        ([SublayerRef(0, "attention"), SublayerRef(0, "mlp")], [(1, "attention")]),
        ([SublayerRef(0, "attention"), SublayerRef(2, "mlp")], [(0, "mlp"), (2, "attention")]),
        ([SublayerRef(2, "mlp")], [(2, "attention")]),
    ],
)
def test_places_are_the_last_products_before_gaps_or_else_behind_them(
    names: list[SublayerRef], expected: Any
) -> None:
    model = tiny_loaded("llama").model
    places, without = places_of(model, layer_modules(model), names)
    assert [tuple(place.part.ref) for place in places] == expected
    assert without == []
    before = [ref for place in places for ref in place.gap]
    assert before == [ref for ref in names if ref.layer]


def test_a_gap_behind_experts_is_made_up_for_by_the_next_product() -> None:
    mixtral = tiny_loaded("mixtral").model
    places, without = places_of(mixtral, layer_modules(mixtral), [ATTENTION])
    assert [tuple(place.part.ref) for place in places] == [(2, "attention")]
    assert without == [SublayerRef(0, "mlp"), SublayerRef(1, "mlp")]


@pytest.mark.parametrize(
    ("family", "code"), [("bert", "fold-behind-norm"), ("gemma2", "nothing-to-fold-into")]
)
def test_what_can_not_be_folded_is_refused(family: str, code: str) -> None:
    with raises(HealingError, code, "--heal linear"), folded(fitting(tiny_loaded(family), BLOCK)):
        pass


@pytest.mark.parametrize(
    ("family", "names", "replaced"),
    [
        ("mixtral", [ATTENTION, MLP], [ATTENTION]),  # experts stand before it
        ("bert", BLOCK, BLOCK),
        ("llama", [ATTENTION, MLP], []),
    ],
)
def test_operators_stand_where_nothing_can_be_folded_if_asked_for(
    family: str, names: list[SublayerRef], replaced: list[SublayerRef]
) -> None:
    loaded, judged = tiny_loaded(family), text(8, seed=2).input_ids
    before, bare = stream(loaded.model, judged), dict.fromkeys(names, NOTHING)
    result = fitting(loaded, names, replacements="linear")
    with folded(result) as made:
        kept = made.branch_replacements
        assert [ref for ref in names if kept[ref] is not NOTHING] == replaced
        assert all(kept[ref].maps for ref in replaced)
        assert made.fits.keys() == set(replaced)
        assert bool(made.weights) == (family != "bert")
        assert made.within is not None
        with branches_replaced(loaded.model, bare):
            lost = (stream(loaded.model, judged) - before).square().mean()
        with made.within(), branches_replaced(loaded.model, kept):
            left = (stream(loaded.model, judged) - before).square().mean()
    assert left < 0.9 * lost


def test_a_weight_that_others_read_is_no_place() -> None:
    loaded = tiny_loaded("llama")
    layers = loaded.model.model.layers
    layers[2].mlp.down_proj.weight = layers[0].mlp.down_proj.weight
    places, without = places_of(loaded.model, layer_modules(loaded.model), BLOCK)
    assert [tuple(place.part.ref) for place in places] == [(2, "attention")]
    assert without == [SublayerRef(0, "mlp")]


@pytest.mark.parametrize("harm", [None, 5.0])
def test_a_fold_that_is_no_better_on_other_text_is_refused(
    harm: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def harmful(*given: Any, **more: Any) -> Any:
        values = [] if harm is None else refitted(*given, **more)
        for value in values:
            value.other = value.other + harm
        return values

    monkeypatch.setattr("exporter.heal.folded.refitted", harmful)
    loaded = tiny_loaded("llama")
    with raises(HealingError, "folding-gained-nothing"), folded(fitting(loaded, BLOCK)):
        pass


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "fold", "rank": 3},
        {"kind": "fold", "tokens": 5000},
        {"kind": "fold", "train": "all"},
        {"kind": "linear", "replacements": "bias"},
        {"kind": "bias", "rank": 3},
        {"kind": "bias", "ridge": 0.1},
        {"ridge": -1.0},
        {"calibration": ("self", "self")},
        {"calibration": ("pydoc",), "check_text": "pydoc"},
    ],
)
def test_options_that_a_kind_does_not_have_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        HealOptions(**options)
    HealOptions(kind="fold", ridge=0.1, replacements="linear")
