"""From a PyTorch model to ONNX with PyTorch's own exporter (``torch.onnx.export(dynamo=True)``).

The graph has the KV cache as explicit inputs and outputs (see
:mod:`exporter.models.onnx_interface`) and
named dynamic dimensions that its inputs share, ``batch``, ``sequence``, ``past_sequence`` and
``total_sequence``. Prefill is the same graph with a past of length 0.

Nodes keep ``pkg.torch.onnx.name_scopes``, the modules they came from, by which a reader or the
surgery can name a layer. Everything else that the exporter notes down goes, stack traces with this
machine's paths first of all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common

from exporter.compare.timing.clock import no_garbage_collection
from exporter.errors import ExportError, first_line, pass_on_memory_error
from exporter.export.exportable_experts import exportable_experts
from exporter.export.onnx_output import MODEL_FILE, save_onnx
from exporter.export.streamed import (
    fake_parameters,
    fold_transposes,
    interface_without_weights,
    read_weights_lazily,
)
from exporter.models.loading.meta_model import MetaModel
from exporter.models.loading.model_source import LoadedModel
from exporter.models.onnx_interface import InterfaceModule, OnnxInterface
from exporter.processes import captured_output
from exporter.progress import QUIET, Progress
from graph_passes.files.unfinished import Unfinished

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
    unfinished: Unfinished | None = None,
    progress: Progress = QUIET,
) -> Path:
    """Exports a model to ``model.onnx`` and its weights' file in ``folder``.

    A model whose weights stay in their shards
    (:class:`exporter.models.loading.meta_model.MetaModel`) is
    traced without them, and each weight is read when it is written: the files are the same, and one
    or two weights are in memory.

    Args:
        loaded: In the dtype that the graph shall have.
        folder: Made when missing; an earlier export in it is replaced at the end.
        opset: 18 to 22 write attention in basic operators; 23 has Attention, RMSNormalization and
            RotaryEmbedding, 24 of these only Attention.
        unfinished: Where the weights grow, see :func:`exporter.export.onnx_output.save_onnx`.
        progress: Hears what the exporter says as details, and how many bytes are written.

    Returns:
        The path of ``model.onnx``.

    Raises:
        ExportError: When the opset is not supported or PyTorch's exporter can't export the model.
        ModelSourceError: A shard can't be read.
        OSError: The files can't be written; a full disk by its number.
    """
    _refuse_opset(opset)
    return export_traced(
        loaded,
        lambda: _traced(loaded.model),
        folder / MODEL_FILE,
        opset=opset,
        unfinished=unfinished,
        progress=progress,
    )


@dataclass(frozen=True)
class Traced:
    """What is traced to make one graph of a model.

    Attributes:
        module: Has the model as its attribute ``model``.
        example: Its keyword arguments; no size that varies is 1, and no two are the same.
        inputs: The inputs' names, in the order of the example's leaves.
        outputs: The outputs' names.
        dimensions: As the example, for each leaf the named dimensions that vary.
    """

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
    unfinished: Unfinished | None = None,
    progress: Progress = QUIET,
) -> Path:
    """Exports one graph of a model; see :func:`export_onnx`.

    Args:
        loaded: The model.
        make: What is traced.
        target: The ONNX file.
        opset: See :data:`OPSETS`.
        unfinished: As there.
        progress: As there.

    Raises:
        ExportError: PyTorch's exporter can't export the model.
        ModelSourceError: A shard can't be read.
        OSError: The files can't be written; a full disk by its number.
    """
    _refuse_opset(opset)
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
        path = save_onnx(
            model, target.parent, target.name, unfinished=unfinished, progress=progress
        )
        task.advance()
    progress.detail(f"export: {len(model.graph)} nodes, opset {opset}")
    return path


def _refuse_opset(opset: int) -> None:
    if opset not in OPSETS:
        raise ExportError(
            f"Opset {opset} is not supported.",
            f"Use {OPSETS.start} to {OPSETS.stop - 1}.",
            code="opset-out-of-range",
        )


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
        "Try another --opset or --exporter optimum; -v shows the exporter's whole account.",
        code="exporter-failed",
    )
