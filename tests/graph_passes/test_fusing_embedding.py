"""Embeddings with the norm of their sum: one operator where it computes the same, else none."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from graph_support import run, session

from graph_passes import CleanupPass
from graph_passes.fusing.embedding import fuse_embedding

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
# Each changes a line, so that the operator is none that could take its place.
OTHERWISE = {
    "read elsewhere": ("Neg (out)", "Neg (sum)"),
    "no bias": ("(sum, gamma, beta)", "(sum, gamma)"),
    "another axis": ("Gather <axis = 0> (types", "Gather <axis = 1> (types"),
    "no product of a table": ("place = Gather <axis = 0> (places, numbers)", "place = Neg (word)"),
}


def encoder(text: str = TEXT) -> ir.Model:
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


def answers(model: ir.Model) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    names = ("input_ids", "token_type_ids")
    feed = {name: rng.integers(0, VOCABULARY, (2, 3)) for name in names}
    return run(session(model, optimise=False), feed)


@pytest.mark.parametrize("lines", ["three", "two"])
def test_they_become_one_operator(lines: str) -> None:
    text = TEXT if lines == "three" else TEXT.replace("(word, type)", "(word, place)").replace(
        "sum = Add (part, place)", "sum = Add (word, place)"
    )  # fmt: skip
    model = encoder(text)
    wanted = answers(model)
    assert fuse_embedding(model.graph) == 1
    CleanupPass()(model)
    assert sum(node.op_type == "EmbedLayerNormalization" for node in model.graph) == 1
    assert not any(node.op_type in ("Gather", "Add") for node in model.graph)
    result = answers(model)
    assert all(np.abs(result[name] - wanted[name]).max() <= 1e-5 for name in wanted)


@pytest.mark.parametrize("name", OTHERWISE)
def test_anything_else_is_left_alone(name: str) -> None:
    text = TEXT.replace(*OTHERWISE[name])
    assert text != TEXT
    model = encoder(text)
    before = ir.to_onnx_text(model)
    assert fuse_embedding(model.graph) == 0
    assert ir.to_onnx_text(model) == before
