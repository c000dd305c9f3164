"""Gives the caches of a decoder a fixed length, and updates them in place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest

import numpy as np
import onnx_ir as ir

from graph_passes.cleanup import sweep
from graph_passes.errors import FusionError
from graph_passes.fused_norms import take_over
from graph_passes.fusing.attention_sites import AttentionSite, find_attentions, made_by
from graph_passes.fusing.grouped import attend, raise_opset, refuse_softcap
from graph_passes.fusing.masks import IDS, MASK, window_of
from graph_passes.fusing.new_nodes import NewNodes

SCATTER = "TensorScatter"
_SINCE = 24
_LENGTH = 2
"""The axis of a cache."""
_READS_LENGTH = "reads the length of a cache or of the mask, which is fixed now"


class CacheInPlacePass(ir.passes.InPlacePass):
    """Updates all caches of a decoder in place; see the module."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Finds all attentions and what their masks let them see, then rewrites them."""
        graph = model.graph
        sites = find_attentions(graph)
        for site in sites:
            refuse_softcap(site)
        windows = {
            mask: window_of(graph, mask, self.room)
            for mask in dict.fromkeys(site.mask for site in sites)
        }
        raise_opset(model, _SINCE)
        places = _Places(graph, self.room)
        seen = {window: places.seen(window) for window in dict.fromkeys(windows.values())}
        for site in sites:
            places.scatter(site, seen[windows[site.mask]])
        sweep(graph, list(graph))
        _fix_lengths(graph, sites, self.room)
        graph.sort()
        return ir.passes.PassResult(model, modified=True)


class _Places:
    """Where new tokens go, and what may be seen from there."""

    def __init__(self, graph: ir.Graph, room: int) -> None:
        self._graph = graph
        self._nodes = NewNodes(graph, "cache")
        self._start = next(iter(graph))
        op, integers = self._nodes.op, self._nodes.integers
        mask, ids = graph_input(graph, MASK), graph_input(graph, IDS)
        self._columns = op("Range", integers(0), integers(room), integers(1))
        counted = op("Add", self._columns, integers(1))
        ends = op("Mul", op("Cast", mask, to=ir.DataType.INT64.value), counted)
        new = op("Shape", ids, start=1, end=2)
        end = op("ReduceMax", ends, keepdims=0)
        # An empty mask must not make anyone write before the cache.
        begin = op("Max", op("Sub", end, new), integers([0]))
        self._begin = op("Expand", begin, op("Shape", ids, start=0, end=1))  # [batch]
        steps = op("Range", integers(0), op("Squeeze", new), integers(1))
        self._rows = op("Unsqueeze", op("Add", begin, steps), integers([0, 1, 3]))
        value = op("Unsqueeze", op("Cast", mask, to=ir.DataType.BOOL.value), integers([1, 2]))
        self._earlier = op("And", op("Less", self._columns, self._rows), value)
        self._nodes.put_before(self._start)

    def seen(self, window: int | None) -> ir.Value:
        """What each query sees, bool ``[batch, 1, new, room]``."""
        op, earlier = self._nodes.op, self._earlier
        if window is not None:
            oldest = op("Sub", self._rows, self._nodes.integers([window]))
            earlier = op("And", earlier, op("Greater", self._columns, oldest))
        value = op("Or", earlier, op("Equal", self._columns, self._rows))
        self._nodes.put_before(self._start)
        return value

    def scatter(self, site: AttentionSite, seen: ir.Value) -> None:
        """Rewrites one attention and its two caches."""
        op, begin = self._nodes.op, self._begin
        key, value = (
            op(SCATTER, past, new, begin, axis=_LENGTH, mode="linear")
            for past, new in zip(site.past, (site.key, site.value), strict=True)
        )
        self._nodes.put_before(site.core)
        attend(self._graph, site, (key, value), seen)
        for old, now in zip(site.present, (key, value), strict=True):
            take_over(now, old)


def sees_whole_past(mask: ir.Value) -> bool:
    """Whether a mask that this pass has made lets each query see all that is filled before it.

    That is: it has no window. Of any other mask, false.
    """
    either = made_by(mask, "Or")
    if either is None:
        return False
    earlier, itself = made_by(either.inputs[0], "And"), made_by(either.inputs[1], "Equal")
    before = made_by(earlier.inputs[0], "Less") if earlier is not None else None
    if earlier is None or itself is None or before is None:
        return False
    turned = made_by(earlier.inputs[1], "Unsqueeze")
    node = made_by(turned.inputs[0], "Cast") if turned is not None else None
    source = node.inputs[0] if node is not None else None
    return (
        source is not None
        and (source.is_graph_input() and source.name == MASK)
        and tuple(before.inputs) == tuple(itself.inputs)
    )


def _fix_lengths(graph: ir.Graph, sites: Iterable[AttentionSite], room: int) -> None:
    """Declares the lengths, once nothing depends on them any more."""
    mask = graph_input(graph, MASK)
    pasts = [past for site in sites for past in site.past]
    if any(_reads_axis(node, 1) for node, _ in mask.uses()):
        raise FusionError(f"Something {_READS_LENGTH}.")
    for past in pasts:
        others = [node for node, _ in past.uses() if node.op_type != SCATTER]
        if any(_reads_axis(node, _LENGTH) for node in others):
            raise FusionError(f"Node {others[0].name!r} {_READS_LENGTH}.", code="cache-still-read")
    shown = [v for v in graph.outputs if (n := v.producer()) is not None and n.op_type == SCATTER]
    _set_size(mask, 1, room)
    for value in (*pasts, *shown):
        _set_size(value, _LENGTH, room)


def _reads_axis(node: ir.Node, axis: int) -> bool:
    """Whether a node may depend on how long a value is along an axis."""
    if node.op_type == "Shape" and node.domain == "":
        end = node.attributes.get_int("end", axis + 1)
        return not (node.attributes.get_int("start", 0) > axis or 0 <= end <= axis)
    return node.op_type != "Cast"


def _set_size(value: ir.Value, axis: int, size: int) -> None:
    if value.shape is not None:
        dims = list(value.shape)
        dims[axis] = size
        value.shape = ir.Shape(dims)


def graph_input(graph: ir.Graph, name: str) -> ir.Value:
    """The input of a name."""
    result = next((value for value in graph.inputs if value.name == name), None)
    if result is None:
        raise FusionError(f"The graph has no input {name!r}.")
    return result


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
