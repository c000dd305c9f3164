"""Cut encoders' embeddings against the whole one's, held against a plain forward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.errors import ScoringError
from exporter.models.ablation.branch_replacements import (
    NOTHING,
    BranchReplacement,
    branches_replaced,
)
from exporter.models.ablation.damage import (
    Damage,
    EmbeddingDamage,
    damage_of_numbers,
    ratio_std_error,
)
from exporter.models.ablation.embeddings import EmbeddingMeter, EmbeddingReference, meter_of
from tests.raising import raises
from tests.tiny_models import hook_count, tiny_model, write_sentence_files

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")

_HIDDEN = 32
_IDS = np.random.default_rng(0).integers(3, 60, (5, 12))
_MASK = np.arange(12) < np.array([12, 7, 12, 3, 9])[:, None]
# deberta-v2's relative positions and esm's dropout of tokens are not of interest here.
_ENCODERS = ("bert", "roberta", "electra", "mpnet", "distilbert", "modernbert", "llama", "gpt2")


def _cosines(model: Any, cut: Any, pool: Any = lambda states: states.mean(0)) -> list[float]:
    """Text by text, without padding and with nothing reused."""
    values = []
    for ids, mask in zip(_IDS, _MASK, strict=True):
        given = torch.tensor(ids[mask])[None]
        with torch.no_grad():
            whole = pool(model.base_model(given).last_hidden_state[0].double())
            with branches_replaced(model, cut):
                other = pool(model.base_model(given).last_hidden_state[0].double())
        values.append(float(torch.cosine_similarity(whole, other, dim=0)))
    return values


@pytest.mark.parametrize("model_type", _ENCODERS)
def test_the_cosines_are_those_of_texts_alone(model_type: str) -> None:
    model = tiny_model(model_type)
    bias = BranchReplacement(torch.full((_HIDDEN,), 0.2))
    meter = EmbeddingMeter(model, _IDS, _MASK, batch_size=2)
    first: Any = {(0, "attention"): NOTHING}
    others: list[Any] = [
        {**first, (1, "mlp"): NOTHING},
        {**first, (2, "attention"): bias},
        {(2, "mlp"): NOTHING},
    ]
    many = meter.measure_many(first, others)
    for damage, cut in zip(many, [first, *others], strict=True):
        # float32, padded in batches against alone
        assert damage.cosines.tolist() == pytest.approx(_cosines(model, cut), abs=1e-5)
        assert damage.cosine < 0.9999
    assert hook_count(model) == 0


@pytest.mark.parametrize("sizes", [(4, 4, 4, 4), (13, 1, 1, 1)])
def test_texts_of_one_document_keep_the_means_and_widen_their_errors(sizes: Any) -> None:
    rng, documents = np.random.default_rng(0), np.repeat(np.arange(4), sizes)
    cosines = 0.9 + 0.02 * rng.normal(size=4)[documents] + 0.002 * rng.normal(size=16)
    alone = EmbeddingDamage(cosines, rng.uniform(1, 2, (16, 6)), np.ones(16))
    result = alone.by_document(np.repeat(documents, 2))  # two inputs a text
    assert len(result.cosines) == 4
    assert result.cosine == pytest.approx(alone.cosine)
    assert result.correlation == pytest.approx(alone.correlation)
    expected = ratio_std_error(cosines, np.ones(16), documents)
    assert result.cosine_std_error == pytest.approx(expected)
    expected = ratio_std_error(alone.correlations, np.ones(16), documents)
    assert result.correlation_std_error == pytest.approx(expected)


def _states(model: Any, cut: Any) -> Any:
    """Each text's embedding of length 1, ``[texts, hidden]``."""
    result = []
    for ids, mask in zip(_IDS, _MASK, strict=True):
        with torch.no_grad(), branches_replaced(model, cut):
            mean = model(torch.tensor(ids[mask])[None]).last_hidden_state[0].double().mean(0)
        result.append((mean / mean.norm()).numpy())
    return np.stack(result)


def test_the_correlation_is_that_of_all_pairs_similarities() -> None:
    model, cut = tiny_model("bert"), {(1, "mlp"): NOTHING}
    damage = EmbeddingMeter(model, _IDS, _MASK, batch_size=2).measure(cut)  # all in one batch
    above = np.triu_indices(5, 1)
    both = [(item @ item.T)[above] for item in (_states(model, {}), _states(model, cut))]
    assert damage.correlation == pytest.approx(np.corrcoef(*both)[0, 1], abs=1e-5)  # float32
    assert damage.correlation < 0.9999
    assert EmbeddingMeter(model, _IDS, _MASK).measure({}).correlation == pytest.approx(1, abs=1e-6)
    again = damage_of_numbers({name: var.tolist() for name, var in vars(damage).items()})
    assert isinstance(again, EmbeddingDamage)
    assert again.correlation == damage.correlation


def test_the_spread_of_the_correlation_is_that_of_a_jackknife() -> None:
    rng = np.random.default_rng(0)
    whole = torch.from_numpy(rng.standard_normal((60, 8)))
    cut = whole + 0.5 * torch.from_numpy(rng.standard_normal((60, 8)))

    def measured(texts: Any) -> EmbeddingDamage:
        return EmbeddingReference(whole[texts]).damage(cut[texts])

    every = np.arange(60)
    damage, left = measured(every), [measured(every[every != n]).correlation for n in every]
    jackknife = float(np.sqrt(59 / 60 * ((np.array(left) - np.mean(left)) ** 2).sum()))
    assert damage.correlations.mean() == pytest.approx(damage.correlation)
    assert damage.correlation_std_error == pytest.approx(jackknife, rel=0.1)


def test_a_text_alone_has_no_pairs() -> None:
    model, cut = tiny_model("bert"), {(1, "mlp"): NOTHING}
    alone = EmbeddingMeter(model, _IDS[:1], _MASK[:1]).measure(cut)
    assert np.isnan(alone.correlation)
    assert alone.finite.all()


def test_states_are_pooled_as_the_model_s_folder_says(tmp_path: Path) -> None:
    model, cut = tiny_model("bert"), {(1, "mlp"): NOTHING}
    by_mean = EmbeddingMeter(model, _IDS, _MASK).measure(cut)
    write_sentence_files(tmp_path, pooling={"pooling_mode": "lasttoken"})
    model.config.name_or_path = str(tmp_path)
    by_last = EmbeddingMeter(model, _IDS, _MASK).measure(cut)
    assert by_last.cosines == pytest.approx(
        _cosines(model, cut, lambda states: states[-1]), abs=1e-5
    )
    assert by_last.cosines != pytest.approx(by_mean.cosines, abs=1e-3)


@pytest.mark.parametrize(("family", "kind"), [("bert", EmbeddingDamage), ("llama", Damage)])
def test_what_is_measured_goes_by_the_model(family: str, kind: type) -> None:
    meter = meter_of(tiny_model(family), _IDS, _MASK)
    assert type(meter.measure({(0, "mlp"): NOTHING})) is kind


def test_next_tokens_can_not_be_asked_of_an_encoder_but_embeddings_of_a_decoder() -> None:
    with raises(ScoringError, "no-next-token"):
        meter_of(tiny_model("bert"), _IDS, _MASK, embeds=False)
    damage = meter_of(tiny_model("llama"), _IDS, _MASK, embeds=True).measure({})
    assert isinstance(damage, EmbeddingDamage)
