"""A traced graph's weights, read from the model's shards when they are asked for."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import onnx_ir as ir

from exporter.errors import ExportError
from exporter.export.streamed.pretended import is_fake

if TYPE_CHECKING:
    from exporter.models.loading.meta_model import MetaModel

# What the optimizer looks at again and again while it folds constants.
_KEPT_BYTES = 1 << 16


def lend_weights(graph: ir.Graph, meta: MetaModel, prefix: str) -> None:
    """Has a graph's fake weights read from the shards, in the model's dtype, when they are needed.

    Args:
        graph: As it was traced with :func:`exporter.export.streamed.pretended`; it is changed.
        meta: The model. Its weights are read one at a time, and let go.
        prefix: What stands before the model's own names of its parameters in the graph.

    Raises:
        ExportError: A weight of the graph is none of the model's parameters.
    """
    known = set(meta.weights.names())
    for name, value in graph.initializers.items():
        tensor = value.const_value
        if not isinstance(tensor, ir.Tensor) or not is_fake(tensor.raw):
            continue
        own = name.removeprefix(prefix)
        if own not in known:
            raise ExportError(
                f"The graph's weight {name} is none of {meta.ref.architecture}'s parameters.",
                "Export the model with its weights loaded.",
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
