"""A decoder in fused operators, or on caches in place, computes what it computed, or is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from graph_passes import Deletion, masked_model, prune_graph
from graph_passes.errors import FusionError
from graph_passes.fusing import fuse_decoder
from graph_passes.fusing.cache_in_place import CacheInPlacePass
from graph_passes.fusing.grouped import GroupedAttentionPass
from graph_passes.fusing.logits_to_keep import KEEP, LogitsToKeepPass
from graph_passes.fusing.prompt_alone import PromptAlonePass
from tests.graph_passes.decoder_graphs import (
    CALLS,
    HEADS,
    POSITIONS,
    DecoderSpec,
    decoder_feed,
    decoder_model,
)
from tests.graph_passes.fused_graphs import FusedSpec, fused_model
from tests.graph_passes.graph_support import (
    Arrays,
    kinds,
    operators,
    publish,
    run,
    session,
    text,
    usual,
)
from tests.raising import raises
from tests.tiny_graphs import TinySpec, tiny_feed, tiny_model

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
IN_PLACE = {
    "llama": DecoderSpec(),
    "written out": DecoderSpec(softmax=True, rotary="half"),
    "window": DecoderSpec(window=3),
    "one projection": DecoderSpec(projections="one", rotary="none"),
}
PASSES: dict[str, Callable[[ir.Model], Any]] = {
    "fused": lambda model: fuse_decoder(model, positions=POSITIONS),
    "grouped": GroupedAttentionPass().call,
    "in place": CacheInPlacePass(POSITIONS).call,
}


def fused(model: ir.Model, **how: Any) -> ir.Model:
    return fuse_decoder(model, positions=POSITIONS, **how)[0]


def in_place(**spec: Any) -> ir.Model:
    model = decoder_model(DecoderSpec(**spec))
    CacheInPlacePass(POSITIONS)(model)
    return model


def skips(counts: Mapping[str, int]) -> int:
    return sum(number for op_type, number in counts.items() if op_type.startswith("Skip"))


def attentions(model: ir.Model, op_type: str = "Attention") -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == op_type]


def roomy(feed: Arrays, room: int = POSITIONS, *, rest: float = 0.0) -> Arrays:
    """The same with caches and mask at full length; ``rest`` lies where nothing is filled."""
    result = dict(feed)
    for name, array in feed.items():
        axis = {"attention_mask": 1}.get(name, 2 if name.startswith("past") else None)
        if axis is not None:
            widths = [(0, room - n if place == axis else 0) for place, n in enumerate(array.shape)]
            filler = 0.0 if axis == 1 else rest
            result[name] = np.pad(array, widths, constant_values=filler)
    return result


def assert_alike(feed: Arrays, result: Arrays, wanted: Arrays) -> None:
    """The logits and caches of real tokens, in a cache of any length."""
    real = feed["attention_mask"].astype(bool)
    total = real.shape[1]
    assert list(result) == list(wanted)
    scale = max(1.0, float(np.abs(wanted["logits"]).max()))
    for name, want in wanted.items():
        have, rows = result[name], real
        if name == "logits":
            rows = real[:, -want.shape[1] :]
        else:
            have, want = (item[:, :, :total].swapaxes(1, 2) for item in (have, want))
        assert np.isfinite(have).all()
        assert float(np.abs(have - want)[rows].max()) <= 1e-5 * scale, name


def assert_same(model: ir.Model, other: ir.Model, calls: list[dict[str, int]] = CALLS) -> None:
    before, after = session(model), session(other)
    for call in calls:
        feed = decoder_feed(model, **call)
        assert_alike(feed, run(after, feed), run(before, feed))


def logits_differ(feed: Arrays, one: ir.Model, other: ir.Model) -> bool:
    return bool(np.abs(run(one, feed)["logits"] - run(other, feed)["logits"]).max() > 1e-2)


# What is refused


def unknown_last(model: ir.Model) -> None:
    attentions(model)[-1].domain = "unknown"


def shared_cache(model: ir.Model) -> None:
    first, last = attentions(model)
    last.replace_input_with(1, first.inputs[1])


def length_asked(model: ir.Model) -> None:
    past = next(v for v in model.graph.inputs if v.name == "past_key_values.0.key")
    length = ir.node("Shape", [past], {"start": 2, "end": 3}, name="asks")
    model.graph.append(length)
    publish(model, length.outputs[0], "length", 1)
    length.outputs[0].type = ir.TensorType(ir.DataType.INT64)


def old(model: ir.Model) -> None:
    model.opset_imports[""] = 17


OF_17 = DecoderSpec(softmax=True, rotary="half", norm="LayerNormalization")
REFUSED: list[tuple[list[str], DecoderSpec, Any, str, tuple[object, ...]]] = [
    (["fused", "in place"], DecoderSpec(mask="all"), None, "unknown-mask", ()),
    (["fused", "in place"], DecoderSpec(mask="alibi"), None, "unknown-mask", ()),
    (["fused", "grouped", "in place"], DecoderSpec(repeats="in_turn"), None, "keys-order", ()),
    (["grouped", "in place"], DecoderSpec(softcap=2.0), None, "unknown-mask", ()),
    (["fused"], DecoderSpec(), unknown_last, "cache-still-read", ("'past_key_values.1.key'",)),
    (["fused"], DecoderSpec(), shared_cache, "cache-still-read", ("'past_key_values.0.key'", 2)),
    (["in place"], DecoderSpec(), length_asked, "cache-still-read", ("'asks'",)),
    (["grouped"], OF_17, old, "opset-out-of-range", (17, 23)),
]


@pytest.mark.parametrize(("names", "spec", "spoil", "code", "fields"), REFUSED)
def test_what_the_operator_cannot_do_is_refused(
    names: list[str], spec: DecoderSpec, spoil: Any, code: str, fields: tuple[object, ...]
) -> None:
    for name in names:
        model = decoder_model(spec)
        if spoil is not None:
            spoil(model)
        before = text(model)
        with raises(FusionError, code, *fields):
            PASSES[name](model)
        assert name == "in place" or text(model) == before


def test_an_encoder_is_refused() -> None:
    with raises(FusionError, "no-growing-cache"):
        fused(tiny_model(TinySpec(cache=False)))


# ONNX Runtime's operators


@pytest.mark.parametrize("name", FUSED)
def test_the_fused_form_computes_the_same(name: str) -> None:
    model = decoder_model(FUSED[name])
    before = text(model)
    made, report = fuse_decoder(model, positions=POSITIONS)
    assert text(model) == before
    assert_same(model, made)
    skip = "Skip" + FUSED[name].norm.replace("RMS", "SimplifiedLayer")
    sums = 5 if name == "looked_up" else 4  # of tokens and positions, too
    assert report.fused == {"GroupQueryAttention": 2, skip: sums}
    assert report.packed == (0 if FUSED[name].qk_norm else 2)
    assert not {"Attention", "Softmax", "RotaryEmbedding"} & operators(made).keys()
    assert report.remarks == ()


@pytest.mark.parametrize("name", ["llama", "looked_up", "norm_without_bias"])
def test_the_same_plan_cuts_both_forms(name: str) -> None:
    """Cut then fused, and fused then cut: the same sublayers are found, the same is computed."""
    model = decoder_model(FUSED[name])
    made, whole = fuse_decoder(model, positions=POSITIONS)
    assert kinds(made) == kinds(model) == usual(2)
    for layer, kind in usual(2):
        plan = [Deletion(layer, kind)]  # type: ignore[arg-type]
        cut, other = prune_graph(model, plan)[0], prune_graph(made, plan)[0]
        first, report = fuse_decoder(cut, positions=POSITIONS)
        assert_same(cut, other, CALLS[:1])
        assert_same(cut, first, CALLS[2:3])
        feed = decoder_feed(made, seq=4, past=3, batch=1)
        assert_alike(feed, run(other, feed), {
            name: value for name, value in run(masked_model(made, plan), feed).items()
            if name in {v.name for v in other.graph.outputs}
        })  # fmt: skip
        assert skips(report.fused) == skips(operators(other)) == skips(whole.fused) - 1


@pytest.mark.parametrize(
    ("rotary", "words"),
    [("by_length", "depends on the text's length"), ("quarter", "rotates no 8 of 32 numbers")],
)
def test_a_rotation_that_the_operator_cannot_do_stays_outside(rotary: Any, words: str) -> None:
    model = decoder_model(DecoderSpec(rotary=rotary))
    made, report = fuse_decoder(model, positions=POSITIONS)
    assert_same(model, made)
    assert operators(made)["RotaryEmbedding"] == 4
    assert "position_ids" in [value.name for value in made.graph.inputs]
    assert words in report.remarks[0]


@pytest.mark.parametrize(("window", "size"), [(3, 3), (POSITIONS, -1), (None, -1)])
def test_a_window_is_found_by_trying(window: int | None, size: int) -> None:
    nodes = attentions(fused(decoder_model(DecoderSpec(window=window))), "GroupQueryAttention")
    assert [node.attributes.get_int("local_window_size") for node in nodes] == [size, size]


def test_the_cache_lies_in_place() -> None:
    """Longer buffers, one for past and present, change nothing: no node asks for their length."""
    model = decoder_model()
    feed = decoder_feed(model, seq=1, past=6)
    running = session(fused(model))
    wanted = run(running, feed)
    binding = running.io_binding()
    buffers = {
        name: ort.OrtValue.ortvalue_from_numpy(array)
        for name, array in roomy(feed, 16).items()
        if name.startswith("past")
    }
    for name in ("input_ids", "attention_mask"):
        binding.bind_cpu_input(name, feed[name])
    for name, buffer in buffers.items():
        binding.bind_ortvalue_input(name, buffer)
        binding.bind_ortvalue_output(name.replace("past_key_values", "present"), buffer)
    binding.bind_output("logits")
    running.run_with_iobinding(binding)
    assert np.abs(binding.get_outputs()[-1].numpy() - wanted["logits"]).max() <= 1e-5
    for name, buffer in buffers.items():
        present = wanted[name.replace("past_key_values", "present")]
        assert np.abs(buffer.numpy()[:, :, :7] - present).max() <= 1e-6


# ONNX's own operator


@pytest.mark.parametrize("name", [*IN_PLACE, "alibi"])
def test_nothing_is_repeated_and_nothing_changes(name: str) -> None:
    """Where caches grow a mask may be of any kind."""
    model = decoder_model(IN_PLACE.get(name, DecoderSpec(mask="alibi")))
    grouped = model.clone()
    assert GroupedAttentionPass()(grouped).modified
    assert not GroupedAttentionPass()(grouped).modified
    assert len(attentions(grouped)) == 2
    for node in attentions(grouped):
        query, key, value = node.inputs[:3]
        assert query is not None
        assert query.shape is not None
        assert query.shape[1] == HEADS
        assert all(v is not None and v.is_graph_output() for v in (key, value))
    assert_same(model, grouped)


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_it_computes_the_same(name: str) -> None:
    model = decoder_model(IN_PLACE[name])
    fixed = model.clone()
    CacheInPlacePass(POSITIONS)(fixed)
    assert fixed.opset_imports[""] == 24
    counts = operators(fixed)
    # What is expanded is where to write; no keys are.
    assert [counts[op] for op in ("TensorScatter", "Attention", "Expand")] == [4, 2, 1]
    before, after = session(model), session(fixed)
    for call in CALLS:
        feed = decoder_feed(model, **call)
        left = {**feed, "attention_mask": feed["attention_mask"].copy()}
        left["attention_mask"][-1, :2] = 0
        for padded in (feed, left):
            assert_alike(padded, run(after, roomy(padded)), run(before, padded))
    shapes = {v.name: list(v.shape) for v in (*fixed.graph.inputs, *fixed.graph.outputs)}  # type: ignore[arg-type]
    assert shapes["attention_mask"][1] == POSITIONS
    assert {shapes[n][2] for n in shapes if (n or "").startswith(("past", "pres"))} == {POSITIONS}


def test_what_is_not_filled_does_not_count() -> None:
    ready = session(in_place())
    feed = decoder_feed(decoder_model(), seq=2, past=5)
    wanted = run(ready, roomy(feed))
    assert_alike(feed, run(ready, roomy(feed, rest=7.0)), wanted)
    touched = {**feed, "past_key_values.0.key": feed["past_key_values.0.key"] + 1}
    assert np.abs(run(ready, roomy(touched))["logits"] - wanted["logits"]).max() > 1e-3


@pytest.mark.parametrize("fixed", [False, True])
def test_a_cut_takes_the_caches_along(fixed: bool) -> None:
    model = decoder_model(DecoderSpec(layers=3))
    feed = decoder_feed(model, seq=3, past=4)
    (CacheInPlacePass(POSITIONS) if fixed else GroupedAttentionPass())(model)
    plan = [Deletion(1, "attention")]
    cut, _ = prune_graph(model, plan)
    assert operators(cut)["TensorScatter"] == (4 if fixed else 0)
    names = [value.name or "" for value in cut.graph.inputs]
    assert [name for name in names if "past" in name] == [
        f"past_key_values.{n}.{part}" for n in (0, 2) for part in ("key", "value")
    ]
    feed = roomy(feed) if fixed else feed
    wanted = run(masked_model(model, plan), feed)
    for name, array in run(cut, feed).items():
        np.testing.assert_allclose(array, wanted[name], rtol=0, atol=1e-5, err_msg=name)


# For prompts alone, without masks


def for_prompts(model: ir.Model) -> ir.Model:
    result = model.clone()
    assert PromptAlonePass()(result).modified
    return result


def test_for_prompts_alone_it_computes_what_the_mask_lets_it_see() -> None:
    model = in_place()
    one = for_prompts(model)
    before, after = operators(model), operators(one)
    assert [before[op] for op in ("Less", "Or", "TensorScatter")] == [1, 1, 4]
    assert [after[op] for op in ("Less", "Or", "Range", "TensorScatter")] == [0, 0, 0, 4]
    assert [value.name for value in one.graph.inputs] == [v.name for v in model.graph.inputs]
    for call in ({"seq": 9}, {"seq": 9, "padding": 3}, {"seq": 1}):
        feed = decoder_feed(decoder_model(), **call)
        assert_alike(feed, run(one, roomy(feed)), run(model, roomy(feed)))
    # It is none for filled caches.
    several = roomy(decoder_feed(decoder_model(), seq=3, past=4, batch=1))
    assert logits_differ(several, one, model)


def test_a_prefill_reads_no_cache() -> None:
    """What a cache holds is overwritten or left as it is, and seen by nothing."""
    prefill = for_prompts(in_place())
    feed = decoder_feed(decoder_model(), seq=4)
    empty, filled = (run(prefill, roomy(feed, rest=rest)) for rest in (0.0, 7.0))
    assert np.array_equal(empty["logits"], filled["logits"])


@pytest.mark.parametrize("kind", ["window", "growing"])
def test_what_a_mask_alone_can_tell_stays(kind: str) -> None:
    model = in_place(window=3) if kind == "window" else decoder_model()
    before = text(model)
    assert not PromptAlonePass()(model).modified
    assert text(model) == before


# A choice of how many last positions there are logits of

SEQ = 5


def kept(model: ir.Model) -> ir.Model:
    copy = model.clone()
    assert LogitsToKeepPass()(copy).modified
    return copy


def after_head(operator: Callable[[ir.Value], ir.Node]) -> ir.Model:
    """With a further operator behind the head."""
    model = fused_model(FusedSpec())
    raw = model.graph.outputs[0]
    node = operator(raw)
    model.graph.append(node)
    value = node.outputs[0]
    value.dtype, value.shape = ir.DataType.FLOAT, raw.shape
    raw.name, value.name, model.graph.outputs[0] = "raw", "logits", value
    return model


def headless() -> ir.Model:
    model = fused_model(FusedSpec())
    model.graph.outputs[0].name = "last_hidden_state"
    return model


MODELS: dict[str, Callable[[], ir.Model]] = {
    "plain": lambda: fused_model(FusedSpec()),
    "softcap": lambda: after_head(lambda value: ir.node("Tanh", [value])),
    "int4": lambda: fused_model(FusedSpec(int4=True)),
    "cut": lambda: prune_graph(kept(fused_model(FusedSpec())), [Deletion(1, "attention")])[0],
}
# No plain product of the stream, or has been rewritten.
OTHERS: list[Callable[[], ir.Model]] = [
    lambda: after_head(lambda value: ir.node("Add", [value, value])),
    lambda: after_head(lambda value: ir.node("ReduceMax", [value], attributes={"keepdims": 1})),
    lambda: kept(fused_model(FusedSpec())),
    headless,
]


def fused_feed(model: ir.Model, seq: int = SEQ, past: int = 0) -> Arrays:
    return tiny_feed(model, seq=seq, past=past, seed=1, left=0)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("past", [0, 3])
def test_the_last_positions_are_those_of_all(name: str, past: int) -> None:
    plain = MODELS[name]()
    model = plain if name == "cut" else kept(plain)
    assert KEEP in {value.name for value in model.graph.inputs} & set(model.graph.initializers)
    feed = fused_feed(plain, SEQ if past == 0 else 1, past)
    running = session(model, optimise=True)
    everything = run(running, feed)["logits"]
    if name != "cut":
        assert np.array_equal(everything, run(session(plain, optimise=True), feed)["logits"])
    length = everything.shape[1]
    for count in (1, 2, length, length + 3):
        few = running.run(["logits"], {**feed, KEEP: np.array([count])})[0]
        assert few.shape[1] == min(count, length)
        assert np.abs(few - everything[:, -count:]).max() <= 1e-5
    if length > 1:
        assert np.abs(everything[:, :1] - everything[:, -1:]).max() > 1e-2


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", ["plain", "softcap", "int4"])
def test_without_a_choice_it_gives_a_fixed_number(name: str, count: int) -> None:
    plain = MODELS[name]()
    model = plain.clone()
    assert LogitsToKeepPass(count)(model).modified
    assert {v.name for v in model.graph.inputs} == {v.name for v in plain.graph.inputs}
    assert model.graph.outputs[0].shape[1] == count  # type: ignore[index]
    feed = fused_feed(plain)
    result, everything = (
        run(session(made, optimise=True), feed)["logits"] for made in (model, plain)
    )
    assert result.shape[1] == count < everything.shape[1]
    assert np.abs(result - everything[:, -count:]).max() <= 1e-5


@pytest.mark.parametrize("other", OTHERS)
def test_a_head_that_is_no_plain_product_stays(other: Callable[[], ir.Model]) -> None:
    model = other()
    before = ir.to_proto(model).SerializeToString()
    assert not LogitsToKeepPass()(model).modified
    assert ir.to_proto(model).SerializeToString() == before
