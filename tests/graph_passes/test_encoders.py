"""What only encoders and encoder-decoders have: fused embeddings, pooling, paired caches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from graph_passes import CleanupPass
from graph_passes.errors import SurgeryError
from graph_passes.fusing.cache_in_place import pair_caches
from graph_passes.fusing.embedding import fuse_embedding
from graph_passes.fusing.pooling import (
    EMBEDDING,
    MODES,
    Activation,
    DenseLayer,
    PoolingMode,
    SentencePoolingPass,
)
from tests.graph_passes.graph_support import Arrays, operators, run, session
from tests.raising import raises

Floats = np.ndarray[Any, Any]

# Embeddings with the norm of their sum: one operator where it computes the same, else none

VOCABULARY, HIDDEN = 7, 16
WEIGHTS = {"words": 2, "places": 2, "types": 2, "gamma": 1, "beta": 1}  # their ranks
TEXT = """
<ir_version: 10, opset_import: ["" : 20]>
encoder (int64[batch, seq] input_ids, int64[batch, seq] token_type_ids)
    => (float[batch, seq, 16] out, float[batch, seq, 16] other)
<
    int64[1, 3] numbers = {4, 1, 6}
> {
    word = Gather <axis = 0> (words, input_ids)
    place = Gather <axis = 0> (places, numbers)
    type = Gather <axis = 0> (types, token_type_ids)
    part = Add (word, type)
    sum = Add (part, place)
    out = LayerNormalization <epsilon = 1e-6> (sum, gamma, beta)
    other = Neg (out)
}
"""
TWO_TABLES = TEXT.replace("(word, type)", "(word, place)").replace("(part, place)", "(word, place)")
# Each changes a line, so that the operator is none that could take its place.
OTHERWISE = {
    "read elsewhere": ("Neg (out)", "Neg (sum)"),
    "no bias": ("(sum, gamma, beta)", "(sum, gamma)"),
    "another axis": ("Gather <axis = 0> (types", "Gather <axis = 1> (types"),
    "no product of a table": ("place = Gather <axis = 0> (places, numbers)", "place = Neg (word)"),
}


def embedding(text: str) -> ir.Model:
    model = ir.from_onnx_text(text)
    rng = np.random.default_rng(0)
    read = {v.name: v for node in model.graph for v in node.inputs if v is not None}
    for name in sorted(WEIGHTS.keys() & read.keys()):
        data = rng.normal(size=(VOCABULARY, HIDDEN)[-WEIGHTS[name] :]).astype(np.float32)
        value = read[name]
        value.const_value = ir.tensor(data, name=name)
        value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(data.shape)
        model.graph.initializers[name] = value
    return model


@pytest.mark.parametrize("text", [TEXT, TWO_TABLES], ids=["three", "two"])
def test_tables_with_the_norm_of_their_sum_become_one_operator(text: str) -> None:
    model = embedding(text)
    rng = np.random.default_rng(1)
    names = ("input_ids", "token_type_ids")
    feed = {name: rng.integers(0, VOCABULARY, (2, 3)) for name in names}
    wanted = run(model, feed)
    assert fuse_embedding(model.graph) == 1
    CleanupPass()(model)
    left = operators(model) - Counter(Cast=3)
    assert left == {"EmbedLayerNormalization": 1, "Neg": 1}
    result = run(model, feed)
    assert all(np.abs(result[name] - wanted[name]).max() <= 1e-5 for name in wanted)


@pytest.mark.parametrize("name", OTHERWISE)
def test_any_other_sum_is_left_alone(name: str) -> None:
    text = TEXT.replace(*OTHERWISE[name])
    assert text != TEXT
    model = embedding(text)
    before = ir.to_onnx_text(model)
    assert fuse_embedding(model.graph) == 0
    assert ir.to_onnx_text(model) == before


# A sentence encoder's pooling as nodes of its graph, held against the definition of each mode

MASKS = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 0, 0]], np.int64)
STATES = np.random.default_rng(0).normal(size=(4, 4, 3)).astype(np.float32) - 2
WANTED = {
    "cls": lambda rows: rows[0],
    "max": lambda rows: rows.max(0),
    "mean": lambda rows: rows.mean(0),
    "mean_sqrt_len_tokens": lambda rows: rows.sum(0) / len(rows) ** 0.5,
    "weightedmean": lambda rows: np.average(rows, 0, np.arange(1, len(rows) + 1)),
    "lasttoken": lambda rows: rows[-1],
}


def encoder(*, kind: str = "float", opset: int = 20, output: str = "last_hidden_state") -> ir.Model:
    """Gives what it is given."""
    text = f"""<ir_version: 9, opset_import: ["" : {opset}]>
    encoder ({kind}[batch, tokens, 3] states, int64[batch, tokens] attention_mask)
    => ({kind}[batch, tokens, 3] {output}) {{ {output} = Identity(states) }}"""
    return ir.from_proto(onnx.parser.parse_model(text))


def embedded(
    model: ir.Model, modes: Sequence[PoolingMode], states: Floats = STATES, **how: Any
) -> Floats:
    SentencePoolingPass(modes, **{"normalised": False, **how})(model)
    feed = {"states": states, "attention_mask": MASKS}
    return run(session(model, optimise=True), feed)[EMBEDDING]


def wanted(*modes: str) -> Floats:
    real = [row[mask == 1] for row, mask in zip(STATES, MASKS, strict=True)]
    return np.hstack([np.stack([WANTED[mode](rows) for rows in real]) for mode in modes])


@pytest.mark.parametrize("opset", [14, 20])
@pytest.mark.parametrize("mode", MODES)
def test_padding_on_either_side_is_left_out(mode: PoolingMode, opset: int) -> None:
    result = embedded(encoder(opset=opset), [mode])
    assert result == pytest.approx(wanted(mode), abs=1e-6)
    others = [other for other in MODES if other != mode]
    assert not any(np.allclose(result, wanted(other), atol=1e-3) for other in others)


def test_vectors_of_several_modes_stand_one_after_the_other() -> None:
    model = encoder()
    assert embedded(model, ["max", "cls"]) == pytest.approx(wanted("max", "cls"), abs=1e-6)
    # What the graph gave before it gives still.
    assert [value.name for value in model.graph.outputs] == ["last_hidden_state", EMBEDDING]
    assert model.graph.outputs[-1].shape == ir.Shape(["batch", 6])


@pytest.mark.parametrize("activation", ["Identity", "Tanh", "Relu", "Sigmoid"])
def test_products_follow_the_pooling(activation: Activation) -> None:
    rng, model = np.random.default_rng(1), encoder()
    first, second = (rng.normal(size=size).astype(np.float32) for size in ((5, 6), (2, 5)))
    bias = rng.normal(size=5).astype(np.float32)
    layers = [DenseLayer(first, bias, activation), DenseLayer(second, None, "Identity")]
    result = embedded(model, ["max", "cls"], dense=layers)
    inner = wanted("max", "cls") @ first.T + bias
    after = {
        "Identity": inner, "Tanh": np.tanh(inner), "Relu": np.maximum(inner, 0),
        "Sigmoid": 1 / (1 + np.exp(-inner)),
    }  # fmt: skip
    assert result == pytest.approx(after[activation] @ second.T, abs=1e-5)
    assert model.graph.outputs[-1].shape == ir.Shape(["batch", 2])


def test_a_normalised_vector_has_length_1() -> None:
    result = embedded(encoder(), ["mean"], normalised=True)
    assert np.linalg.norm(result, axis=1) == pytest.approx(1, abs=1e-6)
    assert np.linalg.norm(embedded(encoder(), ["mean"]), axis=1) != pytest.approx(1, abs=1e-2)


def test_a_vector_of_half_precision_is_made_in_single() -> None:
    result = embedded(encoder(kind="float16"), ["mean"], STATES.astype(np.float16))
    assert result.dtype == np.float32
    assert result == pytest.approx(wanted("mean"), abs=1e-3)


def test_graphs_that_can_t_be_pooled() -> None:
    pooled, maskless = encoder(), encoder()
    embedded(pooled, ["mean"])
    maskless.graph.inputs[1].name = "mask"
    for model in (encoder(output="logits"), maskless, pooled):
        with raises(SurgeryError, "takes-no-tokens", "last_hidden_state"):
            SentencePoolingPass(["mean"], normalised=False)(model)
    layer = DenseLayer(np.zeros((2, 4), np.float32), None, "Tanh")
    with raises(SurgeryError, "takes-no-tokens", 4, 3):
        SentencePoolingPass(["cls"], normalised=False, dense=[layer])(encoder())


# The caches of a cut encoder-decoder, in the order in which optimum's runtime hands them over


def step(own: Sequence[int], cross: Sequence[int], *, takes: bool = True) -> ir.Model:
    """A step whose caches are those of some layers, each carried on as it is."""
    shape = "float[batch, 2, {}, 4]"
    inputs, outputs = ["int64[batch, seq] input_ids"], ["float[batch, seq] logits"]
    nodes = ["logits = Cast<to = 1>(input_ids)"]
    for layer in sorted({*own, *cross}):
        for side, held in (("decoder", own), ("encoder", cross)):
            for part in ("key", "value") if layer in held else ():
                name = f"{layer}_{side}_{part}"
                if takes:
                    length = "past" if side == "decoder" else "source"
                    inputs.append(f"{shape.format(length)} past_{name}")
                if not takes or side == "decoder":
                    outputs.append(f"{shape.format('total')} present_{name}")
                    nodes.append(
                        f"present_{name} = Identity({f'past_{name}' if takes else 'four'})"
                    )
    if not takes:
        nodes[:0] = [
            "sizes = Constant<value_ints = [1, 2, 3, 4]>()",
            "four = ConstantOfShape(sizes)",
        ]
    lines = "\n".join(nodes)
    model = ir.from_onnx_text(
        f'<ir_version: 10, opset_import: ["" : 20]>\n'
        f"graph ({', '.join(inputs)}) => ({', '.join(outputs)}) {{\n{lines}\n}}"
    )
    for value in (*model.graph.inputs, *model.graph.outputs):
        words = str(value.name).split("_")
        if len(words) == 4:
            stem = {"past": "past_key_values", "present": "present"}[words[0]]
            value.name = ".".join([stem, *words[1:]])
    return model


def names(values: Sequence[ir.Value]) -> list[str]:
    return [str(value.name) for value in values]


def test_pairs_take_turns_whatever_their_layers_are() -> None:
    model = step(own=(0, 2), cross=(1, 2))
    pair_caches(model)
    assert [name.split(".")[1:3] for name in names(model.graph.inputs)[1::2]] == [
        ["0", "decoder"], ["1", "encoder"], ["2", "decoder"], ["2", "encoder"],
    ]  # fmt: skip
    assert len(model.graph.outputs) == 1 + 4


@pytest.mark.parametrize(("own", "cross"), [((0, 1, 2), (1,)), ((0,), ()), ((1,), (0,)), ((), ())])
@pytest.mark.parametrize("takes", [True, False])
def test_nothing_is_added_where_self_attentions_suffice(
    own: tuple[int, ...], cross: tuple[int, ...], takes: bool
) -> None:
    model = step(own, cross, takes=takes)
    before = sorted(names(model.graph.inputs)), names(model.graph.outputs)
    pair_caches(model)
    assert (sorted(names(model.graph.inputs)), names(model.graph.outputs)) == before


def test_spare_caches_grow_by_a_number_a_token() -> None:
    model = step(own=(1,), cross=(0, 1, 2))
    pair_caches(model)
    spare = [name for name in names(model.graph.inputs) if ".spare." in name]
    assert spare == [
        f"past_key_values.{n}.decoder.spare.{part}" for n in (0, 1) for part in ("key", "value")
    ]
    cross = np.zeros((3, 2, 7, 4), np.float32)
    feed: Arrays = {"input_ids": np.ones((3, 2), np.int64)}
    feed |= {name: cross for name in names(model.graph.inputs) if ".encoder." in name}
    feed |= {name: cross[:, :, :5] for name in names(model.graph.inputs) if ".1.decoder." in name}
    feed |= dict.fromkeys(spare, np.zeros((3, 1, 5, 1), np.float32))
    result = run(model, feed)
    for name in spare:
        assert result[name.replace("past_key_values", "present")].shape == (3, 1, 7, 1)


def test_the_first_step_begins_spare_caches() -> None:
    model = step(own=(), cross=(0,), takes=False)
    pair_caches(model)
    result = run(model, {"input_ids": np.ones((2, 3), np.int64)})
    for part in ("key", "value"):
        assert result[f"present.0.decoder.spare.{part}"].shape == (2, 1, 3, 1)
        assert not result[f"present.0.decoder.spare.{part}"].any()
