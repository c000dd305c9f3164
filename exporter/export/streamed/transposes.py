"""Turns weights round when they are written, not while the graph is simplified."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.convenience import replace_nodes_and_values


def fold_transposes(graph: ir.Graph) -> None:
    """Makes weights of the transposed weights that nothing else uses, without reading them.

    PyTorch's optimizer does the same, but it holds all of them in memory until they are written.

    Args:
        graph: Without functions; it is changed. The new weights have the names of the nodes'
            outputs.
    """
    for node in list(graph):
        value = node.inputs[0] if node.op_type == "Transpose" and not node.domain else None
        if value is None or not _is_own_weight(value) or node.outputs[0].is_graph_output():
            continue
        turned = _turned(value, node)
        graph.register_initializer(turned)
        replace_nodes_and_values(graph, node, [node], [], node.outputs, [turned])
        del graph.initializers[value.name or ""]


def _is_own_weight(value: ir.Value) -> bool:
    """Whether it is a weight that one node uses."""
    return value.is_initializer() and not value.is_graph_input() and len(value.uses()) == 1


def _turned(value: ir.Value, node: ir.Node) -> ir.Value:
    tensor, name = value.const_value, node.outputs[0].name
    if tensor is None:
        raise TypeError(f"{value.name} is no weight.")
    sizes = [int(size) for size in tensor.shape.numpy()]
    told = node.attributes.get("perm")
    order = [*reversed(range(len(sizes)))] if told is None else [*told.as_ints()]
    lazy = ir.LazyTensor(
        lambda: ir.Tensor(tensor.numpy().transpose(order), dtype=tensor.dtype, name=name),
        tensor.dtype,
        ir.Shape([sizes[axis] for axis in order]),
        name=name,
    )
    return ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=lazy.shape, const_value=lazy)
