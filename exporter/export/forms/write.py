"""Writes a model for a target, and notes in the graph how."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.artifacts import FormRecord, Target
from exporter.export.forms.noting import form_in_words, note_form
from exporter.export.forms.portable import write_portable
from exporter.export.forms.targets import TARGETS
from exporter.export.onnx_output import MODEL_FILE
from exporter.export.options import ExporterName
from exporter.export.pooled import add_pooling, pooling_for
from exporter.progress import QUIET, Progress
from graph_passes.files.unfinished import Unfinished

if TYPE_CHECKING:
    from exporter.models.loading.model_source import LoadedModel


def write_form(
    loaded: LoadedModel,
    folder: Path,
    *,
    target: Target = "portable",
    exporter: ExporterName | None = None,
    opset: int | None = None,
    room: int | None = None,
    pooling: bool = False,
    unfinished: Unfinished | None = None,
    progress: Progress = QUIET,
) -> tuple[Path, FormRecord]:
    """Exports a model in the form of a target.

    Args:
        loaded: The model.
        folder: There, and the caller's to drop when this fails; takes ``model.onnx``,
            its weights' file and what else the target's runtime reads.
        target: The runtime that the graph is for.
        exporter: For ``portable`` alone: which exporter; None for PyTorch's.
        opset: For ``portable`` alone; None for the exporter's usual one.
        room: For the TensorRT targets alone: positions of the caches; 0 lets them grow, None takes
            the usual number.
        pooling: Whether a sentence encoder's pooling becomes a part of the graph.
        unfinished: Where the exported weights grow, so that an interrupted run can be gone on with.
        progress: Hears how it goes, and where the fastest form was not to be had.

    Returns:
        The path of ``model.onnx``, and what is noted in it.

    Raises:
        ExportError: The model can't be written so, or pools no token states.
        MissingDependencyError: The exporter is not installed.
        ModelSourceError: A shard of a model whose weights stay in them can't be read; or its folder
            doesn't say how it pools.
        OSError: The disk is full.
    """
    form, pools = TARGETS[target], pooling_for(loaded) if pooling else None
    options: dict[str, Any] = {} if unfinished is None else {"unfinished": unfinished}
    if form.plain:
        options |= {"exporter": exporter, "opset": opset}
        written = write_portable(loaded, folder, progress=progress, **options)
    else:
        options |= {"room": room} if form.fixed_caches else {}
        written = form.write(loaded, folder, progress, **options)
    if pools is not None:
        add_pooling(folder, pools)
    record = note_form(folder, written, target, loaded.ref.sha256)
    progress.say(form_in_words(record))
    return folder / MODEL_FILE, record
