"""Attention in ONNX's own operator, with caches that grow or lie in place."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from decoder_graphs import (
    CALLS,
    HEADS,
    POSITIONS,
    DecoderSpec,
    count,
    decoder_feed,
    decoder_model,
)
from graph_support import run, session

from graph_passes import Deletion, masked_model, prune_graph
from graph_passes.errors import FusionError
from graph_passes.fusing.cache_in_place import CacheInPlacePass
from graph_passes.fusing.grouped import GroupedAttentionPass
from tests.raising import raises

KNOWN = {
    "llama": DecoderSpec(),
    "written out": DecoderSpec(softmax=True, rotary="half"),
    "window": DecoderSpec(window=3),
    "one projection": DecoderSpec(projections="one", rotary="none"),
}
REFUSED = {
    "softcap": (DecoderSpec(softcap=2.0), "score-bound"),
    "turns": (DecoderSpec(repeats="in_turn"), "keys-order"),
}
MASKS_REFUSED = {
    "not causal": (DecoderSpec(mask="all"), "unknown-mask"),
    "biased": (DecoderSpec(mask="alibi"), "score-bias"),
}
Feed = dict[str, np.ndarray[Any, Any]]


def left_padded(feed: Feed) -> Feed:
    mask = feed["attention_mask"].copy()
    mask[-1, :2] = 0
    return {**feed, "attention_mask": mask}


def roomy(feed: Feed, room: int, *, rest: float = 0.0) -> Feed:
    """The same with caches and mask at full length; ``rest`` lies where nothing is filled."""
    result = dict(feed)
    for name, array in feed.items():
        axis = {"attention_mask": 1}.get(name, 2 if name.startswith("past") else None)
        if axis is not None:
            widths = [(0, room - n if place == axis else 0) for place, n in enumerate(array.shape)]
            filler = 0.0 if axis == 1 else rest
            result[name] = np.pad(array, widths, constant_values=filler)
    return result


def assert_alike(feed: Feed, found: Feed, wanted: Feed) -> None:
    real = feed["attention_mask"].astype(bool)
    total = real.shape[1]
    assert found.keys() == wanted.keys()
    scale = max(1.0, float(np.abs(wanted["logits"]).max()))
    for name, want in wanted.items():
        have = found[name]
        if name == "logits":
            rows = real[:, -want.shape[1] :]
        else:
            have, want = (item[:, :, :total].swapaxes(1, 2) for item in (have, want))
            rows = real
        assert np.isfinite(have).all()
        assert float(np.abs(have - want)[rows].max()) <= 1e-5 * scale, name


@pytest.mark.parametrize("name", KNOWN)
def test_nothing_is_repeated_and_nothing_changes(name: str) -> None:
    model = decoder_model(KNOWN[name])
    grouped = model.clone()
    assert GroupedAttentionPass()(grouped).modified
    assert not GroupedAttentionPass()(grouped).modified
    attentions = [node for node in grouped.graph if node.op_type == "Attention"]
    assert len(attentions) == 2
    for node in attentions:
        query, key, value = node.inputs[:3]
        assert query is not None
        assert query.shape is not None
        assert query.shape[1] == HEADS
        assert all(v is not None and v.is_graph_output() for v in (key, value))
    before, after = session(model, optimise=False), session(grouped, optimise=False)
    for call in CALLS:
        feed = decoder_feed(model, **call)
        assert_alike(feed, run(after, feed), run(before, feed))


@pytest.mark.parametrize("name", KNOWN)
def test_in_place_it_computes_the_same(name: str) -> None:
    model = decoder_model(KNOWN[name])
    fixed = model.clone()
    CacheInPlacePass(POSITIONS)(fixed)
    assert fixed.opset_imports[""] == 24
    assert (count(fixed, "TensorScatter"), count(fixed, "Attention")) == (4, 2)
    assert count(fixed, "Expand") == 1  # where to write; no keys
    before, after = session(model, optimise=False), session(fixed, optimise=False)
    for call in CALLS:
        for feed in (decoder_feed(model, **call), left_padded(decoder_feed(model, **call))):
            assert_alike(feed, run(after, roomy(feed, POSITIONS)), run(before, feed))
    shapes = {v.name: list(v.shape) for v in (*fixed.graph.inputs, *fixed.graph.outputs)}
    assert shapes["attention_mask"][1] == POSITIONS
    assert {shapes[n][2] for n in shapes if n.startswith(("past", "pres"))} == {POSITIONS}


def test_what_is_not_filled_does_not_count() -> None:
    model = decoder_model()
    CacheInPlacePass(POSITIONS)(model)
    ready = session(model, optimise=False)
    feed = decoder_feed(model, seq=2, past=5)
    wanted = run(ready, roomy(feed, POSITIONS))
    assert_alike(feed, run(ready, roomy(feed, POSITIONS, rest=7.0)), wanted)
    touched = {**feed, "past_key_values.0.key": feed["past_key_values.0.key"] + 1}
    assert np.abs(run(ready, roomy(touched, POSITIONS))["logits"] - wanted["logits"]).max() > 1e-3


def test_a_full_cache_is_the_last_that_fits() -> None:
    model = decoder_model()
    fixed = model.clone()
    CacheInPlacePass(8)(fixed)
    feed = decoder_feed(model, seq=1, past=7)
    assert_alike(
        feed,
        run(session(fixed, optimise=False), roomy(feed, 8)),
        run(session(model, optimise=False), feed),
    )


@pytest.mark.parametrize("in_place", [False, True])
def test_a_cut_takes_the_caches_along(in_place: bool) -> None:
    model = decoder_model(DecoderSpec(layers=3))
    (CacheInPlacePass(POSITIONS) if in_place else GroupedAttentionPass())(model)
    feed = decoder_feed(decoder_model(DecoderSpec(layers=3)), seq=3, past=4)
    feed = roomy(feed, POSITIONS) if in_place else feed
    plan = [Deletion(1, "attention")]
    cut, _ = prune_graph(model, plan)
    assert count(cut, "TensorScatter") == (4 if in_place else 0)
    names = [value.name for value in cut.graph.inputs]
    assert [name for name in names if "past" in name] == [
        f"past_key_values.{n}.{part}" for n in (0, 2) for part in ("key", "value")
    ]
    wanted = run(session(masked_model(model, plan), optimise=False), feed)
    result = run(session(cut, optimise=False), {name: feed[name] for name in names})
    for name, array in result.items():
        np.testing.assert_allclose(array, wanted[name], rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("name", REFUSED)
def test_an_attention_of_another_kind_is_refused(name: str) -> None:
    spec, code = REFUSED[name]
    for item in (GroupedAttentionPass(), CacheInPlacePass(POSITIONS)):
        model = decoder_model(spec)
        before = ir.to_onnx_text(model, exclude_initializers=True)
        with raises(FusionError, code):
            item.call(model)
        assert ir.to_onnx_text(model, exclude_initializers=True) == before


@pytest.mark.parametrize("name", MASKS_REFUSED)
def test_a_mask_of_another_kind_is_refused(name: str) -> None:
    spec, code = MASKS_REFUSED[name]
    with raises(FusionError, code):
        CacheInPlacePass(POSITIONS).call(decoder_model(spec))


def test_where_caches_grow_a_mask_may_be_of_any_kind() -> None:
    model = decoder_model(DecoderSpec(mask="alibi"))
    grouped = model.clone()
    GroupedAttentionPass()(grouped)
    feed = decoder_feed(model, seq=3, past=5)
    before, after = session(model, optimise=False), session(grouped, optimise=False)
    assert_alike(feed, run(after, feed), run(before, feed))


def test_who_reads_a_length_that_is_fixed_is_told() -> None:
    model = decoder_model()
    past = next(v for v in model.graph.inputs if v.name == "past_key_values.0.key")
    length = ir.node("Shape", [past], {"start": 2, "end": 3}, name="asks")
    length.outputs[0].name, length.outputs[0].type = "length", ir.TensorType(ir.DataType.INT64)
    length.outputs[0].shape = ir.Shape([1])
    model.graph.append(length)
    model.graph.outputs.append(length.outputs[0])
    with raises(FusionError, "length-read", "'asks'"):
        CacheInPlacePass(POSITIONS).call(model)


def test_an_old_opset_is_not_raised() -> None:
    model = decoder_model(DecoderSpec(softmax=True, rotary="half", norm="LayerNormalization"))
    model.opset_imports[""] = 17
    with raises(FusionError, "opset-too-old", 17, 23):
        GroupedAttentionPass().call(model)
