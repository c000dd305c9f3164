"""From a PyTorch model to ONNX with optimum's exporter, for graphs that its runtime expects.

optimum holds transformers below 4.58, so it lives in an environment of its own. It is given a
checkpoint whose config both dialects of transformers read: from a config that only transformers 5
understands it would take a wrong rotary base without a word. Its own validation could not notice,
as it compares with the same misread model; :mod:`exporter.export.parity` compares with ours.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir
from onnx_ir.passes.common import ClearMetadataAndDocStringPass

from exporter.errors import ExportError, first_line, pass_on_memory_error
from exporter.export.onnx_output import MODEL_FILE, save_onnx
from exporter.files import scratch_folder, telling_full_disk
from exporter.models.loading.model_files import save_checkpoint
from exporter.models.loading.transformers_calls import hub_off
from exporter.optional import require
from exporter.processes import captured_output
from exporter.progress import QUIET, Progress

if TYPE_CHECKING:
    from exporter.models.loading.model_source import LoadedModel

_DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def export_with_optimum(
    loaded: LoadedModel, folder: Path, *, opset: int | None = None, progress: Progress = QUIET
) -> Path:
    """Exports a model to ``model.onnx`` and its weights' file in ``folder``.

    A decoder is exported with its cache, prefill and decode in one graph without branches.

    Args:
        loaded: The model; a checkpoint of it is written to a temporary folder for optimum.
        folder: Made when missing; an earlier export in it is replaced at the end.
        opset: optimum's own choice for the model when None.
        progress: Hears what optimum says as details.

    Returns:
        The path of ``model.onnx``.

    Raises:
        MissingDependencyError: optimum-onnx is not installed.
        ExportError: optimum can't export this model.
        OSError: The disk is full.
    """
    require("optimum.exporters.onnx", extra="optimum")
    with scratch_folder("optimum") as place, captured_output(progress):
        checkpoint, out = place / "checkpoint", place / "onnx"
        with progress.task("export to ONNX with optimum"):
            with telling_full_disk(place.parent), hub_off():
                save_checkpoint(loaded, checkpoint)
                _run_optimum(loaded, checkpoint, out, opset)
            return save_onnx(_only_graph(out), folder)


def _run_optimum(loaded: LoadedModel, checkpoint: Path, out: Path, opset: int | None) -> None:
    try:
        require("optimum.exporters.onnx", extra="optimum").main_export(
            str(checkpoint),
            output=out,
            task=_task(loaded),
            opset=opset,
            dtype=_DTYPES[str(loaded.model.dtype).removeprefix("torch.")],
            do_validation=False,
            local_files_only=True,
        )
    # optimum runs the model's own code and has no error class of its own.
    except Exception as error:
        pass_on_memory_error(error)
        raise ExportError(
            f"optimum can't export {loaded.ref.architecture}: {first_line(error)}.",
            "Try --exporter torch; -v shows optimum's whole account.",
            code="exporter-failed",
        ) from error


def _task(loaded: LoadedModel) -> str:
    if loaded.model.can_generate():
        return "text-generation-with-past"
    tasks = require("optimum.exporters.tasks", extra="optimum").TasksManager
    task: str = tasks.infer_task_from_model(loaded.model)
    return task


def _only_graph(folder: Path) -> ir.Model:
    if not (folder / MODEL_FILE).is_file():
        found = ", ".join(sorted(path.name for path in folder.glob("*.onnx"))) or "nothing"
        raise ExportError(
            f"optimum wrote {found} where one {MODEL_FILE} was expected.",
            "Models of several graphs can be cut one by one with depthcut prune.",
        )
    model = ir.load(folder / MODEL_FILE)
    # Notes of this machine's paths; scopes are in the nodes' names.
    ClearMetadataAndDocStringPass()(model)
    return model
