"""The form of decoders for ONNX Runtime: attention in one operator, its cache in one buffer."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from exporter.errors import (
    BackendError,
    ExportError,
    MissingDependencyError,
    first_line,
    pass_on_memory_error,
)
from exporter.export.forms.genai import Provider, build_decoder, genai_failure, write_genai_config
from exporter.export.forms.portable import (
    FUSED_OPSET,
    PORTABLE_OPSET,
    WrittenForm,
    fused_operators,
    version_of,
    write_portable,
)
from exporter.export.onnx_output import MODEL_FILE, save_graph, save_onnx
from exporter.models.genai_config import CONFIG_FILE
from exporter.models.loading.meta_model import MetaModel
from exporter.models.loading.model_source import LoadedModel
from exporter.progress import QUIET, Progress
from graph_passes import CleanupPass
from graph_passes.errors import FusionError
from graph_passes.files.storage import own_data
from graph_passes.fusing import fuse_decoder
from graph_passes.fusing.decoder import fuse_skip_norms
from graph_passes.fusing.embedding import fuse_embedding
from graph_passes.fusing.logits_to_keep import KEEP, LogitsToKeepPass

_PLAIN = "so this is the plain export, whose cache grows"
_Write = Callable[[Path], WrittenForm]


def write_decoder(
    loaded: LoadedModel,
    folder: Path,
    provider: Provider,
    progress: Progress,
) -> WrittenForm:
    """Writes a decoder for ONNX Runtime, in the fastest form that there is for it.

    Each form is run and held against PyTorch before it is taken: a builder may know a model's name
    and yet not its sizes.
    """
    tries = _Tries(loaded, provider, progress)
    for write in _writers(loaded, provider, progress):
        with tempfile.TemporaryDirectory(prefix=".form.", dir=folder) as name:
            written = tries.written(write, Path(name))
            if written is None:
                continue
            written = _keeping_logits(written, Path(name))
            _settle_config(loaded, Path(name), progress)
            for file in Path(name).iterdir():
                file.replace(folder / file.name)
        remark = "; ".join(filter(None, (*tries.reasons, written.remark)))
        return replace(written, remark=remark or None)
    raise ExportError(
        f"{loaded.ref.architecture} can't be written for ONNX Runtime: {tries.reasons[-1]}.",
        "Try --target portable, with exporter: optimum; -v shows the exporters' whole account.",
        code="no-exporter",
    )


def _settle_config(loaded: LoadedModel, folder: Path, progress: Progress) -> None:
    """Leaves a config of onnxruntime-genai where that runs the folder, and else none."""
    config = folder / CONFIG_FILE
    if not config.exists() and not write_genai_config(loaded, folder):
        progress.say("form: onnxruntime-genai can't be told of these caches; no config")
        return
    reason = genai_failure(folder)
    if reason is not None:
        config.unlink()
        progress.say(f"form: onnxruntime-genai can't run this graph, so no config: {reason}")


class _Tries:
    """What was tried."""

    def __init__(self, loaded: LoadedModel, provider: Provider, progress: Progress) -> None:
        self.reasons: list[str] = []
        self._loaded, self._provider, self._progress = loaded, provider, progress
        self._missing: MissingDependencyError | None = None

    def written(self, write: _Write, folder: Path) -> WrittenForm | None:
        """Writes a form, and makes sure that it runs and computes what the model does."""
        from exporter.export.parity import check_export

        try:
            written = write(folder)
            check_export(self._loaded, folder / MODEL_FILE, provider=self._provider)
        except MissingDependencyError as error:
            self._missing = error
            self._note("onnxruntime-genai's model builder is not installed")
            return None
        except (ExportError, BackendError) as error:
            self._note(error.message.replace(f"{folder}/", "").rstrip("."))
            return None
        if self._missing is not None and written.remark:
            raise self._missing
        return written

    def _note(self, reason: str) -> None:
        self._progress.say(f"form: {reason}")
        self.reasons.append(reason)


def _writers(loaded: LoadedModel, provider: Provider, progress: Progress) -> Iterator[_Write]:
    """The ways to write it, the fastest first."""

    def build(folder: Path) -> WrittenForm:
        if isinstance(loaded, MetaModel):
            raise ExportError("onnxruntime-genai's model builder loads the model whole")
        return build_decoder(loaded, folder, provider, progress)

    def fused(folder: Path, opset: int) -> WrittenForm:
        return write_fused_export(loaded, folder, progress, opset=opset)

    def plain(folder: Path, opset: int) -> WrittenForm:
        written = write_portable(loaded, folder, opset=opset, progress=progress)
        return replace(written, remark=_PLAIN)

    yield build
    yield lambda folder: fused(folder, FUSED_OPSET)
    yield lambda folder: fused(folder, PORTABLE_OPSET)
    yield lambda folder: plain(folder, FUSED_OPSET)
    yield lambda folder: plain(folder, PORTABLE_OPSET)


def write_fused_export(
    loaded: LoadedModel,
    folder: Path,
    progress: Progress = QUIET,
    *,
    opset: int = FUSED_OPSET,
) -> WrittenForm:
    """Exports a decoder and fuses its attentions and norms."""
    written = write_portable(loaded, folder, opset=opset, progress=progress)
    positions = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(positions, int):
        return replace(written, remark=f"the config doesn't tell how long a text may be, {_PLAIN}")
    try:
        model, report = fuse_decoder(ir.load(folder / MODEL_FILE), positions=positions)
    except FusionError as error:
        progress.say(f"form: {error.message}")
        return replace(written, remark=f"{error.message.rstrip('.')}, {_PLAIN}")
    save_onnx(model, folder, progress=progress)
    for remark in report.remarks:
        progress.detail(f"form: {remark}")
    return replace(written, passes=("fuse_decoder",))


def _keeping_logits(written: WrittenForm, folder: Path) -> WrittenForm:
    """Gives the graph an input that says of how many last positions logits are wanted."""
    model = ir.load(folder / MODEL_FILE)
    if LogitsToKeepPass()(model).modified:
        save_graph(model, folder)
        return replace(written, passes=(*written.passes, KEEP))
    text = "its logits are of all positions always, since its head is no plain product"
    return replace(written, remark="; ".join(filter(None, (written.remark, text))))


SOURCE_OPSET = 20
"""Of the export: onnxscript knows the attention that is written out there, not opset 23's."""

_ATTENTION = frozenset({"Attention", "MultiHeadAttention"})
_ENCODER_PLAIN = "so this is the plain export"


def write_encoder(
    loaded: LoadedModel,
    folder: Path,
    progress: Progress,
) -> WrittenForm:
    """Exports an encoder for ONNX Runtime, and fuses what can be fused.

    The result is run and held against PyTorch before it is taken.
    """
    written = write_portable(loaded, folder, opset=SOURCE_OPSET, progress=progress)
    with tempfile.TemporaryDirectory(prefix=".form.", dir=folder) as name:
        try:
            counts = _fused_copy(loaded, folder, Path(name))
        except (ExportError, BackendError) as error:
            reason = error.message.replace(f"{name}/", "").rstrip(".")
            progress.say(f"form: {reason}")
            return replace(written, remark=f"{reason}, {_ENCODER_PLAIN}")
        for weights in own_data(folder / MODEL_FILE):  # of the plain export
            weights.unlink()
        for file in Path(name).iterdir():
            file.replace(folder / file.name)
    text = None if _ATTENTION & counts.keys() else "its attentions are in no form that is fused"
    return replace(written, passes=(version_of("onnxscript"), "fuse_encoder"), remark=text)


def _fused_copy(loaded: LoadedModel, source: Path, folder: Path) -> dict[str, int]:
    """Writes the fused form into another folder, makes sure of it, and counts its operators."""
    from exporter.export.parity import check_export

    save_onnx(fuse_encoder(ir.load(source / MODEL_FILE)), folder)
    check_export(loaded, folder / MODEL_FILE)
    return fused_operators(ir.load(folder / MODEL_FILE))


def fuse_encoder(model: ir.Model) -> ir.Model:
    """Writes an encoder in ONNX Runtime's fused operators.

    onnxscript's rewrite rules do most of it. What they leave is done before and after: embeddings,
    and norms without a bias. ONNX Runtime's own optimizer finds no attention in what PyTorch
    exports today: it wants another mask.
    """
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    fuse_embedding(model.graph)
    CleanupPass(keep_debug=True)(model)
    try:
        fused, _ = optimize_for_ort(model)
    # Each of the rules is code of its own, with no error class.
    except Exception as error:
        pass_on_memory_error(error)
        raise ExportError(f"onnxscript can't fuse this graph: {first_line(error)}.") from error
    fuse_skip_norms(fused.graph)
    fused.graph.sort()
    CleanupPass(keep_debug=True)(fused)
    return fused
