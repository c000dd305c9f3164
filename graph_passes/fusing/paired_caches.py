"""Writes the caches of a cut encoder-decoder as optimum's runtime hands them over."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest

import numpy as np
import onnx_ir as ir

from graph_passes.fusing.new_nodes import NewNodes

_SELF, _CROSS = ".decoder.", ".encoder."
_PARTS = ("key", "value")
_LENGTH_AXIS = 2


def pair_caches(model: ir.Model) -> None:
    """Pairs a decoder's caches in place."""
    graph = model.graph
    takes = any(_is(value, _CROSS) or _is(value, _SELF) for value in graph.inputs)
    held = graph.inputs if takes else graph.outputs
    missing = _count(held, _CROSS) - _count(held, _SELF)
    names = [f"{n}.decoder.spare.{part}" for n in range(max(0, missing) // 2) for part in _PARTS]
    if names:
        _add_spare(graph, names, takes=takes)
    if takes:
        _take_turns(graph)


def _is(value: ir.Value, side: str) -> bool:
    return side in str(value.name)


def _count(values: Sequence[ir.Value], side: str) -> int:
    return sum(_is(value, side) for value in values)


def _add_spare(graph: ir.Graph, names: Sequence[str], *, takes: bool) -> None:
    logits = graph.outputs[0]
    assert logits.dtype is not None
    nodes = NewNodes(graph, "spare_cache")
    zeros = _zeros(graph, nodes, logits.dtype)
    for name in names:
        present = zeros
        if takes:
            past = ir.Value(
                name=f"past_key_values.{name}",
                type=ir.TensorType(logits.dtype),
                shape=ir.Shape(["batch", 1, "past_sequence", 1]),
            )
            graph.inputs.append(past)
            present = nodes.op("Concat", past, zeros, axis=_LENGTH_AXIS)
        else:
            present = nodes.op("Identity", zeros)
        present.name = f"present.{name}"
        present.type = ir.TensorType(logits.dtype)
        present.shape = ir.Shape(["batch", 1, None, 1])
        graph.outputs.append(present)
    nodes.append()


def _zeros(graph: ir.Graph, nodes: NewNodes, dtype: ir.DataType) -> ir.Value:
    """One for each new token, ``[batch, 1, sequence, 1]``."""
    tokens = next(value for value in graph.inputs if value.name == "input_ids")
    batch = nodes.op("Shape", tokens, start=0, end=1)
    sequence = nodes.op("Shape", tokens, start=1, end=2)
    one = nodes.integers([1])
    shape = nodes.op("Concat", batch, one, sequence, one, axis=0)
    zero = ir.tensor(np.zeros(1, dtype.numpy()))
    return nodes.op("ConstantOfShape", shape, value=zero)


def _take_turns(graph: ir.Graph) -> None:
    inputs: list[ir.Value] = list(graph.inputs)
    pairs = [_in_pairs([v for v in inputs if _is(v, side)]) for side in (_SELF, _CROSS)]
    turns = zip_longest(*map(list, pairs), fillvalue=())
    caches = [value for turn in turns for pair in turn for value in pair]
    others = [value for value in inputs if value not in caches]
    graph.inputs[:] = [*others, *caches]


def _in_pairs(values: Sequence[ir.Value]) -> Iterator[Sequence[ir.Value]]:
    for start in range(0, len(values), len(_PARTS)):
        yield values[start : start + len(_PARTS)]
