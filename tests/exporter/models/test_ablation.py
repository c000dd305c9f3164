"""Cut models run from the first changed layer on: as the whole run with hooks of the test's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from exporter.errors import PlanError, ScoringError
from exporter.models.ablation.branch_replacements import (
    NOTHING,
    BranchReplacement,
    branches_replaced,
)
from exporter.models.ablation.meter import DamageMeter
from exporter.models.architectures import sublayers
from exporter.models.families import FAMILIES
from exporter.models.residual_stream import first_tensor
from tests.raising import raises
from tests.tiny_models import hook_count, tiny_model

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")

_HIDDEN = 32
_IDS = np.random.default_rng(0).integers(3, 60, (3, 12))
_ALL = np.ones_like(_IDS, dtype=np.bool_)


def _branch_replacements() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    bias = torch.randn(_HIDDEN, generator=generator) * 0.1
    left = torch.randn(_HIDDEN, 4, generator=generator) * 0.3
    right = torch.randn(4, _HIDDEN, generator=generator) * 0.3
    return {
        "none": NOTHING,
        "bias": BranchReplacement(bias),
        "linear": BranchReplacement(bias, (left @ right,)),
        "factors": BranchReplacement(bias, (right, left)),
    }


def _kl(model: Any, cut: Any) -> float:
    """The whole model's and the cut one's distributions, with no part of them reused."""
    ids = torch.tensor(_IDS)
    with torch.no_grad():
        whole = model(ids).logits.log_softmax(-1)
        with branches_replaced(model, cut):
            other = model(ids).logits.log_softmax(-1)
    return float((whole.exp() * (whole - other)).sum(-1)[:, :-1].mean())


def _generating() -> list[str]:
    own_heads = ("bert", "camembert", "electra", "roberta", "xlm-roberta")
    others = ("deberta-v2", "distilbert", "esm", "mpnet", "modernbert", "eurobert")
    pictures = ("vit", "deit", "dinov2")
    return [name for name in sorted(FAMILIES) if name not in own_heads + others + pictures]


@pytest.mark.parametrize("model_type", _generating())
def test_from_the_changed_layer_on_as_from_the_first(model_type: str) -> None:
    model, kinds = tiny_model(model_type), _branch_replacements()
    meter = DamageMeter(model, _IDS, _ALL, batch_size=2)
    first: Any = {(0, "attention"): kinds["bias"]}
    extensions: list[Any] = [
        {(1, "attention"): kinds["none"]},
        {(1, "mlp"): kinds["none"]},
        {(2, "mlp"): kinds["bias"], (0, "mlp"): kinds["none"]},
        {(1, "attention"): kinds["linear"], (2, "mlp"): kinds["none"]},
    ]
    cuts = [{**first, **extension} for extension in extensions]
    many = meter.measure_many(first, cuts)
    for damage, cut in zip(many, [first, *cuts], strict=True):
        expected = _kl(model, cut)
        # float32 sums over the vocabulary, in another order.
        assert damage.kl == pytest.approx(expected, abs=1e-5 * max(1, expected))
        assert damage.kl > 1e-4
    assert hook_count(model) == 0


def test_a_sublayer_that_comes_back_counts_as_changed() -> None:
    model, kinds = tiny_model("llama"), _branch_replacements()
    meter = DamageMeter(model, _IDS, _ALL)
    both = {(0, "attention"): kinds["none"], (1, "mlp"): kinds["none"]}
    swapped = {(1, "mlp"): kinds["none"]}
    # float32 rounding.
    assert meter.measure_many(both, [swapped])[1].kl == pytest.approx(_kl(model, swapped), abs=1e-6)


def test_nothing_cut_costs_nothing() -> None:
    damage = DamageMeter(tiny_model("llama"), _IDS, _ALL).measure({})
    assert damage.kl == pytest.approx(0, abs=1e-6)  # float32 rounding
    assert damage.log_perplexity_increase == pytest.approx(0, abs=1e-6)
    assert damage.top1_agreement == 1.0
    assert damage.positions.tolist() == [11, 11, 11]


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "granite", "bloom", "opt", "gpt_neox"])
def test_the_branches_own_map_changes_nothing(model_type: str) -> None:
    """A branch that is a linear map of what it reads is replaced by itself, multiplier and all."""
    model = tiny_model(model_type)
    part = sublayers(model)[3]
    seen: list[Any] = []
    first = part.reads.register_forward_pre_hook(
        lambda _m, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    second = part.contribution.register_forward_hook(
        lambda _m, _i, output: seen.append(first_tensor(output))
    )
    with torch.no_grad():
        model(torch.tensor(_IDS))
    first.remove()
    second.remove()
    read, gave = (tensor.reshape(-1, _HIDDEN).double() for tensor in seen)
    # Fewer tokens than a norm leaves dimensions: there is a map that gives their outputs exactly.
    few = _HIDDEN - 8
    weight = torch.linalg.lstsq(read[:few], gave[:few] * part.multiplier).solution
    name: Any = (part.layer, part.kind)
    cut = {name: BranchReplacement(None, (weight.T.float(),))}
    with branches_replaced(model, cut), torch.no_grad():
        other: list[Any] = []
        hook = part.contribution.register_forward_hook(
            lambda _m, _i, output: other.append(first_tensor(output))
        )
        model(torch.tensor(_IDS))
        hook.remove()
    fitted = other[0].reshape(-1, _HIDDEN).double()
    # The system's condition times float32's rounding.
    assert (fitted - gave)[:few].abs().max() <= 1e-3 * gave.abs().max()
    assert (fitted - gave)[few:].abs().max() >= 1e-2 * gave.abs().max()


def test_padding_is_left_out() -> None:
    model = tiny_model("llama")
    mask = _ALL.copy()
    mask[0, 8:] = False
    cut = {(1, "attention"): NOTHING}
    damage = DamageMeter(model, _IDS, mask).measure(cut)
    assert damage.positions.tolist() == [7, 11, 11]
    alone = DamageMeter(model, _IDS[:1, :8], _ALL[:1, :8]).measure(cut)
    assert damage.kl_sums[0] == pytest.approx(alone.kl_sums[0], rel=1e-4)  # other attention kernel


def test_a_layer_that_is_not_there() -> None:
    model = tiny_model("llama")
    with (
        raises(PlanError, "layer-missing", 9),
        branches_replaced(model, {(9, "mlp"): NOTHING}),
    ):
        pass


def test_logits_that_are_not_finite() -> None:
    model, nan = tiny_model("llama"), torch.full((_HIDDEN,), float("nan"))
    meter = DamageMeter(model, _IDS, _ALL)
    with raises(ScoringError, "not-finite", 0, "mlp 1"):
        meter.measure({(1, "mlp"): BranchReplacement(nan)})


def test_a_model_without_a_language_head() -> None:
    with raises(ScoringError, "no-next-token"):
        DamageMeter(tiny_model("vit"), _IDS, _ALL)


def test_samples_of_one_token() -> None:
    with raises(ScoringError, "no-tokens"):
        DamageMeter(tiny_model("llama"), _IDS[:, :1], _ALL[:, :1])


def test_a_whole_model_that_is_not_finite_is_not_blamed_on_the_cut() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    meter = DamageMeter(model, _IDS, _ALL)
    with raises(ScoringError, "not-finite", 0):
        meter.measure({(1, "mlp"): NOTHING})


def test_tokens_that_a_model_rules_out_cost_nothing() -> None:
    cut = {(1, "mlp"): NOTHING}
    model = tiny_model("llama")
    shorter = DamageMeter(_without_last_token(model, drop=True), _IDS, _ALL).measure(cut)
    model = tiny_model("llama")
    masked = DamageMeter(_without_last_token(model, drop=False), _IDS, _ALL).measure(cut)
    assert masked.kl == pytest.approx(shorter.kl, rel=1e-4)  # float32 sums in another order
    assert masked.log_perplexity_increase == pytest.approx(
        shorter.log_perplexity_increase, rel=1e-4
    )


def _without_last_token(model: Any, *, drop: bool) -> Any:
    """Its head says nothing of the last token, or that it never comes."""

    def hook(_module: Any, _inputs: Any, output: Any) -> Any:
        kept, last = output[..., :-1], output[..., -1:]
        return kept if drop else torch.cat([kept, torch.full_like(last, -torch.inf)], dim=-1)

    model.get_output_embeddings().register_forward_hook(hook)
    return model


def test_a_token_that_only_the_cut_model_rules_out_is_refused() -> None:
    from exporter.models.ablation.damage import Reference

    logits = torch.zeros(1, 2, 4)
    ruled_out = logits.clone()
    ruled_out[..., 3] = -torch.inf
    mask = torch.ones(1, 2, dtype=torch.bool)
    targets = torch.zeros(1, 2, dtype=torch.int64)
    reference = Reference(logits, targets, mask)
    assert not np.isfinite(reference.damage(ruled_out).kl_sums).any()
    nan = torch.full_like(logits, torch.nan)
    assert np.isnan(reference.damage(nan).kl_sums).all()
    assert np.isnan(Reference(nan, targets, mask).damage(logits).kl_sums).all()
