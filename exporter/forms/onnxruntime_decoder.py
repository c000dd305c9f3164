"""The form of decoders for ONNX Runtime: attention in one operator, its cache in one buffer.

onnxruntime-genai's model builder writes it, for the architectures that it knows. Where it doesn't,
or where ONNX Runtime can't run what it writes, our own passes fuse PyTorch's export; where they
can't either, the form is that export at the opset whose attention is one operator. All that is
told.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.errors import BackendError, DepthcutError, ExportError, MissingDependencyError
from exporter.forms.fused_export import PLAIN, write_fused_export
from exporter.forms.genai_builder import Provider, build_decoder
from exporter.forms.noting import Written
from exporter.forms.portable import FUSED_OPSET, PORTABLE_OPSET, write_portable
from exporter.onnx_output import MODEL_FILE, save_graph
from exporter.progress import Progress

if TYPE_CHECKING:
    from exporter.model_source import LoadedModel

_Write = Callable[[Path], Written]


def write_decoder(
    loaded: LoadedModel, folder: Path, provider: Provider, progress: Progress
) -> Written:
    """Writes a decoder for ONNX Runtime, in the fastest form that there is for it.

    Each form is run and held against PyTorch before it is taken: a builder may know a model's name
    and yet not its sizes.

    Args:
        loaded: The model.
        folder: Takes ``model.onnx``, its weights, and what onnxruntime-genai reads.
        provider: Which of ONNX Runtime's providers runs it.
        progress: Hears what the exporters say, and which of them did not serve.

    Returns:
        How it was written; the remark tells what did not serve.

    Raises:
        MissingDependencyError: The builder is not installed.
        ExportError: No exporter can export the model.
    """
    reasons: list[str] = []
    missing: MissingDependencyError | None = None
    for write in _writers(loaded, provider, progress):
        with tempfile.TemporaryDirectory(prefix=".form.", dir=folder) as name:
            try:
                written = _tried(write, Path(name), loaded, provider)
            except MissingDependencyError as error:
                missing = error
                reasons.append("onnxruntime-genai's model builder is not installed")
                continue
            except (ExportError, BackendError) as error:
                progress.say(f"form: {_reason(error, Path(name))}")
                reasons.append(_reason(error, Path(name)))
                continue
            if missing is not None and written.remark:
                raise missing  # what is missing might well do better
            written = _keeping_logits(written, Path(name))
            for file in Path(name).iterdir():
                file.replace(folder / file.name)
        remark = "; ".join(filter(None, (*reasons, written.remark)))
        return replace(written, remark=remark or None)
    raise ExportError(
        f"{loaded.ref.architecture} can't be written for ONNX Runtime: {reasons[-1]}.",
        "Try --target portable with --exporter optimum; -v shows the exporters' whole account.",
    )


def _writers(loaded: LoadedModel, provider: Provider, progress: Progress) -> Iterator[_Write]:
    """The ways to write it, the fastest first."""

    def plain(folder: Path, opset: int) -> Written:
        written = write_portable(loaded, folder, opset=opset, progress=progress)
        return replace(written, remark=PLAIN)

    yield lambda folder: build_decoder(loaded, folder, provider, progress)
    yield lambda folder: write_fused_export(loaded, folder, progress)
    yield lambda folder: plain(folder, FUSED_OPSET)
    yield lambda folder: plain(folder, PORTABLE_OPSET)


def _tried(write: _Write, folder: Path, loaded: LoadedModel, provider: Provider) -> Written:
    """Writes it, and makes sure that it runs and computes what the model does."""
    from exporter.parity import check_export

    written = write(folder)
    check_export(loaded, folder / MODEL_FILE, provider=provider)
    return written


def _keeping_logits(written: Written, folder: Path) -> Written:
    """Gives the graph an input that says of how many last positions logits are wanted."""
    import onnx_ir as ir

    from graph_passes.fusing.logits_to_keep import KEEP, LogitsToKeepPass

    model = ir.load(folder / MODEL_FILE)
    if LogitsToKeepPass()(model).modified:
        save_graph(model, folder)
        return replace(written, passes=(*written.passes, KEEP))
    told = "its logits are of all positions always, since its head is no plain product"
    return replace(written, remark="; ".join(filter(None, (written.remark, told))))


def _reason(error: DepthcutError, folder: Path) -> str:
    """What an error says, without a path that will be gone."""
    return error.message.replace(f"{folder}/", "").rstrip(".")
