"""Which graph inputs are the KV cache of a branch; told by how they are used, not by names."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Set

import onnx_ir as ir

from graph_passes.finding.dataflow import (
    CONTRACTIONS,
    Dominators,
    GraphIndex,
    factors,
    has_weight,
    is_shape_read,
)
from graph_passes.finding.operators import is_fused_attention
from graph_passes.finding.shapes import dims

_NO_CACHE = {ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL, ir.DataType.STRING}
_MOVES = frozenset(
    {"Concat", "Reshape", "Transpose", "Cast", "Identity", "Expand", "Unsqueeze", "Squeeze"}
    | {"Slice", "Gather", "DequantizeLinear"}
)
_SCALES = frozenset({"Mul", "Div"})
_NEW = (0, 1, 2)
_SLOTS = {
    ("", "Attention"): (*_NEW, 4, 5),
    ("com.microsoft", "Attention"): (0, 4),
    ("com.microsoft", "MultiHeadAttention"): (*_NEW, 6, 7),
    ("com.microsoft", "DecoderMaskedMultiHeadAttention"): (*_NEW, 5, 6),
    ("com.microsoft", "GroupQueryAttention"): (*_NEW, 3, 4),
    ("com.microsoft", "SparseAttention"): (*_NEW, 3, 4),
}
"""Where a fused attention takes what it puts into its caches; a mask doesn't stand there."""


def own_caches(
    index: GraphIndex, dying: Set[ir.Node], outputs: Collection[ir.Value]
) -> tuple[ir.Value, ...]:
    """The cache inputs that only dying nodes read, shapes aside.

    A cache is carried over into a cache output of the branch, or goes as it is into a product
    with another activation, as the keys and values of cross attention do. A mask does neither.
    """
    read = {value for node in dying for value in index.reads(node) if value in index.input_place}
    return tuple(
        value
        for value in sorted(read, key=index.input_place.__getitem__)
        if not value.is_initializer()
        and not value.is_graph_output()  # passed through, so it stays
        and value.dtype not in _NO_CACHE
        and _read_only_by(index, value, dying)
        and (_is_carried_over(index, value, dying, outputs) or _is_multiplied(index, value, dying))
    )


def shown_keys(
    index: GraphIndex, branch: Set[ir.Node], dominators: Dominators
) -> dict[ir.Value, ir.Value]:
    """The graph outputs that show the keys and values of a cross attention as they are."""
    results: dict[ir.Value, ir.Value] = {}
    for node in branch:
        for value in _keys_and_values(index, node):
            origin = None if dominators.descends(value) else _origin(index, value)
            if origin is not None:
                results |= dict.fromkeys(_shown(index, origin), origin)
    return {value: results[value] for value in sorted(results, key=index.output_place.__getitem__)}


def goes(index: GraphIndex, origin: ir.Value, dying: Set[ir.Node]) -> bool:
    """Whether nothing needs a value once some nodes are gone."""
    producer = origin.producer()
    return _read_only_by(index, origin, dying) if producer is None else producer in dying


def _origin(index: GraphIndex, value: ir.Value) -> ir.Value | None:
    """Where keys or values come from, behind what only moves them; None if that can't be told."""
    while value not in index.input_place:
        node = value.producer()
        if node is None:
            return None
        if node.op_type in CONTRACTIONS:
            return value if has_weight(index, node) else None
        above = [v for v in index.data_reads(node) if v in index.varying]
        is_bias = node.op_type == "Add" and has_weight(index, node)
        if not above or not (is_bias or _only_moves(index, node)):
            return None
        value = above[0]
    return value


def _shown(index: GraphIndex, origin: ir.Value) -> Iterator[ir.Value]:
    seen = {origin}
    queue = [origin]
    while queue:
        value = queue.pop()
        if value in index.output_place:
            yield value
        for node in index.readers(value):
            is_bias = node.op_type == "Add" and has_weight(index, node)
            if is_bias or _only_moves(index, node):
                queue.extend(v for v in node.outputs if v not in seen)
                seen.update(node.outputs)


def _read_only_by(index: GraphIndex, value: ir.Value, nodes: Set[ir.Node]) -> bool:
    readers = [reader for reader in index.readers(value) if not is_shape_read(reader)]
    return bool(readers) and all(reader in nodes for reader in readers)


def _is_carried_over(
    index: GraphIndex, cache: ir.Value, dying: Set[ir.Node], outputs: Collection[ir.Value]
) -> bool:
    wanted = {value for value in outputs if _may_hold(value, cache)}
    seen = {cache}
    queue = [cache]
    while queue:
        value = queue.pop()
        if value in wanted:
            return True
        for node in index.readers(value):
            if node in dying and _carries(node, value):
                queue.extend(v for v in node.outputs if v not in seen)
                seen.update(node.outputs)
    return False


def _may_hold(output: ir.Value, cache: ir.Value) -> bool:
    """Whether the declared sizes let an output be the next step's cache."""
    have, want = dims(cache), dims(output)
    if have is None or want is None:
        return True
    return len(have) == len(want) and all(
        a == b or not (isinstance(a, int) and isinstance(b, int))
        for a, b in zip(have, want, strict=True)
    )


def _carries(node: ir.Node, value: ir.Value) -> bool:
    """Whether a node may pass a cache on, instead of computing something with it."""
    if is_fused_attention(node):
        slots = _SLOTS.get((node.domain, node.op_type))
        return slots is None or any(
            node.inputs[slot] is value for slot in slots if slot < len(node.inputs)
        )
    return node.op_type not in CONTRACTIONS and "Softmax" not in node.op_type


def _is_multiplied(index: GraphIndex, cache: ir.Value, dying: Set[ir.Node]) -> bool:
    seen = {cache}
    queue = [cache]
    while queue:
        value = queue.pop()
        for node in index.readers(value):
            if node not in dying:
                continue
            if value in _keys_and_values(index, node):
                return True
            if _only_moves(index, node):
                queue.extend(v for v in node.outputs if v not in seen)
                seen.update(node.outputs)
    return False


def _keys_and_values(index: GraphIndex, node: ir.Node) -> Iterator[ir.Value]:
    """What a node multiplies as activations."""
    if is_fused_attention(node):
        yield from (value for value in node.inputs[1:3] if value is not None)
    elif node.op_type in CONTRACTIONS:
        values = factors(node)
        if all(value in index.varying for value in values):
            yield from values


def _only_moves(index: GraphIndex, node: ir.Node) -> bool:
    if node.op_type in _SCALES:
        return any(value not in index.varying for value in index.reads(node))
    return node.op_type in _MOVES
