"""Finds each attention of a decoder with all that belongs to it; changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import sqrt

import numpy as np
import onnx_ir as ir

from graph_passes.errors import FusionError

_SWAP_LAST, _SWAP_LAST_OF_3 = (0, 1, 3, 2), (0, 2, 1)
_LENGTH_AXES = (2, -2)
_RANK = 4


@dataclass(frozen=True, eq=False)
class AttentionSite:
    """One attention."""

    core: ir.Node
    output: ir.Value  # `[batch, heads, new, head size]`
    query: ir.Value
    key: ir.Value  # the new keys, `[batch, kv heads, new, head size]`
    value: ir.Value
    past: tuple[ir.Value, ir.Value]
    present: tuple[ir.Value, ir.Value]
    mask: ir.Value  # True or 0 where a query may look, `[batch or 1, 1, new, total]`
    heads: int
    kv_heads: int
    head_size: int
    scale: float
    softcap: float


@dataclass(frozen=True, eq=False)
class _Core:
    """The scores and their sum over the values, still with the whole keys and values."""

    node: ir.Node
    query: ir.Value
    keys: ir.Value
    values: ir.Value
    mask: ir.Value | None
    scale: float
    softcap: float = 0.0


def find_attentions(graph: ir.Graph) -> list[AttentionSite]:
    """All attentions of a decoder, in graph order."""
    sites = [_site(core) for node in graph for core in _cores(node)]
    if not sites:
        raise FusionError("The graph has no attention that is known here.")
    return sites


def _cores(node: ir.Node) -> Iterator[_Core]:
    if node.domain == "" and node.op_type == "Attention":
        yield _core_of_operator(node)
    elif node.op_type == "Softmax":
        core = _core_of_softmax(node)
        if core is not None:
            yield core


def _core_of_operator(node: ir.Node) -> _Core:
    inputs = [*node.inputs, *[None] * (6 - len(node.inputs))]
    query, keys, values, mask = inputs[:4]
    plain = not any(inputs[4:]) and not node.attributes.get_int("is_causal", 0)
    if query is None or keys is None or values is None or not plain or len(node.outputs) != 1:
        raise _refused(node, "has a cache or a causal mask of its own", "own-cache")
    head_size = _size(query, 3)
    scale = node.attributes.get_float("scale", 1 / sqrt(head_size) if head_size else 0.0)
    softcap = node.attributes.get_float("softcap", 0.0)
    return _Core(node, query, keys, values, mask, scale, softcap)


def _core_of_softmax(softmax: ir.Node) -> _Core | None:
    """The attention around a Softmax; None where that is something else, such as a router's."""
    product = _only_reader(_unguarded(softmax.outputs[0]))
    if product is None or product.op_type != "MatMul":
        return None
    scores, mask = _without_mask(softmax.inputs[0])
    scores, softcap = _without_softcap(scores)
    scores, scale = _without_factor(scores)
    node = made_by(scores, "MatMul")
    if node is None:
        return None
    query, query_factor = _without_factor(node.inputs[0])
    keys, key_factor = _without_factor(node.inputs[1])
    keys = _untransposed(keys)
    values = product.inputs[1]
    if query is None or keys is None or values is None or query.is_initializer():
        return None
    return _Core(product, query, keys, values, mask, scale * query_factor * key_factor, softcap)


def _unguarded(value: ir.Value) -> ir.Value:
    """Behind the guard that makes 0 of rows that see nothing."""
    readers = [node for node, _ in value.uses()]
    guard = next((node for node in readers if node.op_type == "Where"), None)
    asks = any(node.op_type == "IsNaN" for node in readers)
    return guard.outputs[0] if guard is not None and asks else value


def _without_mask(value: ir.Value | None) -> tuple[ir.Value | None, ir.Value | None]:
    """Scores without what is added to them last, and that."""
    add = made_by(value, "Add")
    if add is None:
        return value, None
    return add.inputs[0], add.inputs[1]


def _without_softcap(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    """Scores before ``c * tanh(scores / c)``, and ``c``."""
    inner, cap = _without_factor(value)
    tanh = made_by(inner, "Tanh")
    if tanh is None:
        return value, 0.0
    scaled, factor = _without_factor(tanh.inputs[0])
    if scaled is None or not np.isclose(cap * factor, 1.0, rtol=1e-5):
        return value, 0.0
    return scaled, cap


def _without_factor(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    """What a constant was multiplied with, and the constant."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type not in ("Mul", "Div"):
        return value, 1.0
    for inner, other in (node.inputs, node.inputs[::-1]):
        number = number_of(other)
        if number is None or (node.op_type == "Div" and other is node.inputs[0]):
            continue
        return inner, 1 / number if node.op_type == "Div" else number
    return value, 1.0


def _untransposed(value: ir.Value | None) -> ir.Value | None:
    """Keys before their last two dimensions were swapped; some exporters do that in three."""
    outer = made_by(value, "Reshape")
    transpose = made_by(outer.inputs[0] if outer is not None else value, "Transpose")
    if transpose is None:
        return None
    order = tuple(transpose.attributes["perm"].as_ints()) if "perm" in transpose.attributes else ()
    inner = made_by(transpose.inputs[0], "Reshape")
    if outer is not None and order == _SWAP_LAST_OF_3 and inner is not None:
        return inner.inputs[0]
    return transpose.inputs[0] if outer is None and order == _SWAP_LAST else None


def _site(core: _Core) -> AttentionSite:
    if core.mask is None:
        raise _refused(core.node, "has no mask, so it is none of a decoder", "no-mask")
    past_key, key, present_key = _cached(core.node, core.keys)
    past_value, value, present_value = _cached(core.node, core.values)
    heads, kv_heads, size = _size(core.query, 1), _size(past_key, 1), _size(past_key, 3)
    if not heads or not kv_heads or not size or heads % kv_heads:
        raise _refused(core.node, "doesn't tell its heads and their size", "unknown-input")
    if _size(past_value, 3) != size or _size(core.query, 3) not in (None, size):
        raise _refused(core.node, "has values of another size than its keys", "value-size")
    if size % 8:
        text = f"has heads of {size} numbers, no multiple of 8"
        raise _refused(core.node, text, "head-size")
    return AttentionSite(
        core=core.node,
        output=core.node.outputs[0],
        query=core.query,
        key=key,
        value=value,
        past=(past_key, past_value),
        present=(present_key, present_value),
        mask=core.mask,
        heads=heads,
        kv_heads=kv_heads,
        head_size=size,
        scale=core.scale,
        softcap=core.softcap,
    )


def _cached(core: ir.Node, whole: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    """What the cache held, what is new, and both."""
    value: ir.Value | None = whole
    repeated = made_by(value, "Reshape")
    if repeated is not None:
        expand = made_by(repeated.inputs[0], "Expand")
        unsqueeze = made_by(expand.inputs[0], "Unsqueeze") if expand is not None else None
        if unsqueeze is None:
            raise _refused(
                core, "takes its keys or values in a form that isn't known", "unknown-keys"
            )
        if number_of(unsqueeze.inputs[1]) != 2:  # each head is repeated on its own
            raise _refused(core, "repeats its keys in another order than the queries", "keys-order")
        value = unsqueeze.inputs[0]
    concat = made_by(value, "Concat")
    if concat is None or len(concat.inputs) != 2:
        raise _refused(core, "has no cache that grows behind its past", "no-growing-cache")
    past, new = concat.inputs
    axis = concat.attributes.get_int("axis", 0)
    if past is None or new is None or not past.is_graph_input() or axis not in _LENGTH_AXES:
        raise _refused(core, "has no cache that grows behind its past", "no-growing-cache")
    if not concat.outputs[0].is_graph_output():
        raise _refused(core, "doesn't give its cache as an output", "cache-not-output")
    return past, new, concat.outputs[0]


def made_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The standard operator that makes a value; None where another one does, or none."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type and node.domain == "" else None


def _only_reader(value: ir.Value) -> ir.Node | None:
    readers = list(value.uses())
    return readers[0][0] if len(readers) == 1 and readers[0][1] == 0 else None


def _size(value: ir.Value, axis: int) -> int | None:
    size = value.shape[axis] if value.shape is not None and len(value.shape) == _RANK else None
    return size if isinstance(size, int) else None


def number_of(value: ir.Value | None) -> float | None:
    """The one number of a constant; None where there is none or several."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return tensor.numpy().item() if tensor is not None and tensor.size == 1 else None


def _refused(node: ir.Node, reason: str, code: str) -> FusionError:
    return FusionError(f"The attention at node {node.name!r} {reason}.", code=code)
