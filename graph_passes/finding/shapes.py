"""What the graph's annotations say about shapes, without inference."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

Dim = int | str | None
CHANGES_OF_FORM = frozenset({"Identity", "Cast", "QuantizeLinear", "DequantizeLinear"})
"""Operators that pass their first operand on in another type at most."""
_CACHE_RANK = 4


def dims(value: ir.Value) -> tuple[Dim, ...] | None:
    """A value's dimensions: numbers, names, None for the unknown; None for an unknown rank."""
    if value.shape is None:
        return None
    return tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape)


def carried_dims(value: ir.Value) -> tuple[Dim, ...] | None:
    """A value's dimensions, taken from further up where an operator only passes them on."""
    result = dims(value)
    node = value.producer()
    while result is None and node is not None and _keeps_shape(node):
        above = node.inputs[0]
        assert above is not None
        result, node = dims(above), above.producer()
    return result


def _keeps_shape(node: ir.Node) -> bool:
    """A change of type at most, or the Concat of one value with which some begin a cache."""
    if not node.inputs or node.inputs[0] is None:
        return False
    return node.op_type in CHANGES_OF_FORM or (node.op_type == "Concat" and len(node.inputs) == 1)


def declared_names(graph: ir.Graph) -> frozenset[str]:
    """The names of the graph inputs' dimensions: the only ones that someone chose.

    Shape inference makes up names for sizes that it can't follow; that two of those differ says
    nothing.
    """
    return frozenset(
        dim for value in graph.inputs for dim in dims(value) or () if isinstance(dim, str)
    )


def broadcast_reason(skip: ir.Value, total: ir.Value, trusted: Collection[str]) -> str | None:
    """Why the skip can't stand in for the sum; None where no annotation speaks against it.

    A skip that only broadcasts to the sum's shape would leave a wrong shape behind.
    """
    kept, wanted = dims(skip), dims(total)
    if kept is None or wanted is None:
        return None
    if len(kept) == len(wanted) and not any(
        _differs(have, want, trusted) for have, want in zip(kept, wanted, strict=True)
    ):
        return None
    return f"the skip {skip.name!r} {list(kept)} only broadcasts to the sum's shape {list(wanted)}"


def _differs(have: Dim, want: Dim, trusted: Collection[str]) -> bool:
    if have == want or have is None or want is None:
        return False
    if isinstance(have, int):
        return have == 1 or isinstance(want, int)
    return have in trusted and want in trusted


def head_size(cache: ir.Value) -> int | None:
    """The size of a head in a cache ``[..., heads, length, head size]``; None if unknown.

    Where it isn't declared, it follows from the queries of the fused attention that reads it, or
    from the new keys or values that are appended to it.
    """
    if cache.shape is not None and isinstance(cache.shape[-1], int):
        return cache.shape[-1]
    numbers = (_head_size_at(node) for node, _ in cache.uses())
    return next((size for size in numbers if size is not None), None)


def head_count(cache: ir.Value) -> int | None:
    """The number of heads in a cache ``[batch, heads, length, head size]``; None if unknown.

    Where it isn't declared, the fused attention that reads it knows.
    """
    if cache.shape is not None and len(cache.shape) == _CACHE_RANK:
        declared = cache.shape[1]
        if isinstance(declared, int):
            return declared
    counts = (
        node.attributes.get_int("kv_num_heads", 0)
        for node, _ in cache.uses()
        if node.op_type == "GroupQueryAttention"
    )
    return next(filter(None, counts), None)


def _head_size_at(reader: ir.Node) -> int | None:
    if reader.op_type == "Concat":
        return next(filter(None, map(_last_size, reader.inputs)), None)
    heads = reader.attributes.get_int("num_heads", 0)
    if reader.op_type != "GroupQueryAttention" or not heads:
        return None
    if reader.inputs[1] is None:  # the keys and values stand behind the queries
        heads += 2 * reader.attributes.get_int("kv_num_heads", heads)
    width = _last_size(reader.inputs[0])
    return None if width is None else width // heads


def _last_size(value: ir.Value | None) -> int | None:
    known = carried_dims(value) if value is not None else None
    return known[-1] if known and isinstance(known[-1], int) else None
