"""Exports models whose weights stay in their shards.

They are traced without weights, which are read one by one when the graph is written.

On PyTorch's meta device a model can't be traced: its buffers and inputs are on the CPU, and no
operator takes both. PyTorch's fake tensors say that they are on the CPU and have no content.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import onnx_ir as ir
import torch
from onnx_ir.convenience import replace_nodes_and_values
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from exporter.errors import ExportError
from exporter.export.exportable_experts import exportable_experts
from exporter.models.onnx_interface import OnnxInterface, interface_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from exporter.models.loading.meta_model import MetaModel

# What the optimizer looks at again and again while it folds constants.
_KEPT_BYTES = 1 << 16


@contextlib.contextmanager
def fake_parameters(model: torch.nn.Module) -> Iterator[FakeTensorMode]:
    """Puts fake parameters in the places of those on the meta device while the block runs.

    Ties stay ties. Parameters with content and buffers stay as they are.

    Args:
        model: Whole, in part, or not at all on the meta device.

    Yields:
        The mode of the fake parameters, in which the model can be run.
    """
    # Real inputs are let in: the buffers are real.
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    places = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.is_meta
    ]
    fakes = {id(parameter): _fake(parameter, mode) for _, _, parameter in places}
    try:
        for module, name, parameter in places:
            module._parameters[name] = fakes[id(parameter)]
        yield mode
    finally:
        for module, name, parameter in places:
            module._parameters[name] = parameter


def interface_without_weights(model: PreTrainedModel) -> OnnxInterface:
    """A model's interface as :func:`exporter.models.onnx_interface.interface_of` finds it.

    Args:
        model: With its weights, or without.

    Raises:
        ExportError: When the model doesn't keep plain keys and values, or can't run on tokens.
    """
    if not has_meta_parameters(model):
        return interface_of(model)
    with exportable_experts(model), fake_parameters(model) as mode, mode:
        return interface_of(model)


def has_meta_parameters(model: torch.nn.Module) -> bool:
    """Whether some of a model's parameters have no content."""
    return any(parameter.is_meta for parameter in model.parameters())


def _fake(parameter: torch.nn.Parameter, mode: FakeTensorMode) -> torch.nn.Parameter:
    with mode:
        empty = torch.empty(parameter.shape, dtype=parameter.dtype)
        return torch.nn.Parameter(empty, requires_grad=False)


def read_weights_lazily(graph: ir.Graph, meta: MetaModel, prefix: str) -> None:
    """Has a graph's fake weights read from the shards, in the model's dtype, when they are needed.

    Args:
        graph: As it was traced with :func:`fake_parameters`; it is changed.
        meta: The model. Its weights are read one at a time, and let go.
        prefix: What stands before the model's own names of its parameters in the graph.

    Raises:
        ExportError: A weight of the graph is none of the model's parameters.
    """
    known = set(meta.weights.names())
    for name, value in graph.initializers.items():
        tensor = value.const_value
        if not isinstance(tensor, ir.Tensor) or not isinstance(tensor.raw, FakeTensor):
            continue
        own = name.removeprefix(prefix)
        if own not in known:
            raise ExportError(
                f"The graph's weight {name} is none of {meta.ref.architecture}'s parameters.",
                "Export the model with its weights loaded.",
                code="unknown-weight",
            )
        value.const_value = ir.LazyTensor(
            partial(_read, meta, own),
            tensor.dtype,
            ir.Shape(tensor.shape.numpy()),
            cache=tensor.nbytes <= _KEPT_BYTES,
            name=name,
        )


def _read(meta: MetaModel, name: str) -> ir.TensorProtocol:
    with meta.held(name):
        return ir.tensor_adapters.TorchTensor(meta.model.get_parameter(name).data, name)


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
