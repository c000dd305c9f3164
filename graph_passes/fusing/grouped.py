"""Writes an attention as ONNX Runtime's GroupQueryAttention, with its cache in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from graph_passes.cleanup import sweep
from graph_passes.errors import FusionError
from graph_passes.fused_norms import DOMAIN, take_over
from graph_passes.fusing.attention_sites import AttentionSite, find_attentions
from graph_passes.fusing.rotary import RotaryTables

_HEADS_LAST = (0, 2, 1, 3)


@dataclass(frozen=True, eq=False)
class Lengths:
    """Of each row, the filled positions less one, ``[batch]``; of all, the largest number."""

    filled: ir.Value
    total: ir.Value


class GroupedWriter:
    """Writes into one graph; what the attentions share is made once."""

    def __init__(self, graph: ir.Graph, mask: ir.Value, dtype: ir.DataType) -> None:
        """Makes the lengths.

        mask: the input that tells each row's tokens, `[batch, total]`.
        """
        self._graph = graph
        self._dtype = dtype
        self._tables: dict[ir.Value, ir.Value] = {}
        self._shapes: dict[tuple[int, ...], ir.Value] = {}
        self._lengths = self._made_lengths(mask)

    def write(self, site: AttentionSite, tables: RotaryTables | None, window: int | None) -> None:
        """Puts the operator in an attention's place; what it replaces is dead then."""
        query, key = (site.query, site.key) if tables is None else (tables.query, tables.key)
        before: list[ir.Node] = []
        operands = [self._flat(value, before) for value in (query, key, site.value)]
        caches = () if tables is None else self._caches(tables)
        node = ir.Node(
            DOMAIN,
            "GroupQueryAttention",
            [*operands, *site.past, self._lengths.filled, self._lengths.total, *caches],
            _attributes(site, tables, window),
            num_outputs=3,
            name=site.core.name,
        )
        self._graph.insert_before(site.core, [*before, node])
        width = site.heads * site.head_size
        flat = node.outputs[0]
        shape = site.output.shape
        batch, new = (None, None) if shape is None else (shape[0], shape[2])
        flat.type, flat.shape = ir.TensorType(self._dtype), ir.Shape([batch, new, width])
        for old, new_value in zip(site.present, node.outputs[1:], strict=True):
            take_over(new_value, old)
        self._connect(site, flat)
        site.core.name = None

    def _connect(self, site: AttentionSite, flat: ir.Value) -> None:
        """Hands the result, heads side by side, to those who read it."""
        if all(_turns(node) for node, _ in site.output.uses()):
            for transpose, _ in list(site.output.uses()):
                self._connect_turned(site, transpose.outputs[0], flat)
            return
        split = self._reshaped(site, flat, site.core)
        node = ir.Node("", "Transpose", [split], [ir.AttrInt64s("perm", _HEADS_LAST)])
        self._graph.insert_before(site.core, node)
        take_over(node.outputs[0], site.output)

    def _connect_turned(self, site: AttentionSite, turned: ir.Value, flat: ir.Value) -> None:
        width = site.heads * site.head_size
        for node, _ in list(turned.uses()):
            result = node.outputs[0]
            if node.op_type == "Reshape" and _rank(result) == 3 and _last(result) in (None, width):
                flat.shape = result.shape.copy() if result.shape is not None else flat.shape
                result.replace_all_uses_with(flat)
        if turned.uses():
            producer = turned.producer()
            assert producer is not None
            split = self._reshaped(site, flat, producer)
            turned.replace_all_uses_with(split)

    def _reshaped(self, site: AttentionSite, flat: ir.Value, before: ir.Node) -> ir.Value:
        sizes = self._shape((0, 0, site.heads, site.head_size))
        node = ir.Node("", "Reshape", [flat, sizes])
        self._graph.insert_before(before, node)
        return node.outputs[0]

    def _flat(self, value: ir.Value, made: list[ir.Node]) -> ir.Value:
        """Heads side by side: ``[batch, heads, new, size]`` to ``[batch, new, heads * size]``."""
        turn = value.producer()
        if turn is not None and _turns(turn) and turn.inputs[0] is not None:
            split = turn.inputs[0]
            whole = _before_split(split, _product(value))
            if whole is not None:
                return whole
        else:
            node = ir.Node("", "Transpose", [value], [ir.AttrInt64s("perm", _HEADS_LAST)])
            made.append(node)
            split = node.outputs[0]
        node = ir.Node("", "Reshape", [split, self._shape((0, 0, -1))])
        made.append(node)
        flat = node.outputs[0]
        flat.type = value.type
        if value.shape is not None:
            flat.shape = ir.Shape([value.shape[0], value.shape[2], _product(value)])
        return flat

    def _caches(self, tables: RotaryTables) -> tuple[ir.Value, ir.Value]:
        cos, sin = tables.sources
        first = cos not in self._tables
        number = len(self._tables) // 2
        if first:
            for value, name, table in ((cos, "cos", tables.cos), (sin, "sin", tables.sin)):
                label = f"{name}_cache" if not number else f"{name}_cache.{number}"
                self._tables[value] = self._weight(label, table.astype(self._dtype.numpy()))
        return self._tables[cos], self._tables[sin]

    def _shape(self, sizes: tuple[int, ...]) -> ir.Value:
        if sizes not in self._shapes:
            name = "shape_" + "_".join(map(str, sizes)).replace("-", "m")
            self._shapes[sizes] = self._weight(name, np.array(sizes, np.int64))
        return self._shapes[sizes]

    def _weight(self, name: str, array: NDArray[Any]) -> ir.Value:
        while name in self._graph.initializers:
            name += "_"
        tensor = ir.tensor(array, name=name)
        value = ir.Value(
            name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )  # fmt: skip
        self._graph.initializers[name] = value
        return value

    def _made_lengths(self, mask: ir.Value) -> Lengths:
        rows = self._weight("mask_axis", np.array([1], np.int64))
        one = self._weight("one", np.array(1, mask.dtype.numpy() if mask.dtype else np.int64))
        to_int32 = [ir.AttrInt64("to", ir.DataType.INT32)]
        count = ir.Node("", "ReduceSum", [mask, rows], [ir.AttrInt64("keepdims", 0)])
        less = ir.Node("", "Sub", [count.outputs[0], one])
        filled = ir.Node("", "Cast", less.outputs, to_int32)
        shape = ir.Node("", "Shape", [mask], [ir.AttrInt64("start", 1), ir.AttrInt64("end", 2)])
        scalar = ir.Node("", "Squeeze", shape.outputs)
        total = ir.Node("", "Cast", scalar.outputs, to_int32)
        nodes = [count, less, filled, shape, scalar, total]
        first = next(iter(self._graph))
        self._graph.insert_before(first, nodes)
        filled.outputs[0].name, total.outputs[0].name = "seqlens_k", "total_sequence_length"
        for node in (filled, total):
            node.outputs[0].type = ir.TensorType(ir.DataType.INT32)
        return Lengths(filled.outputs[0], total.outputs[0])


def _attributes(
    site: AttentionSite, tables: RotaryTables | None, window: int | None
) -> Sequence[ir.Attr]:
    result = [
        ir.AttrInt64("num_heads", site.heads),
        ir.AttrInt64("kv_num_heads", site.kv_heads),
        ir.AttrFloat32("scale", site.scale),
        ir.AttrInt64("do_rotary", int(tables is not None)),
        ir.AttrInt64("rotary_interleaved", int(tables is not None and tables.interleaved)),
        ir.AttrInt64("local_window_size", -1 if window is None else window),
    ]
    return [*result, ir.AttrFloat32("softcap", site.softcap)] if site.softcap else result


def _turns(node: ir.Node) -> bool:
    """Whether a node swaps heads and tokens."""
    order = node.attributes.get("perm")
    return (
        node.op_type == "Transpose"
        and order is not None
        and (tuple(order.as_ints()) == _HEADS_LAST)
    )


def _before_split(split: ir.Value, width: int | None) -> ir.Value | None:
    """What heads were made of by a Reshape, if that has them side by side."""
    reshape = split.producer()
    whole = reshape.inputs[0] if reshape is not None and reshape.op_type == "Reshape" else None
    if whole is None or width is None or _rank(whole) != 3 or _last(whole) != width:
        return None
    return whole


def _rank(value: ir.Value) -> int | None:
    return None if value.shape is None else len(value.shape)


def _last(value: ir.Value) -> int | None:
    size = value.shape[-1] if value.shape is not None and len(value.shape) else None
    return size if isinstance(size, int) else None


def _product(value: ir.Value) -> int | None:
    """Heads times their size."""
    if value.shape is None or len(value.shape) != 4:
        return None
    heads, size = value.shape[1], value.shape[3]
    return heads * size if isinstance(heads, int) and isinstance(size, int) else None


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
        sites = [
            site
            for site in find_attentions(graph)
            if site.core.op_type != "Attention" or tuple(site.core.inputs[1:3]) != site.present
        ]
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
            f"The attention at node {site.core.name!r} bounds its scores.", code="unknown-mask"
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
            f"The graph {what}: it can't be raised to opset {least}.", code="opset-out-of-range"
        )
    model.opset_imports[""] = least
