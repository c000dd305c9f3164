"""Damage to the choice among answers: as from each answer alone, with nothing reused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from exporter.errors import ScoringError
from exporter.models.ablation import choices
from exporter.models.ablation.branch_replacements import NOTHING, branches_replaced
from exporter.models.ablation.choices import ChoiceItem, ChoiceItems, ChoiceMeter, ChoiceRow
from graph_passes.types import SublayerRef
from tests.raising import raises
from tests.tiny_models import hook_count, tiny_model

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")

CUTS: list[dict[SublayerRef, Any]] = [
    {},
    {SublayerRef(0, "attention"): NOTHING},
    {SublayerRef(1, "mlp"): NOTHING, SublayerRef(2, "attention"): NOTHING},
]


def _items(number: int = 6) -> list[ChoiceItem]:
    """With two to four answers of one to three tokens, after contexts of two to nine."""
    draw = np.random.default_rng(0)

    def ids(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw.integers(3, 60, draw.integers(low, high)).tolist())

    choice_items = []
    for at in range(number):
        context = ids(2, 10)
        rows = tuple(ChoiceRow(context, ids(1, 4)) for _ in range(2 + at % 3))
        choice_items.append(ChoiceItem(rows, int(draw.integers(len(rows)))))
    return choice_items


def _alone(model: Any, row: ChoiceRow, cut: Any) -> float:
    whole = torch.tensor([[*row.context, *row.answer]])
    with torch.no_grad(), branches_replaced(model, cut):
        log_p = model(whole).logits.log_softmax(-1)[0]
    first = len(row.context) - 1
    return float(sum(log_p[first + n, token] for n, token in enumerate(row.answer)))


def _log_probabilities(model: Any, items: list[ChoiceItem], cut: Any) -> list[Any]:
    results = []
    for item in items:
        sums = torch.tensor([_alone(model, row, cut) for row in item.rows], dtype=torch.double)
        results.append(sums.log_softmax(-1))
    return results


@pytest.mark.parametrize("run_tokens", [1, 60, 10_000])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2", "falcon", "bloom"])
def test_the_damage_is_that_to_the_odds_of_the_right_answer(
    model_type: str, run_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choices, "_RUN_TOKENS", run_tokens)
    model, items = tiny_model(model_type), _items()
    gold = [item.gold for item in items]
    whole, *_ = tables = [_log_probabilities(model, items, cut) for cut in CUTS]
    hooks = hook_count(model)
    many = ChoiceMeter(model, items).measure_many(CUTS[0], CUTS[1:])
    assert hook_count(model) == hooks
    for damage, table in zip(many, tables, strict=True):
        expected = [float(w[g] - t[g]) for w, t, g in zip(whole, table, gold, strict=True)]
        lost = damage.nll_sums - damage.baseline_nll_sums
        np.testing.assert_allclose(lost, expected, atol=2e-5)
        kl = [float((w.exp() * (w - t)).sum()) for w, t in zip(whole, table, strict=True)]
        np.testing.assert_allclose(damage.kl_sums, kl, atol=2e-5)
        alike = [bool(w.argmax() == t.argmax()) for w, t in zip(whole, table, strict=True)]
        assert damage.agreements.tolist() == alike
        assert damage.positions.tolist() == [1.0] * len(items)
    assert many[1].log_perplexity_increase == pytest.approx(
        float(np.mean([w[g] - t[g] for w, t, g in zip(whole, tables[1], gold, strict=True)])),
        abs=2e-5,
    )
    assert abs(many[1].log_perplexity_increase) > 1e-3
    assert abs(many[0].log_perplexity_increase) < 1e-6


def test_log_likelihoods_are_those_of_each_answer_alone() -> None:
    model, items = tiny_model("llama"), _items()
    for cut in CUTS:
        result = ChoiceMeter(model, items).log_likelihoods(cut)
        expected = [[_alone(model, row, cut) for row in item.rows] for item in items]
        assert [len(values) for values in result] == [len(item.rows) for item in items]
        np.testing.assert_allclose(np.concatenate(result), np.concatenate(expected), atol=5e-5)


def test_answers_of_one_token_after_one_context_share_a_row() -> None:
    model = tiny_model("llama")
    answers = [(7,), (8,), (9, 10), (9, 11)]
    item = ChoiceItem(tuple(ChoiceRow((4, 5, 6), answer) for answer in answers), 0)
    other = ChoiceItem(tuple(ChoiceRow(context, (7,)) for context in ((4, 5), (5, 4))), 1)
    meter, read = ChoiceMeter(model, [item, other]), []
    handle = model.register_forward_pre_hook(
        lambda _module, _args, kwargs: read.append(kwargs["input_ids"]), with_kwargs=True
    )
    meter.log_likelihoods({})
    handle.remove()
    (ids,) = read
    assert ids.tolist() == [[4, 5, 6, 6], [4, 5, 6, 9], [4, 5, 5, 5], [5, 4, 4, 4]]


def test_a_model_without_next_tokens_is_refused() -> None:
    with raises(ScoringError, "no-next-token"):
        ChoiceMeter(tiny_model("bert"), _items(1))


def test_items_are_known_again_by_their_tokens_and_by_what_is_right() -> None:
    items = tuple(_items(3))
    part = ChoiceItems("a.jsonl", "0" * 64, items).part
    assert (part.samples, part.unit, part.sha256) == (3, "item", "0" * 64)
    assert part.sequence_length == max(len(row.tokens) for item in items for row in item.rows)
    first = items[0]
    others = [
        items[:2], items[::-1],
        (ChoiceItem(first.rows, (first.gold + 1) % len(first.rows)), *items[1:]),
    ]  # fmt: skip
    digests = {ChoiceItems("a.jsonl", "0" * 64, tuple(one)).part.ids_sha256 for one in others}
    assert len(digests) == len(others)
    assert part.ids_sha256 not in digests
