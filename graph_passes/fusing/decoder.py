"""Writes a decoder in the fused operators of ONNX Runtime, its cache in place."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import onnx_ir as ir

from graph_passes.cleanup import CleanupPass
from graph_passes.errors import FusionError
from graph_passes.finding.dataflow import is_add
from graph_passes.finding.shapes import dims
from graph_passes.fused_norms import BIAS_SLOTS, DOMAIN, take_over, without_trailing_gaps
from graph_passes.fusing.attention_sites import AttentionSite, find_attentions
from graph_passes.fusing.grouped import GroupedWriter
from graph_passes.fusing.masks import IDS, MASK, POSITIONS, window_of
from graph_passes.fusing.packing import pack_projections
from graph_passes.fusing.rotary import RotaryFinder, RotaryTables

_DTYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


@dataclass(frozen=True)
class FusionReport:
    """What was fused."""

    fused: dict[str, int] = field(default_factory=dict)
    packed: int = 0
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class _Finding:
    site: AttentionSite
    tables: RotaryTables | None
    window: int | None


def fuse_decoder(
    model: ir.Model, *, positions: int, pack_qkv: bool = True
) -> tuple[ir.Model, FusionReport]:
    """Writes a decoder in ONNX Runtime's fused operators.

    The result computes the same for rows whose padding, if any, stands behind their tokens. Its
    caches may be longer than what is in them, past and present in one buffer; the attention mask
    alone tells how much is filled. Where it rotates inside of the attention, positions are counted
    from 0 and ``position_ids`` is no input any more.
    """
    fused = model.clone()
    graph = fused.graph
    findings, remarks = _find(graph, positions)
    mask = next(value for value in graph.inputs if value.name == MASK)
    writer = GroupedWriter(graph, mask, _dtype(findings[0].site))
    for finding in findings:
        writer.write(finding.site, finding.tables, finding.window)
    CleanupPass(keep_debug=True)(fused)
    _reread_lengths(graph, findings)
    packed = pack_projections(graph) if pack_qkv else 0
    fuse_skip_norms(graph)
    graph.opset_imports.setdefault(DOMAIN, 1)
    graph.sort()
    CleanupPass(keep_debug=True)(fused)
    _drop_positions(graph)
    counts = Counter(node.op_type for node in graph if node.domain == DOMAIN)
    return fused, FusionReport(dict(sorted(counts.items())), packed, remarks)


def _find(graph: ir.Graph, positions: int) -> tuple[list[_Finding], tuple[str, ...]]:
    """Everything that has to be known before anything is changed."""
    names = {value.name for value in graph.inputs}
    if not {MASK, IDS} <= names:
        raise FusionError(f"The graph has no {MASK!r} or no {IDS!r} among its inputs.")
    sites = find_attentions(graph)
    _check_types(sites)
    _check_caches(graph, sites)
    rotaries = RotaryFinder(graph, positions)
    windows: dict[ir.Value, int | None] = {}
    findings, remarks = [], dict[str, None]()
    for site in sites:
        if site.mask not in windows:
            windows[site.mask] = window_of(graph, site.mask, positions)
        result = rotaries.tables(site)
        if isinstance(result, str) and result:
            remarks[f"Queries and keys are rotated before the attention: {result}."] = None
        tables = None if isinstance(result, str) else result
        findings.append(_Finding(site, tables, windows[site.mask]))
    return findings, tuple(remarks)


def _check_caches(graph: ir.Graph, sites: list[AttentionSite]) -> None:
    """Each cache belongs to one attention: a graph of which a part is fused would serve no one."""
    owned = Counter(past for site in sites for past in site.past)
    for value in graph.inputs:
        if value.dtype is not None and value.dtype.is_floating_point() and owned[value] != 1:
            number = owned[value] or "none"
            raise FusionError(
                f"The cache {value.name!r} belongs to {number} of the attentions.",
                code="cache-still-read",
            )


def _check_types(sites: list[AttentionSite]) -> None:
    for site in sites:
        result = _dtype(site)
        if result not in _DTYPES:
            raise FusionError(
                f"The attention at node {site.core.name!r} keeps its cache in {result.name}; "
                "GroupQueryAttention takes FLOAT or FLOAT16 here."
            )


def _dtype(site: AttentionSite) -> ir.DataType:
    return site.past[0].dtype or ir.DataType.UNDEFINED


def _reread_lengths(graph: ir.Graph, findings: list[_Finding]) -> None:
    """Takes the past's length from mask and tokens where a cache's own was read."""
    inputs = {value.name: value for value in graph.inputs}
    length: ir.Value | None = None
    for past in (past for finding in findings for past in finding.site.past):
        for node, _ in list(past.uses()):
            if node.op_type == "GroupQueryAttention":
                continue
            if not _reads_length(node):
                raise FusionError(f"Node {node.name!r} reads the cache {past.name!r} too.")
            length = length or _past_length(graph, inputs[MASK], inputs[IDS])
            node.outputs[0].replace_all_uses_with(length)
            graph.remove(node, safe=True)


def _reads_length(node: ir.Node) -> bool:
    ends = node.attributes.get_int("start", 0), node.attributes.get_int("end", 0)
    return node.op_type == "Shape" and ends == (2, 3)


def _past_length(graph: ir.Graph, mask: ir.Value, ids: ir.Value) -> ir.Value:
    second = [ir.AttrInt64("start", 1), ir.AttrInt64("end", 2)]
    shapes = [ir.Node("", "Shape", [value], second) for value in (mask, ids)]
    past = ir.Node("", "Sub", [shape.outputs[0] for shape in shapes])
    past.outputs[0].type = ir.TensorType(ir.DataType.INT64)
    graph.insert_before(next(iter(graph)), [*shapes, past])
    return past.outputs[0]


def _drop_positions(graph: ir.Graph) -> None:
    for value in list(graph.inputs):
        if value.name == POSITIONS and not value.uses():
            graph.inputs.remove(value)


_SUM = 3
_FUSED = {
    "LayerNormalization": "SkipLayerNormalization",
    "RMSNormalization": "SkipSimplifiedLayerNormalization",
    "SimplifiedLayerNormalization": "SkipSimplifiedLayerNormalization",
}
_EPSILON = 1e-5  # the norms' default
_LAST_AXIS = -1


def fuse_skip_norms(graph: ir.Graph) -> int:
    """Fuses each sum of two values of one shape with the first norm that reads it."""
    return sum(_fuse(graph, node) for node in list(graph) if node.op_type in _FUSED)


def _fuse(graph: ir.Graph, norm: ir.Node) -> bool:
    stream = norm.inputs[0]
    add = stream.producer() if stream is not None else None
    if add is None or add.graph is not graph or not is_add(add) or not _fits(norm, add):
        return False
    operands, bias = _without_bias(add)
    op_type = _FUSED[norm.op_type]
    weights = [*norm.inputs[1:], *[None] * (BIAS_SLOTS[op_type] - 1 - len(norm.inputs))]
    read = add.outputs[0].is_graph_output() or len(list(add.outputs[0].uses())) > 1
    fused = ir.Node(
        DOMAIN,
        op_type,
        without_trailing_gaps([*operands, *weights, *bias]),
        [ir.AttrFloat32("epsilon", norm.attributes.get_float("epsilon", _EPSILON))],
        num_outputs=_SUM + 1 if read else 1,
        name=norm.name,
        metadata_props=dict(norm.metadata_props),
    )
    for unused in fused.outputs[1:_SUM]:
        unused.name = ""
    graph.insert_before(norm, fused)
    take_over(fused.outputs[0], norm.outputs[0])
    graph.remove(norm, safe=True)
    if read:
        take_over(fused.outputs[_SUM], add.outputs[0])
    graph.remove(add, safe=True)
    return True


def _fits(norm: ir.Node, add: ir.Node) -> bool:
    """Whether the norm is one over the last dimension, and the sum one of equal shapes."""
    if norm.domain not in ("", DOMAIN) or any(value.uses() for value in norm.outputs[1:]):
        return False
    one, other = (None if value is None else dims(value) for value in add.inputs)
    if one is None or one != other or None in one or len(one) not in (2, 3):
        return False
    axis = norm.attributes.get_int("axis", _LAST_AXIS)
    weights = norm.inputs[1:]
    whole = all(value is not None and dims(value) == one[-1:] for value in weights)
    return whole and bool(weights) and axis in (_LAST_AXIS, len(one) - 1)


def _without_bias(add: ir.Node) -> tuple[list[ir.Value | None], list[ir.Value]]:
    """A sum's operands, and the constant that one of them ends with, if no one else reads it."""
    operands = list(add.inputs)
    for slot, operand in enumerate(operands):
        inner = operand.producer() if operand is not None else None
        if inner is None or operand is None or not is_add(inner) or len(list(operand.uses())) > 1:
            continue
        for value, bias in (inner.inputs, inner.inputs[::-1]):
            if value is None or bias is None or not bias.is_initializer():
                continue
            width = dims(operand)
            if width is not None and dims(value) == width and dims(bias) == width[-1:]:
                operands[slot] = value
                return operands, [bias]
    return operands, []
