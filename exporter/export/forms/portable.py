"""The plain form: ONNX's own operators, for any runtime."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir
from onnx_ir.passes.common import ClearMetadataAndDocStringPass

from exporter.artifacts import FORM_KEY, FormRecord, Target
from exporter.artifacts.plans import MODEL_KEY
from exporter.errors import ExportError, first_line, pass_on_memory_error
from exporter.export.onnx_output import MODEL_FILE, save_graph, save_onnx
from exporter.export.options import ExporterName
from exporter.files import scratch_folder, telling_full_disk
from exporter.models.loading.model_class import hub_off
from exporter.models.loading.model_files import save_checkpoint
from exporter.models.model_folder import GRAPHS, Graph, graph_file
from exporter.optional import require
from exporter.processes import captured_output
from exporter.progress import QUIET, Progress

if TYPE_CHECKING:
    from exporter.models.loading.model_source import LoadedModel

_FUSED_IN_ONNX = frozenset({"Attention", "RMSNormalization", "RotaryEmbedding", "TensorScatter"})
_FUSED_DOMAINS = frozenset({"com.microsoft"})
_FUSED_NORMS = frozenset({"SimplifiedLayerNormalization"})  # ONNX Runtime's, in ONNX's own domain


@dataclass(frozen=True)
class WrittenForm:
    """How a graph came about, which now lies in its folder as ``model.onnx``."""

    writer: str
    passes: tuple[str, ...] = ()  # what rewrote its graph after it, in order
    cache_room: int | None = None  # the fixed length of its caches; None where they grow
    remark: str | None = None  # why it is not the fastest form of its target; None where it is


def note_form(
    folder: Path,
    written: WrittenForm,
    target: Target,
    source_sha256: str | None = None,
    *,
    name: str = MODEL_FILE,
) -> FormRecord:
    """Writes into a graph's notes how it is written."""
    model = ir.load(folder / name)
    record = FormRecord(
        target=target,
        writer=written.writer,
        passes=list(written.passes),
        fused=fused_operators(model),
        cache_room=written.cache_room,
        remark=written.remark,
    )
    model.metadata_props[FORM_KEY] = record.model_dump_json()
    if source_sha256 is not None:
        model.metadata_props[MODEL_KEY] = source_sha256
    save_graph(model, folder, name)
    return record


def fused_operators(model: ir.Model) -> dict[str, int]:
    """By name, how many nodes do at once what takes several of ONNX's basic operators."""
    counter = Counter(
        node.op_type
        for node in model.graph.all_nodes()
        if node.op_type in _FUSED_NORMS
        or node.domain in _FUSED_DOMAINS
        or (node.domain in ("", "ai.onnx") and node.op_type in _FUSED_IN_ONNX)
    )
    return dict(sorted(counter.items()))


def form_in_words(record: FormRecord) -> str:
    """A form on one line."""
    fused = ", ".join(f"{count} {name}" for name, count in record.fused.items())
    after = f", then {', '.join(record.passes)}" if record.passes else ""
    remark = f"; {record.remark}" if record.remark else ""
    if record.cache_room is not None:
        remark = f"; each run reads {record.cache_room} positions of its caches{remark}"
    by = f"written by {record.writer}{after}"
    return f"form: {record.target}, {by}; fused: {fused or 'nothing'}{remark}"


def version_of(distribution: str) -> str:
    """A library's name with its version."""
    return f"{distribution} {metadata.version(distribution)}"


PORTABLE_OPSET = 20
"""The widest reach; 18 gives the same graph."""
FUSED_OPSET = 23
"""Has Attention, RMSNormalization and RotaryEmbedding."""


_DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def export_with_optimum(
    loaded: LoadedModel, folder: Path, *, opset: int | None = None, progress: Progress = QUIET
) -> Path:
    """Exports a model with optimum; a decoder with its cache."""
    optimum = require("optimum.exporters.onnx", extra="optimum")
    manager = require("optimum.exporters.tasks", extra="optimum").TasksManager
    with scratch_folder("optimum") as place, captured_output(progress):
        with telling_full_disk(place.parent), hub_off():
            save_checkpoint(loaded, place / "checkpoint")
            try:
                task = "text-generation-with-past"
                if not loaded.model.can_generate():
                    task = manager.infer_task_from_model(loaded.model)
                optimum.main_export(
                    str(place / "checkpoint"), output=place / "onnx", task=task, opset=opset,
                    dtype=_DTYPES[str(loaded.model.dtype).removeprefix("torch.")],
                    do_validation=False, local_files_only=True,
                )  # fmt: skip
                model = ir.load(place / "onnx" / MODEL_FILE)
            # optimum runs the model's own code and has no error class of its own.
            except Exception as error:
                pass_on_memory_error(error)
                raise ExportError(
                    f"optimum can't export {loaded.ref.architecture}: {first_line(error)}.",
                    "Try exporter: torch; -v shows optimum's whole account.",
                    code="exporter-failed",
                ) from error
        ClearMetadataAndDocStringPass()(model)  # paths of this machine
        return save_onnx(model, folder)


def write_portable(
    loaded: LoadedModel,
    folder: Path,
    progress: Progress = QUIET,
    *,
    exporter: ExporterName | None = None,
    opset: int | None = None,
) -> WrittenForm:
    """Exports a model with PyTorch's exporter, or optimum's."""
    if exporter == "optimum":
        export_with_optimum(loaded, folder, opset=opset, progress=progress)
        return WrittenForm(version_of("optimum-onnx"))
    from exporter.export.torch_export import export_onnx

    chosen = opset or PORTABLE_OPSET
    export_onnx(loaded, folder, opset=chosen, progress=progress)
    return WrittenForm(f"{version_of('torch')}, opset {chosen}")


def write_stacks(
    loaded: LoadedModel, folder: Path, *, opset: int | None = None, progress: Progress = QUIET
) -> FormRecord:
    """Exports an encoder-decoder as the three graphs that optimum's runtime loads.

    The two graphs of the decoder hold its weights each, as optimum's do.
    """
    from exporter.export.torch_export import Traced, export_traced
    from exporter.models.encoder_decoder_interface import Examples, StackModule, interface_of_stacks

    interface, chosen = interface_of_stacks(loaded.model), opset or PORTABLE_OPSET
    examples = Examples(loaded.model, interface)
    written = WrittenForm(f"{version_of('torch')}, opset {chosen}")

    def traced(graph: Graph) -> Traced:
        names = interface.inputs(graph)
        example, axes = examples.of(graph), examples.dimensions(graph)
        return Traced(
            StackModule(loaded.model, interface, graph),
            {"inputs": {name: example[name] for name in names}},
            names,
            interface.outputs(graph),
            {"inputs": {name: axes[name] for name in names}},
        )

    records = []
    for graph in GRAPHS:
        target = graph_file(folder, graph)
        export_traced(loaded, partial(traced, graph), target, opset=chosen, progress=progress)
        records.append(note_form(folder, written, "portable", loaded.ref.sha256, name=target.name))
    progress.say(form_in_words(records[0]))
    return records[0]
