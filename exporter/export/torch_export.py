"""From a PyTorch model to ONNX with PyTorch's own exporter (``torch.onnx.export(dynamo=True)``)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from onnx_ir.convenience import replace_nodes_and_values
from onnx_ir.passes import common
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from exporter.compare.timing.subjects import no_garbage_collection
from exporter.errors import ExportError, first_line, pass_on_memory_error
from exporter.export.onnx_output import MODEL_FILE, save_onnx
from exporter.models.loading.meta_model import MetaModel
from exporter.models.loading.model_source import LoadedModel
from exporter.models.onnx_interface import InterfaceModule, OnnxInterface, interface_of
from exporter.processes import captured_output
from exporter.progress import QUIET, Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextlib.contextmanager
def exportable_experts(model: PreTrainedModel) -> Iterator[None]:
    """Lets a mixture of experts run as batched products: its usual kernel can't be traced.

    That has no form in ONNX, and without numbers it takes no other type than bfloat16.
    """
    before = getattr(model.config, "_experts_implementation", None)
    if before is None:
        yield
        return
    model.set_experts_implementation("batched_mm")
    try:
        yield
    finally:
        model.set_experts_implementation(before)


# What the optimizer looks at again and again while it folds constants.
_KEPT_BYTES = 1 << 16


@contextlib.contextmanager
def fake_parameters(model: torch.nn.Module) -> Iterator[FakeTensorMode]:
    """Puts fake parameters in the places of those on the meta device while the block runs.

    Ties stay ties. Parameters with content and buffers stay as they are.
    """
    # Real inputs are let in: the buffers are real.
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    places = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.is_meta
    ]
    with mode:
        fakes = {
            id(item): torch.nn.Parameter(torch.empty(item.shape, dtype=item.dtype), False)
            for _, _, item in places
        }
    try:
        for module, name, parameter in places:
            module._parameters[name] = fakes[id(parameter)]
        yield mode
    finally:
        for module, name, parameter in places:
            module._parameters[name] = parameter


def interface_without_weights(model: PreTrainedModel) -> OnnxInterface:
    """A model's interface as :func:`exporter.models.onnx_interface.interface_of` finds it."""
    if not any(parameter.is_meta for parameter in model.parameters()):
        return interface_of(model)
    with exportable_experts(model), fake_parameters(model) as mode, mode:
        return interface_of(model)


def read_weights_lazily(graph: ir.Graph, meta: MetaModel, prefix: str) -> None:
    """Has a graph's fake weights read from the shards when needed, in the model's dtype."""
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
    """
    for node in list(graph):
        value = node.inputs[0] if node.op_type == "Transpose" and not node.domain else None
        if value is None or not value.is_initializer() or value.is_graph_input():
            continue
        if len(value.uses()) > 1 or node.outputs[0].is_graph_output():
            continue
        turned = _turned(value, node)
        graph.register_initializer(turned)
        replace_nodes_and_values(graph, node, [node], [], node.outputs, [turned])
        del graph.initializers[value.name or ""]


def _turned(value: ir.Value, node: ir.Node) -> ir.Value:
    tensor, name = value.const_value, node.outputs[0].name
    if tensor is None:
        raise TypeError(f"{value.name} is no weight.")
    sizes = [int(size) for size in tensor.shape.numpy()]
    result = node.attributes.get("perm")
    order = [*reversed(range(len(sizes)))] if result is None else [*result.as_ints()]
    lazy = ir.LazyTensor(
        lambda: ir.Tensor(tensor.numpy().transpose(order), dtype=tensor.dtype, name=name),
        tensor.dtype,
        ir.Shape([sizes[axis] for axis in order]),
        name=name,
    )
    return ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=lazy.shape, const_value=lazy)


OPSETS = range(18, 25)

_PREFIX = "model."  # of InterfaceModule
_SCOPES = "pkg.torch.onnx.name_scopes"
# The exporter takes sizes of 1 for constants, and equal sizes for one dimension.
_BATCH, _SEQUENCE, _PAST = 2, 3, 5


def export_onnx(
    loaded: LoadedModel,
    folder: Path,
    *,
    opset: int = 20,
    # hears what the exporter says as details, and how many bytes are written
    progress: Progress = QUIET,
) -> Path:
    """Exports a model to ``model.onnx`` and its weights' file in ``folder``.

    A model whose weights stay in their shards
    (:class:`exporter.models.loading.meta_model.MetaModel`) is
    traced without them, and each weight is read when it is written: the files are the same, and one
    or two weights are in memory.
    """
    return export_traced(
        loaded,
        lambda: _traced(loaded.model),
        folder / MODEL_FILE,
        opset=opset,
        progress=progress,
    )


@dataclass(frozen=True)
class Traced:
    """What is traced to make one graph of a model."""

    module: torch.nn.Module
    example: dict[str, Any]
    inputs: list[str]
    outputs: list[str]
    dimensions: dict[str, Any]


def export_traced(
    loaded: LoadedModel,
    make: Callable[[], Traced],
    target: Path,
    *,
    opset: int,
    progress: Progress = QUIET,
) -> Path:
    """Exports one graph of a model; see :func:`export_onnx`."""
    if opset not in OPSETS:
        raise ExportError(
            f"Opset {opset} is not supported.",
            f"Use {OPSETS.start} to {OPSETS.stop - 1}.",
            code="opset-out-of-range",
        )
    with progress.task(f"export to ONNX, opset {opset}", total=3, unit="steps") as task:
        # A trace makes millions of objects that stay; each collection would look through all.
        with captured_output(progress), torch.no_grad(), no_garbage_collection():
            program = _translate(loaded.model, make(), opset)
            if isinstance(loaded, MetaModel):
                read_weights_lazily(program.model.graph, loaded, _PREFIX)
            task.advance()
            names = _weight_names(program.model.graph)
            model = _simplify(program)
            task.advance()
        _tidy(model, loaded.ref.architecture, names)
        path = save_onnx(model, target.parent, target.name, progress=progress)
        task.advance()
    progress.detail(f"export: {len(model.graph)} nodes, opset {opset}")
    return path


def _traced(model: PreTrainedModel) -> Traced:
    interface = interface_without_weights(model)
    return Traced(
        InterfaceModule(model, interface),
        _example(interface),
        interface.input_names,
        interface.output_names,
        _dynamic_shapes(interface),
    )


def _translate(model: PreTrainedModel, traced: Traced, opset: int) -> Any:
    """Traces the model and writes it in ONNX operators, as yet untidied: a ``ONNXProgram``."""
    with exportable_experts(model), fake_parameters(model):
        try:
            return torch.onnx.export(
                traced.module.eval(),
                kwargs=traced.example,
                input_names=traced.inputs,
                output_names=traced.outputs,
                opset_version=opset,
                dynamo=True,
                dynamic_shapes=traced.dimensions,
                optimize=False,
                verbose=False,
            )
        # Tracing runs the model's own code, and the exporter has many classes of errors.
        except Exception as error:
            pass_on_memory_error(error)
            raise _export_error(model, opset, error) from error


def _example(interface: OnnxInterface) -> dict[str, Any]:
    if interface.image is not None:
        return {
            "tokens": {name: interface.random_images(_BATCH) for name in interface.token_inputs}
        }
    past = _PAST if interface.cache else 0
    positions = torch.arange(past, past + _SEQUENCE).expand(_BATCH, -1).contiguous()
    values = {
        "input_ids": torch.ones(_BATCH, _SEQUENCE, dtype=torch.long),
        "attention_mask": torch.ones(_BATCH, past + _SEQUENCE, dtype=torch.long),
        "position_ids": positions,
        "token_type_ids": torch.zeros(_BATCH, _SEQUENCE, dtype=torch.long),
    }
    tokens = {name: values[name] for name in interface.token_inputs}
    # An empty list would make the exporter lose count of the inputs, and the dimensions' names.
    cache = {"past": interface.random_past(_BATCH, past)} if interface.cache else {}
    return {"tokens": tokens, **cache}


def _dynamic_shapes(interface: OnnxInterface) -> dict[str, Any]:
    """One named dimension for each length; unshared, every layer would read its own past's."""
    batch, sequence, past, total = (
        torch.export.Dim(name) for name in ("batch", "sequence", "past_sequence", "total_sequence")
    )
    sizes = {0: batch} if interface.image is not None else {0: batch, 1: sequence}
    tokens = {name: dict(sizes) for name in interface.token_inputs}
    if not interface.cache:
        return {"tokens": tokens}
    tokens["attention_mask"] = {0: batch, 1: total}
    return {"tokens": tokens, "past": [{0: batch, 2: past} for _ in interface.past_names]}


def _simplify(program: Any) -> ir.Model:
    """Folds constants and runs PyTorch's own optimizer.

    Its pattern rewriter takes time with the square of the number of nodes, and a fresh translation
    is two thirds constants, casts and repeats. With those gone first the result is the same and
    comes several times sooner.
    """
    import onnxscript.optimizer
    from onnxscript.rewriter import onnx_fusions

    model: ir.Model = program.model
    common.InlinePass()(model)
    fold_transposes(model.graph)
    onnxscript.optimizer.fold_constants(model)
    for small_pass in (
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
    ):
        small_pass(model)
    # Once, where ``program.optimize`` goes over all nodes again to find that nothing is left.
    onnxscript.optimizer.optimize(model, num_iterations=1)
    common.IdentityEliminationPass()(model)
    onnx_fusions.fuse(model)
    # The opset-23 fusions leave one Cos and Sin a layer.
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    return model


def _weight_names(graph: ir.Graph) -> dict[str | None, str]:
    """What to call each weight, and what the optimizer will make of it by transposing it."""
    names: dict[str | None, str] = {name: name.removeprefix(_PREFIX) for name in graph.initializers}
    for node in graph:
        source = node.inputs[0].name if node.op_type == "Transpose" and node.inputs[0] else None
        if source in names:
            names[node.outputs[0].name] = f"{names[source]}_transposed"
    return names


def _tidy(model: ir.Model, name: str, weight_names: dict[str | None, str]) -> None:
    """Names the weights and drops what the exporter noted down, scopes excepted."""
    scopes = {node: node.metadata_props.get(_SCOPES) for node in model.graph}
    common.ClearMetadataAndDocStringPass()(model)
    for node, scope in scopes.items():
        if scope is not None:
            node.metadata_props[_SCOPES] = scope
    model.graph.name = name
    for initializer in list(model.graph.initializers.values()):
        new = weight_names.get(initializer.name)
        if new is not None and new not in model.graph.initializers:
            initializer.name = new


def _export_error(model: PreTrainedModel, opset: int, error: Exception) -> ExportError:
    root = error
    while isinstance(root.__cause__, Exception):
        root = root.__cause__
    return ExportError(
        f"PyTorch's exporter can't export {type(model).__name__} at opset {opset}: "
        f"{first_line(root)}.",
        "Try another opset or exporter: optimum; -v shows the exporter's whole account.",
        code="exporter-failed",
    )
