"""A decoder in fused operators computes what it computed, or is refused with the reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from decoder_graphs import (
    CALLS,
    POSITIONS,
    DecoderSpec,
    count,
    decoder_feed,
    decoder_model,
)
from graph_support import run, session

from graph_passes import Deletion, ResidualSite, find_sites, masked_model, prune_graph
from graph_passes.errors import FusionError
from graph_passes.fusing import fuse_decoder
from tests.raising import raises

FUSED = {
    "llama": DecoderSpec(),
    "half_rotated": DecoderSpec(rotary="half"),
    "halves_written_out": DecoderSpec(rotary="halves"),
    "pairs": DecoderSpec(rotary="pairs"),
    "looked_up": DecoderSpec(rotary="none", norm="LayerNormalization", bias=True),
    "norm_without_bias": DecoderSpec(norm="LayerNormalization", norm_bias=False),
    "qk_norm": DecoderSpec(qk_norm=True),
    "window": DecoderSpec(window=3),
    "softcap": DecoderSpec(softcap=2.0, window=4),
    "softmax": DecoderSpec(softmax=True),
    "one_projection": DecoderSpec(projections="one"),
    "biases": DecoderSpec(bias=True),
}
# Attentions that can't be what they were in the fused operator, and the words of the refusal.
REFUSED = {
    "not_causal": (DecoderSpec(mask="all"), "unknown-mask"),
    "bias_on_scores": (DecoderSpec(mask="alibi"), "score-bias"),
    "keys_in_turn": (DecoderSpec(repeats="in_turn"), "keys-order"),
}


def skips(counts: Mapping[str, int]) -> int:
    return sum(number for op_type, number in counts.items() if op_type.startswith("Skip"))


def difference(original: ir.Model, fused: ir.Model, call: dict[str, int]) -> float:
    """The largest of the logits and caches of real tokens, relative to the largest logit."""
    feed = decoder_feed(original, **call)
    wanted = run(session(original, optimise=False), feed)
    result = run(session(fused, optimise=False), feed)
    assert list(result) == list(wanted)
    real = feed["attention_mask"].astype(bool)
    worst = 0.0
    for name, have in result.items():
        want = wanted[name]
        rows = real[:, -have.shape[1] :] if name == "logits" else real
        if name != "logits":
            have, want = have.transpose(0, 2, 1, 3), want.transpose(0, 2, 1, 3)
        worst = max(worst, float(np.abs(have - want)[rows].max()))
    return worst / max(1.0, float(np.abs(wanted["logits"]).max()))


@pytest.mark.parametrize("name", FUSED)
def test_the_fused_form_computes_the_same(name: str) -> None:
    model = decoder_model(FUSED[name])
    before = ir.to_onnx_text(model, exclude_initializers=True)
    fused, report = fuse_decoder(model, positions=POSITIONS)
    assert ir.to_onnx_text(model, exclude_initializers=True) == before
    assert max(difference(model, fused, call) for call in CALLS) <= 1e-5
    skip = "Skip" + FUSED[name].norm.replace("RMS", "SimplifiedLayer")
    sums = 5 if name == "looked_up" else 4  # of tokens and positions, too
    assert report.fused == {"GroupQueryAttention": 2, skip: sums}
    assert report.packed == (0 if FUSED[name].qk_norm else 2)
    assert not any(count(fused, gone) for gone in ("Attention", "Softmax", "RotaryEmbedding"))
    assert report.remarks == ()


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_operator_cannot_do_is_refused(name: str) -> None:
    spec, code = REFUSED[name]
    model = decoder_model(spec)
    before = ir.to_onnx_text(model, exclude_initializers=True)
    with raises(FusionError, code):
        fuse_decoder(model, positions=POSITIONS)
    assert ir.to_onnx_text(model, exclude_initializers=True) == before


@pytest.mark.parametrize(
    ("rotary", "words"),
    [("by_length", "depends on the text's length"), ("quarter", "rotates no 8 of 32 numbers")],
)
def test_a_rotation_that_the_operator_cannot_do_stays_outside(rotary: Any, words: str) -> None:
    model = decoder_model(DecoderSpec(rotary=rotary))
    fused, report = fuse_decoder(model, positions=POSITIONS)
    assert max(difference(model, fused, call) for call in CALLS) <= 1e-5
    assert count(fused, "RotaryEmbedding") == 4
    assert "position_ids" in [value.name for value in fused.graph.inputs]
    assert words in report.remarks[0]


def test_positions_are_no_input_where_the_attention_counts_them() -> None:
    fused, _ = fuse_decoder(decoder_model(), positions=POSITIONS)
    assert "position_ids" not in [value.name for value in fused.graph.inputs]
    tables = [fused.graph.initializers[name] for name in ("cos_cache", "sin_cache")]
    assert [list(table.const_value.shape) for table in tables if table.const_value] == [
        [POSITIONS, 16], [POSITIONS, 16]
    ]  # fmt: skip


@pytest.mark.parametrize(("window", "told"), [(3, 3), (POSITIONS, -1), (None, -1)])
def test_a_window_is_found_by_trying(window: int | None, told: int) -> None:
    fused, _ = fuse_decoder(decoder_model(DecoderSpec(window=window)), positions=POSITIONS)
    nodes = [node for node in fused.graph if node.op_type == "GroupQueryAttention"]
    assert [node.attributes.get_int("local_window_size") for node in nodes] == [told, told]


def test_the_cache_lies_in_place() -> None:
    """Longer buffers, one for past and present, change nothing: no node asks for their length."""
    model = decoder_model()
    fused, _ = fuse_decoder(model, positions=POSITIONS)
    feed = decoder_feed(model, seq=1, past=6)
    running = session(fused, optimise=False)
    wanted = run(running, feed)
    binding, buffers = running.io_binding(), _buffers(feed, 16)
    for name in ("input_ids", "attention_mask"):
        binding.bind_cpu_input(name, feed[name])
    for name, buffer in buffers.items():
        binding.bind_ortvalue_input(name, buffer)
        binding.bind_ortvalue_output(name.replace("past_key_values", "present"), buffer)
    binding.bind_output("logits")
    running.run_with_iobinding(binding)
    result = binding.get_outputs()[-1].numpy()
    assert np.abs(result - wanted["logits"]).max() <= 1e-5
    for name, buffer in buffers.items():
        present = wanted[name.replace("past_key_values", "present")]
        assert np.abs(buffer.numpy()[:, :, :7] - present).max() <= 1e-6


def _buffers(feed: dict[str, Any], length: int) -> dict[str, Any]:
    import onnxruntime as ort

    results = {}
    for name, past in feed.items():
        if name.startswith("past"):
            room = np.zeros((*past.shape[:2], length, past.shape[3]), np.float32)
            room[:, :, : past.shape[2]] = past
            results[name] = ort.OrtValue.ortvalue_from_numpy(room)
    return results


@pytest.mark.parametrize("name", ["llama", "looked_up", "norm_without_bias"])
def test_the_same_plan_cuts_both_forms(name: str) -> None:
    """Cut then fused, and fused then cut: the same sublayers are found, the same is computed."""
    model = decoder_model(FUSED[name])
    fused, whole = fuse_decoder(model, positions=POSITIONS)
    sites = [site for site in find_sites(model) if isinstance(site, ResidualSite)]
    assert [s.ref for s in find_sites(fused) if isinstance(s, ResidualSite)] == [
        site.ref for site in sites
    ]
    for site in sites:
        plan = [Deletion(site.layer, site.kind)]
        cut, _ = prune_graph(model, plan)
        other, _ = prune_graph(fused, plan)
        first, report = fuse_decoder(cut, positions=POSITIONS)
        assert difference(cut, other, CALLS[0]) <= 1e-5
        assert difference(cut, first, CALLS[2]) <= 1e-5
        assert skips(report.fused) == skips(whole.fused) - 1
        feed = decoder_feed(fused, seq=4, past=3, batch=1)
        masked, pruned = (
            run(session(made, optimise=False), feed) for made in (masked_model(fused, plan), other)
        )
        assert np.abs(masked["logits"] - pruned["logits"]).max() <= 1e-5
        assert skips(Counter(node.op_type for node in other.graph)) == skips(whole.fused) - 1


def test_without_packing_three_products_stay() -> None:
    model = decoder_model()
    packed, _ = fuse_decoder(model, positions=POSITIONS)
    apart, report = fuse_decoder(model, positions=POSITIONS, pack_qkv=False)
    assert count(apart, "MatMul") - count(packed, "MatMul") == 4
    assert report.packed == 0
    assert difference(model, apart, CALLS[0]) <= 1e-5


def test_nothing_is_fused_by_half() -> None:
    model = decoder_model()
    last = [node for node in model.graph if node.op_type == "Attention"][-1]
    last.domain = "unknown"
    with raises(FusionError, "cache-owners", "'past_key_values.1.key'"):
        fuse_decoder(model, positions=POSITIONS)


def test_a_cache_that_two_attentions_read_is_refused() -> None:
    model = decoder_model()
    first, last = (node for node in model.graph if node.op_type == "Attention")
    last.replace_input_with(1, first.inputs[1])
    with raises(FusionError, "cache-owners", "'past_key_values.0.key'", 2):
        fuse_decoder(model, positions=POSITIONS)


def test_an_encoder_is_refused() -> None:
    from tests.tiny_graphs import TinySpec, tiny_model

    with raises(FusionError, "no-growing-cache"):
        fuse_decoder(tiny_model(TinySpec(cache=False)), positions=POSITIONS)
