"""Attentions on caches in place for one phase: without masks, and with the same results."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from decoder_graphs import POSITIONS, DecoderSpec, decoder_feed, decoder_model
from graph_support import run, session
from test_onnx_attention import Feed, assert_alike, count, roomy

from graph_passes import Deletion, prune_graph
from graph_passes.fusing.cache_in_place import CacheInPlacePass
from graph_passes.fusing.one_phase import OnePhasePass

PROMPTS: list[dict[str, int]] = [{"seq": 9}, {"seq": 9, "padding": 3}, {"seq": 1}]
STEPS: list[dict[str, int]] = [{"seq": 1, "past": 6}, {"seq": 1}, {"seq": 1, "past": POSITIONS - 1}]


def in_place(**spec: Any) -> ir.Model:
    model = decoder_model(DecoderSpec(**spec))
    CacheInPlacePass(POSITIONS)(model)
    return model


def for_phase(model: ir.Model, phase: str) -> ir.Model:
    result = model.clone()
    assert OnePhasePass(phase)(result).modified  # type: ignore[arg-type]
    return result


def answers(model: ir.Model, feed: Feed) -> Feed:
    return run(session(model, optimise=False), feed)


@pytest.mark.parametrize(("phase", "calls"), [("prefill", PROMPTS), ("decode", STEPS)])
def test_it_computes_what_the_mask_lets_it_see(phase: str, calls: list[dict[str, int]]) -> None:
    model = in_place()
    one = for_phase(model, phase)
    for call in calls:
        feed = decoder_feed(decoder_model(), **call)
        wide = roomy(feed, POSITIONS)
        assert_alike(feed, answers(one, wide), answers(model, wide))


def test_no_mask_is_left() -> None:
    model = in_place()
    assert count(model, "Less") == count(model, "Or") == 1
    for phase in ("prefill", "decode"):
        one = for_phase(model, phase)
        assert count(one, "Less") == count(one, "Or") == count(one, "Range") == 0
        assert count(one, "TensorScatter") == 4
        assert [value.name for value in one.graph.inputs] == [v.name for v in model.graph.inputs]


def test_a_prefill_reads_no_cache() -> None:
    """What a cache holds is overwritten or left as it is, and seen by nothing."""
    prefill = for_phase(in_place(), "prefill")
    feed = decoder_feed(decoder_model(), seq=4)
    empty, filled = (answers(prefill, roomy(feed, POSITIONS, rest=rest)) for rest in (0.0, 7.0))
    assert np.array_equal(empty["logits"], filled["logits"])


def test_a_prefill_is_none_for_filled_caches() -> None:
    model = in_place()
    feed = roomy(decoder_feed(decoder_model(), seq=3, past=4, batch=1), POSITIONS)
    result, wanted = answers(for_phase(model, "prefill"), feed), answers(model, feed)
    assert np.abs(result["logits"] - wanted["logits"]).max() > 1e-2


def test_a_decode_step_is_none_for_several_tokens() -> None:
    model = in_place()
    feed = roomy(decoder_feed(decoder_model(), seq=3, past=4, batch=1), POSITIONS)
    result, wanted = answers(for_phase(model, "decode"), feed), answers(model, feed)
    assert np.abs(result["logits"] - wanted["logits"]).max() > 1e-2


def test_each_row_has_its_own_length() -> None:
    """A row with less in its cache, and its padding behind, answers as it does alone."""
    decode = for_phase(in_place(), "decode")
    feed = roomy(decoder_feed(decoder_model(), seq=1, past=6), POSITIONS)
    feed["attention_mask"][1] = np.arange(POSITIONS) < 4
    feed["position_ids"][1] = 3
    alone = {name: array[1:] for name, array in feed.items()}
    short = answers(decode, alone)["logits"]
    np.testing.assert_allclose(answers(decode, feed)["logits"][1:], short, atol=1e-5)
    other = {**alone, "attention_mask": feed["attention_mask"][:1]}
    assert np.abs(answers(decode, other)["logits"] - short).max() > 1e-2


def test_a_cut_graph_is_rewritten_too() -> None:
    cut, _ = prune_graph(in_place(layers=3), [Deletion(0, "attention")])
    whole = roomy(decoder_feed(decoder_model(DecoderSpec(layers=3)), seq=1, past=5), POSITIONS)
    feed = {value.name or "": whole[value.name or ""] for value in cut.graph.inputs}
    assert len(feed) == len(whole) - 2
    result, wanted = answers(for_phase(cut, "decode"), feed), answers(cut, feed)
    np.testing.assert_allclose(result["logits"], wanted["logits"], atol=1e-5)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("kind", ["window", "growing"])
def test_what_a_mask_alone_can_tell_stays(kind: str, phase: str) -> None:
    model = in_place(window=3) if kind == "window" else decoder_model()
    before = ir.to_onnx_text(model, exclude_initializers=True)
    assert not OnePhasePass(phase)(model).modified  # type: ignore[arg-type]
    assert ir.to_onnx_text(model, exclude_initializers=True) == before
