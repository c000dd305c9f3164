"""What makes two sublayers cost the same time, as far as a graph tells."""

from __future__ import annotations

import onnx_ir as ir

from exporter.files import sha256_bytes
from graph_passes.finding.dataflow import CONTRACTIONS
from graph_passes.finding.operators import is_fused_attention
from graph_passes.finding.weights import is_weight
from graph_passes.locate import FoundSite

_LETTERS = 12
_WORK = frozenset({"local_window_size", "sliding_window_cache", "num_heads", "kv_num_heads"})
"""Attributes of fused attentions that decide how much they compute."""


def signature_of(site: FoundSite) -> str:
    """A short digest of a sublayer's work: what is multiplied, by what shapes, how far back.

    Operators that multiply nothing are left out: they cost little, and exporters write some of
    them in one layer alone on behalf of all.
    """
    weights = sorted(_weights(site).values())
    work = sorted(filter(None, map(_work, site.dying)))
    caches = [_numbers(value) for value in site.caches]
    told = repr((site.kind, weights, work, caches))
    return sha256_bytes(told.encode())[:_LETTERS]


def _weights(site: FoundSite) -> dict[ir.Value, tuple[str, str, str]]:
    """What each matrix is; vectors are norms and biases."""
    return {
        value: (node.op_type, value.const_value.dtype.name, str(value.const_value.shape))
        for node in site.dying
        for value in node.inputs
        if value is not None and is_weight(value) and value.const_value is not None
        if len(value.const_value.shape) > 1
    }


def _numbers(cache: ir.Value) -> list[int]:
    """The sizes that are no names, which may be a layer's own."""
    return [dim for dim in cache.shape or () if isinstance(dim, int)]


def _work(node: ir.Node) -> str:
    if not is_fused_attention(node) and node.op_type not in CONTRACTIONS:
        return ""
    told = {
        name: attribute.value
        for name, attribute in node.attributes.items()
        if name in _WORK and not attribute.is_ref()
    }
    return f"{node.domain}.{node.op_type}{sorted(told.items())}"
