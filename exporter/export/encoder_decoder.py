"""Writes an encoder-decoder as the three graphs that optimum's runtime loads."""

from __future__ import annotations

from pathlib import Path

from exporter.artifacts import FormRecord
from exporter.export.forms.noting import WrittenForm, form_in_words, note_form, version_of
from exporter.export.forms.portable import PORTABLE_OPSET
from exporter.export.torch_export import Traced, export_traced
from exporter.models.encoder_decoder_folder import GRAPHS, Graph, graph_file
from exporter.models.encoder_decoder_interface import (
    EncoderDecoderInterface,
    Examples,
    StackModule,
    interface_of_stacks,
)
from exporter.models.loading.model_source import LoadedModel
from exporter.progress import QUIET, Progress


def write_stacks(
    loaded: LoadedModel, folder: Path, *, opset: int | None = None, progress: Progress = QUIET
) -> FormRecord:
    """Exports an encoder-decoder with PyTorch's exporter.

    The two graphs of the decoder hold its weights each, as optimum's do.

    Args:
        loaded: The model.
        folder: There, and the caller's to drop when this fails; takes the three graphs and their
            weights.
        opset: None: the portable one.
        progress: Hears how it goes.

    Returns:
        What is noted in each graph.

    Raises:
        UnknownArchitectureError: It is not known where the model keeps its layers.
        ExportError: PyTorch's exporter can't export it.
        OSError: The disk is full.
    """
    interface, chosen = interface_of_stacks(loaded.model), opset or PORTABLE_OPSET
    examples = Examples(loaded.model, interface)
    written = WrittenForm(f"{version_of('torch')}, opset {chosen}")
    records = []
    for graph in GRAPHS:
        target = graph_file(folder, graph)
        export_traced(
            loaded,
            lambda graph=graph: _traced(loaded, interface, examples, graph),  # type: ignore[misc]
            target,
            opset=chosen,
            progress=progress,
        )
        records.append(note_form(folder, written, "portable", loaded.ref.sha256, name=target.name))
    progress.say(form_in_words(records[0]))
    return records[0]


def _traced(
    loaded: LoadedModel, interface: EncoderDecoderInterface, examples: Examples, graph: Graph
) -> Traced:
    names = interface.inputs(graph)
    example, axes = examples.of(graph), examples.dimensions(graph)
    return Traced(
        StackModule(loaded.model, interface, graph),
        {"inputs": {name: example[name] for name in names}},
        names,
        interface.outputs(graph),
        {"inputs": {name: axes[name] for name in names}},
    )
