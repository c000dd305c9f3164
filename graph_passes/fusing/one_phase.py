"""Rewrites attentions with caches in place for one phase, where the mask tells only the past."""

from __future__ import annotations

from typing import Literal

import onnx_ir as ir

from graph_passes.cleanup import sweep
from graph_passes.fusing.cache_in_place import SCATTER, graph_input, sees_whole_past
from graph_passes.fusing.masks import IDS, MASK
from graph_passes.fusing.new_nodes import NewNodes

LENGTHS = "cache_lengths"
"""The name of a decode step's numbers, int64 ``[batch]``."""

_KEYS_AND_VALUES, _MASK, _FILLED = (1, 2), 3, 6  # places of an attention's inputs
_UPDATE, _BEGIN = 1, 2  # of a scatter's


class OnePhasePass(ir.passes.InPlacePass):
    """Takes the masks that :mod:`.cache_in_place` makes out of a graph; see the module.

    ``modified`` is false, and the graph as it was, where some attention's mask tells more than the
    past, a window for one, or an attention has no cache in place.
    """

    def __init__(self, phase: Literal["prefill", "decode"]) -> None:
        super().__init__()
        self.phase = phase

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites all attentions, or none."""
        graph = model.graph
        attentions = [node for node in graph if node.op_type == "Attention" and node.domain == ""]
        if not attentions or not all(map(_sees_the_past_alone, attentions)):
            return ir.passes.PassResult(model, modified=False)
        masks = [node.inputs[_MASK] for node in attentions]
        for node in attentions:
            node.replace_input_with(_MASK, None)
        if self.phase == "prefill":
            _see_new_tokens(graph, attentions)
        else:
            _see_filled(graph, attentions)
        sweep(graph, [mask.producer() for mask in dict.fromkeys(masks) if mask is not None])
        return ir.passes.PassResult(model, modified=True)


def _sees_the_past_alone(attention: ir.Node) -> bool:
    given = [*attention.inputs, *[None] * (_FILLED + 1 - len(attention.inputs))]
    mask = given[_MASK]
    return (
        mask is not None
        and not any(given[_MASK + 1 :])
        and all(_scatter(attention, place) is not None for place in _KEYS_AND_VALUES)
        and sees_whole_past(mask)
    )


def _scatter(attention: ir.Node, place: int) -> ir.Node | None:
    cache = attention.inputs[place]
    node = cache.producer() if cache is not None else None
    return node if node is not None and node.op_type == SCATTER else None


def _see_new_tokens(graph: ir.Graph, attentions: list[ir.Node]) -> None:
    nodes = NewNodes(graph, "prefill")
    rows = nodes.op("Shape", graph_input(graph, IDS), start=0, end=1)
    _begin_at(graph, nodes, nodes.op("Expand", nodes.integers([0]), rows))
    for node in attentions:
        node.attributes.add(ir.AttrInt64("is_causal", 1))
        for place in _KEYS_AND_VALUES:
            scatter = _scatter(node, place)
            assert scatter is not None
            node.replace_input_with(place, scatter.inputs[_UPDATE])


def _see_filled(graph: ir.Graph, attentions: list[ir.Node]) -> None:
    nodes = NewNodes(graph, "decode")
    op, integers = nodes.op, nodes.integers
    new = op("Shape", graph_input(graph, IDS), start=1, end=2)
    value = op("Cast", graph_input(graph, MASK), to=ir.DataType.INT64.value)
    # A new token sees itself, whatever the mask tells.
    lengths = op("Max", op("ReduceSum", value, integers([1]), keepdims=0), new)
    lengths.name = LENGTHS
    _begin_at(graph, nodes, op("Sub", lengths, new))
    for node in attentions:
        node.resize_inputs(_FILLED + 1)
        node.replace_input_with(_FILLED, lengths)


def _begin_at(graph: ir.Graph, nodes: NewNodes, begin: ir.Value) -> None:
    """Writes new keys and values from ``begin`` on, int64 ``[batch]``."""
    nodes.put_before(next(iter(graph)))
    old = [node.inputs[_BEGIN] for node in graph if node.op_type == SCATTER]
    for node in graph:
        if node.op_type == SCATTER:
            node.replace_input_with(_BEGIN, begin)
    sweep(graph, [value.producer() for value in dict.fromkeys(old) if value is not None])
