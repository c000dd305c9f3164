"""A sentence encoder's pooling as nodes of its graph, held against the definition of each mode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graph_support import session

from graph_passes.errors import SurgeryError
from graph_passes.fusing.pooling import (
    EMBEDDING,
    MODES,
    Activation,
    DenseLayer,
    PoolingMode,
    SentencePoolingPass,
)
from tests.raising import raises

Floats = np.ndarray[Any, Any]
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
    model: ir.Model, modes: Sequence[PoolingMode], states: Floats = STATES, **how: bool
) -> Floats:
    SentencePoolingPass(modes, normalised=how.get("normalised", False))(model)
    feed = {"states": states, "attention_mask": MASKS}
    floats: Floats = session(model, optimise=True).run([EMBEDDING], feed)[0]
    return floats


def wanted(mode: str) -> Floats:
    rows = [WANTED[mode](row[mask == 1]) for row, mask in zip(STATES, MASKS, strict=True)]
    return np.stack(rows)


@pytest.mark.parametrize("opset", [14, 20])
@pytest.mark.parametrize("mode", MODES)
def test_padding_on_either_side_is_left_out(mode: PoolingMode, opset: int) -> None:
    result = embedded(encoder(opset=opset), [mode])
    assert result == pytest.approx(wanted(mode), abs=1e-6)
    others = [other for other in MODES if other != mode]
    assert not any(np.allclose(result, wanted(other), atol=1e-3) for other in others)


def test_vectors_of_several_modes_stand_one_after_the_other() -> None:
    model = encoder()
    result = embedded(model, ["max", "cls"])
    assert result == pytest.approx(np.hstack([wanted("max"), wanted("cls")]), abs=1e-6)
    assert model.graph.outputs[-1].shape == ir.Shape(["batch", 6])


@pytest.mark.parametrize("activation", ["Identity", "Tanh", "Relu", "Sigmoid"])
def test_products_follow_the_pooling(activation: Activation) -> None:
    rng, model = np.random.default_rng(1), encoder()
    sizes = [(5, 6), (2, 5)]
    weights = [rng.normal(size=size).astype(np.float32) for size in sizes]
    bias = rng.normal(size=5).astype(np.float32)
    layers = [DenseLayer(weights[0], bias, activation), DenseLayer(weights[1], None, "Identity")]
    SentencePoolingPass(["max", "cls"], normalised=False, dense=layers)(model)
    result = session(model, optimise=True).run(
        [EMBEDDING], {"states": STATES, "attention_mask": MASKS}
    )[0]
    inner = np.hstack([wanted("max"), wanted("cls")]) @ weights[0].T + bias
    after = {
        "Identity": inner, "Tanh": np.tanh(inner), "Relu": np.maximum(inner, 0),
        "Sigmoid": 1 / (1 + np.exp(-inner)),
    }  # fmt: skip
    assert result == pytest.approx(after[activation] @ weights[1].T, abs=1e-5)
    assert model.graph.outputs[-1].shape == ir.Shape(["batch", 2])


def test_a_product_of_another_size() -> None:
    layer = DenseLayer(np.zeros((2, 4), np.float32), None, "Tanh")
    with raises(SurgeryError, "not-poolable", 4, 3):
        SentencePoolingPass(["cls"], normalised=False, dense=[layer])(encoder())


def test_a_normalised_vector_has_length_1() -> None:
    result = embedded(encoder(), ["mean"], normalised=True)
    assert np.linalg.norm(result, axis=1) == pytest.approx(1, abs=1e-6)
    assert np.linalg.norm(embedded(encoder(), ["mean"]), axis=1) != pytest.approx(1, abs=1e-2)


def test_a_vector_of_half_precision_is_made_in_single() -> None:
    result = embedded(encoder(kind="float16"), ["mean"], STATES.astype(np.float16))
    assert result.dtype == np.float32
    assert result == pytest.approx(wanted("mean"), abs=1e-3)


def test_what_the_graph_gave_before_it_gives_still() -> None:
    model = encoder()
    SentencePoolingPass(["mean"], normalised=False)(model)
    assert [value.name for value in model.graph.outputs] == ["last_hidden_state", EMBEDDING]


def test_graphs_that_can_t_be_pooled() -> None:
    pooled = encoder()
    SentencePoolingPass(["mean"], normalised=False)(pooled)
    maskless = encoder()
    maskless.graph.inputs[1].name = "mask"
    for model in (encoder(output="logits"), maskless, pooled):
        with raises(SurgeryError, "not-poolable", "last_hidden_state"):
            SentencePoolingPass(["mean"], normalised=False)(model)
