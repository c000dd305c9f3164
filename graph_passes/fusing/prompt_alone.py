"""Rewrites attentions with caches in place for prompts alone, if masks tell only the past."""

from __future__ import annotations

import onnx_ir as ir

from graph_passes.cleanup import sweep
from graph_passes.fusing.cache_in_place import SCATTER, graph_input, sees_whole_past
from graph_passes.fusing.masks import IDS
from graph_passes.fusing.new_nodes import NewNodes

_KEYS_AND_VALUES, _MASK, _FILLED = (1, 2), 3, 6  # places of an attention's inputs
_UPDATE, _BEGIN = 1, 2  # of a scatter's


class PromptAlonePass(ir.passes.InPlacePass):
    """Takes the masks that :mod:`.cache_in_place` makes out of a graph that runs on empty caches.

    ``modified`` is false, and the graph as it was, where some attention's mask tells more than the
    past, a window for one, or an attention has no cache in place.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites all attentions, or none."""
        graph = model.graph
        attentions = [node for node in graph if node.op_type == "Attention" and node.domain == ""]
        if not attentions or not all(map(_sees_the_past_alone, attentions)):
            return ir.passes.PassResult(model, modified=False)
        masks = [node.inputs[_MASK] for node in attentions]
        for node in attentions:
            node.replace_input_with(_MASK, None)
        _see_new_tokens(graph, attentions)
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
    """Each attention reads the prompt's own keys and values, which are written from 0 on."""
    nodes = NewNodes(graph, "prefill")
    rows = nodes.op("Shape", graph_input(graph, IDS), start=0, end=1)
    begin = nodes.op("Expand", nodes.integers([0]), rows)
    nodes.put_before(next(iter(graph)))
    scatters = [node for node in graph if node.op_type == SCATTER]
    old = [node.inputs[_BEGIN] for node in scatters]
    for node in scatters:
        node.replace_input_with(_BEGIN, begin)
    sweep(graph, [value.producer() for value in dict.fromkeys(old) if value is not None])
    for node in attentions:
        node.attributes.add(ir.AttrInt64("is_causal", 1))
        for place in _KEYS_AND_VALUES:
            scatter = _scatter(node, place)
            assert scatter is not None
            node.replace_input_with(place, scatter.inputs[_UPDATE])
