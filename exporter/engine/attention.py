"""Runs inside the building process: what a parser must be told of a graph's Attention operators.

A builder refuses an Attention for which it has no kernel of its own, in float32 for one any with
more than one new token, unless it may write the operator out in basic ones. ONNX has no attribute
for that; the parsers read one of their own, ``TRT_decomposable``. It is added to the graph as it is
handed over: the file stays ONNX. Where there is a kernel the engine is the same with it.

The parsers also pass over an input that they don't know, without a word.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx

FILLED_INPUT = "nonpad_kv_seqlen"
"""How many keys of each sequence are filled, where the others lie behind them."""

_DECOMPOSABLE = "TRT_decomposable"
_FILLED = 6  # its place


def read_graph(path: Path) -> onnx.ModelProto:
    """A graph without the weights that lie in files of their own."""
    return onnx.load(path, load_external_data=False)


def let_decompose(model: onnx.ModelProto) -> bool:
    """Lets a builder write out each Attention that it has no kernel for.

    Args:
        model: It is changed.

    Returns:
        Whether there is any.
    """
    found = list(_attentions(model.graph))
    for node in found:
        if all(attribute.name != _DECOMPOSABLE for attribute in node.attribute):
            attribute = onnx.AttributeProto(name=_DECOMPOSABLE, type=onnx.AttributeProto.INT, i=1)
            node.attribute.append(attribute)
    return bool(found)


def passed_over(model: onnx.ModelProto) -> Iterator[tuple[str, str]]:
    """The nodes of which a parser would take a part only, by name, each with the reason.

    An engine of such a graph would attend to what is not filled yet.
    """
    for node in _attentions(model.graph):
        if len(node.input) > _FILLED and node.input[_FILLED]:
            yield node.name, f"the parser passes over its input {FILLED_INPUT}, without a word"


def _attentions(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        if node.op_type == "Attention" and node.domain in ("", "ai.onnx"):
            yield node
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                yield from _attentions(body)
