"""The forms for TensorRT and TensorRT-RTX: ONNX's own fused operators, caches updated in place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from exporter.errors import UsageError
from exporter.export.forms.portable import FUSED_OPSET, WrittenForm, write_portable
from exporter.export.onnx_output import MODEL_FILE, save_graph
from exporter.export.options import USUAL_ROOM
from exporter.progress import QUIET, Progress
from graph_passes.errors import FusionError
from graph_passes.fusing.cache_in_place import CacheInPlacePass
from graph_passes.fusing.grouped import GroupedAttentionPass

if TYPE_CHECKING:
    from exporter.models.loading.model_source import LoadedModel

_STEP = 64  # each sequence's part of a cache and of the mask begins at an aligned address
_GROWS = "so its caches grow"


def write_for_tensorrt(
    loaded: LoadedModel,
    folder: Path,
    progress: Progress = QUIET,
    *,
    room: int | None = None,  # positions of the caches; 0 lets them grow, None takes USUAL_ROOM
) -> WrittenForm:
    """Exports a model at opset 23, and rewrites a decoder's attentions and caches.

    Attention takes keys and values as the cache holds them, and the caches have a fixed length and
    are updated in place (opset 24), see :mod:`graph_passes.fusing.cache_in_place`.
    """
    length = None if room == 0 else _room(loaded, room)
    written = write_portable(loaded, folder, opset=FUSED_OPSET, progress=progress)
    if not loaded.model.can_generate():
        return written
    model, passes, remark = rewrite_decoder(ir.load(folder / MODEL_FILE), length)
    if remark:
        progress.say(f"form: {remark}")
    if passes:
        save_graph(model, folder)
    fixed = length if remark is None else None
    return replace(written, passes=passes, cache_room=fixed, remark=remark)


def rewrite_decoder(
    model: ir.Model, room: int | None
) -> tuple[ir.Model, tuple[str, ...], str | None]:
    """Rewrites attentions and caches, as far as that can be."""
    passes, remark = [], None
    try:
        if GroupedAttentionPass().call(model).modified:
            passes.append("GroupedAttentionPass")
        if room is not None:
            fixed = model.clone()
            CacheInPlacePass(room).call(fixed)
            model = fixed
            passes.append(f"CacheInPlacePass({room})")
    except FusionError as error:
        remark = f"{error.message.rstrip('.')}, {_GROWS}"
    return model, tuple(passes), remark


def _room(loaded: LoadedModel, room: int | None) -> int:
    config = loaded.model.config.get_text_config()
    known = getattr(config, "max_position_embeddings", None)
    if room is not None and isinstance(known, int) and room > known:
        raise UsageError(
            f"The model knows {known} positions; caches of {room} can't be filled.",
            f"Say --cache-length {known}, or less.",
            code="cache-too-short",
        )
    wanted = room or min(USUAL_ROOM, known if isinstance(known, int) else USUAL_ROOM)
    return -(-wanted // _STEP) * _STEP
