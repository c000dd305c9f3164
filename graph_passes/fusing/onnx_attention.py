"""Attention in ONNX's own operator, on keys and values as the cache holds them."""

from __future__ import annotations

import onnx_ir as ir

from graph_passes.cleanup import sweep
from graph_passes.errors import FusionError
from graph_passes.fused_norms import take_over
from graph_passes.fusing.attention_sites import AttentionSite, find_attentions

_SINCE = 23
_OLDEST = 20
_CHANGED = frozenset({"GroupNormalization"})
"""Since opset 20 this one means something else; all others only take more types."""


class GroupedAttentionPass(ir.passes.InPlacePass):
    """Writes each attention of a decoder as one Attention that repeats nothing.

    The caches still grow. ``modified`` is false where all attentions are written so.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Finds all attentions, then rewrites them."""
        graph = model.graph
        sites = [site for site in find_attentions(graph) if not _is_grouped(site)]
        for site in sites:
            refuse_softcap(site)
        if sites:
            raise_opset(model, _SINCE)
        for site in sites:
            attend(graph, site, site.present, site.mask)
        sweep(graph, [site.core for site in sites])
        return ir.passes.PassResult(model, modified=bool(sites))


def attend(
    graph: ir.Graph, site: AttentionSite, cache: tuple[ir.Value, ir.Value], mask: ir.Value
) -> None:
    """Puts one Attention in the place of what gives an attention's result.

    cache: its keys and values, `[batch, kv heads, length, head size]`.
    mask: True or 0 where a query may look, `[batch or 1, 1, new, length]`.
    """
    name, site.core.name = site.core.name, None
    operands = [site.query, *cache, mask]
    node = ir.node("Attention", operands, {"scale": site.scale}, name=name)
    node.metadata_props.update(site.core.metadata_props)
    graph.insert_before(site.core, node)
    take_over(node.outputs[0], site.output)


def refuse_softcap(site: AttentionSite) -> None:
    """Keeps scores that are bounded from being taken for plain ones."""
    if site.softcap:
        raise FusionError(
            f"The attention at node {site.core.name!r} bounds its scores.", code="score-bound"
        )


def raise_opset(model: ir.Model, least: int) -> None:
    """Declares the opset that new operators need."""
    current = model.opset_imports.get("", 0)
    if current >= least:
        return
    changed = next((n for n in model.graph.all_nodes() if n.op_type in _CHANGED), None)
    if current < _OLDEST or changed is not None:
        what = f"has {changed.op_type}" if changed is not None else f"has opset {current}"
        raise FusionError(
            f"The graph {what}: it can't be raised to opset {least} as it is.", code="opset-too-old"
        )
    model.opset_imports[""] = least


def _is_grouped(site: AttentionSite) -> bool:
    return site.core.op_type == "Attention" and tuple(site.core.inputs[1:3]) == site.present
