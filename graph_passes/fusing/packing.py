"""Gives an attention its queries, keys and values as one value, from one product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graph_passes.finding.dataflow import is_add
from graph_passes.finding.shapes import dims

_PARTS = 3


@dataclass(frozen=True, eq=False)
class _Product:
    """``source @ weight + bias``."""

    node: ir.Node
    source: ir.Value
    weight: ir.Value
    bias: ir.Value | None
    result: ir.Value


def pack_projections(graph: ir.Graph) -> int:
    """Packs the first three inputs of each GroupQueryAttention where they come side by side.

    The matrices are joined when they are read, not here.
    """
    nodes = [node for node in graph if node.op_type == "GroupQueryAttention"]
    return sum(_pack(graph, node) for node in nodes)


def _pack(graph: ir.Graph, node: ir.Node) -> bool:
    parts = [value for value in node.inputs[:_PARTS] if value is not None]
    if len(parts) != _PARTS:
        return False
    packed = _whole(parts) or _joined(graph, parts)
    if packed is None:
        return False
    node.replace_input_with(0, packed)
    node.replace_input_with(1, None)
    node.replace_input_with(2, None)
    return True


def _whole(parts: Sequence[ir.Value]) -> ir.Value | None:
    """The value that these are the pieces of, in order and all of it."""
    nodes = [value.producer() for value in parts]
    first = nodes[0]
    if first is None or first.inputs[0] is None:
        return None
    whole = first.inputs[0]
    if first.op_type == "Split" and all(node is first for node in nodes):
        rank = len(whole.shape) if whole.shape is not None else 0
        last = first.attributes.get_int("axis", 0) in (-1, rank - 1)
        return whole if last and list(first.outputs) == list(parts) else None
    ends = [_slice(node, whole) for node in nodes]
    width = (dims(whole) or (None,))[-1]
    if None in ends or not isinstance(width, int):
        return None
    places = [end for end in ends if end is not None]
    starts, stops = [place[0] for place in places], [min(place[1], width) for place in places]
    return whole if starts == [0, *stops[:-1]] and stops[-1] == width else None


def _slice(node: ir.Node | None, whole: ir.Value) -> tuple[int, int] | None:
    if node is None or node.op_type != "Slice" or node.inputs[0] is not whole:
        return None
    const_tensors = [ir.convenience.get_const_tensor(value) for value in node.inputs[1:] if value]
    numbers = [int(t.numpy().item()) for t in const_tensors if t is not None and t.size == 1]
    rank = len(whole.shape) if whole.shape is not None else 0
    if len(numbers) != len(node.inputs) - 1 or len(numbers) < 3 or numbers[3:] not in ([], [1]):
        return None
    return (numbers[0], numbers[1]) if numbers[2] in (-1, rank - 1) else None


def _joined(graph: ir.Graph, parts: Sequence[ir.Value]) -> ir.Value | None:
    """One product in the place of three, if they read the same value and nobody else reads them."""
    products = [product for value in parts if (product := _product(value)) is not None]
    if len(products) != _PARTS or len({product.source for product in products}) != 1:
        return None
    biases = [product.bias for product in products if product.bias is not None]
    if len(biases) not in (0, _PARTS):
        return None
    weight = _concatenated(graph, [product.weight for product in products], axis=1)
    first = products[0]
    matmul = ir.Node(
        "", "MatMul", [first.source, weight], name=first.node.name,
        metadata_props=dict(first.node.metadata_props),
    )  # fmt: skip
    nodes = [matmul]
    if biases:
        bias = _concatenated(graph, biases, axis=0)
        nodes.append(ir.Node("", "Add", [matmul.outputs[0], bias]))
    first.node.name = None
    graph.insert_before(first.node, nodes)
    known = dims(first.result)
    for node in nodes:
        node.outputs[0].type = first.result.type
        width = weight.shape[1] if weight.shape is not None else None
        if known is not None:
            node.outputs[0].shape = ir.Shape([*known[:-1], width])
    return nodes[-1].outputs[0]


def _product(value: ir.Value) -> _Product | None:
    node, bias = value.producer(), None
    if len(list(value.uses())) != 1:
        return None
    if is_add(node):
        assert node is not None
        constants = [operand for operand in node.inputs if _is_constant(operand, 1)]
        others = [operand for operand in node.inputs if not _is_constant(operand, 1)]
        if len(constants) != 1 or others[0] is None or len(list(others[0].uses())) != 1:
            return None
        bias, node = constants[0], others[0].producer()
    if node is None or node.op_type != "MatMul" or not _is_constant(node.inputs[1], 2):
        return None
    source, weight = node.inputs
    assert source is not None
    assert weight is not None
    return _Product(node, source, weight, bias, node.outputs[0])


def _is_constant(value: ir.Value | None, rank: int) -> bool:
    return (
        value is not None
        and value.is_initializer()
        and value.const_value is not None
        and len(value.const_value.shape) == rank
    )


def _concatenated(graph: ir.Graph, weights: Sequence[ir.Value], axis: int) -> ir.Value:
    tensors = [value.const_value for value in weights if value.const_value is not None]
    shapes = [tensor.shape.numpy() for tensor in tensors]
    shape = list(shapes[0])
    shape[axis] = sum(sizes[axis] for sizes in shapes)
    name = _packed_name(graph, weights[0].name or "qkv")

    def join() -> ir.TensorProtocol:
        arrays = [tensor.numpy() for tensor in tensors]
        return ir.tensor(np.concatenate(arrays, axis=axis), dtype=tensors[0].dtype, name=name)

    tensor = ir.LazyTensor(join, dtype=tensors[0].dtype, shape=ir.Shape(shape), name=name)
    value = ir.Value(
        name=name, shape=ir.Shape(shape), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.initializers[name] = value
    return value


def _packed_name(graph: ir.Graph, first: str) -> str:
    name = first.replace("q_proj", "qkv_proj") if "q_proj" in first else f"{first}_qkv"
    while name in graph.initializers:
        name += "_"
    return name
