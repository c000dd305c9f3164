"""Pruned checkpoints of models larger than memory: from shards to shards, a tensor at a time."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.artifacts import PruningPlan
from exporter.checkpoint.pruned_model import (
    HINT,
    answer_to,
    kept_layers,
    place_replacements,
    refuse_other_settings,
    refuse_tokenless,
    require_same,
    shallow_config_of,
)
from exporter.cut.branch_replacements import branch_replacements_of
from exporter.errors import ModelSourceError, UnknownArchitectureError
from exporter.files import telling_full_disk, write_text
from exporter.models.ablation.branch_replacements import BranchReplacements, branches_replaced
from exporter.models.architectures import layer_modules, unknown_layers
from exporter.models.families import FAMILIES
from exporter.models.loading.checkpoint_shards import TORCH_NAMES
from exporter.models.loading.meta_model import (
    MetaModel,
    ShardedWeights,
    filled_while_running,
    load_meta,
)
from exporter.models.loading.model_files import save_pretrained_files
from exporter.models.loading.model_source import LoadedModel
from exporter.models.pruned_structure import structure_for
from exporter.models.residual_stream import probe_inputs
from exporter.progress import QUIET, ByteCount, Progress

if TYPE_CHECKING:
    import torch

    from exporter.artifacts.loaded_plan import Replacements
    from exporter.models.branch_modules import PrunedStructure

_ALIGNMENT = 8
_FLOATS = ("F64", "F32", "F16", "BF16")
"""The types that a cast is for."""


@dataclass(frozen=True)
class Piece:
    """One tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int  # how many bytes it takes
    read: Callable[[], torch.Tensor]


def safetensors_name(dtype: torch.dtype) -> str:
    """What safetensors calls one of PyTorch's types."""
    name = str(dtype).removeprefix("torch.")
    return next(kind for kind, other in TORCH_NAMES.items() if other == name)


def piece_of(name: str, tensor: torch.Tensor) -> Piece:
    """A tensor that is in memory."""
    dtype = safetensors_name(tensor.dtype)
    return Piece(name, dtype, tuple(tensor.shape), tensor.nbytes, lambda: tensor)


def write_shards(
    folder: Path, shards: Iterable[Sequence[Piece]], progress: Progress = QUIET
) -> None:
    """Writes the shards and, where there are several, their index."""
    filled = [shard for shard in shards if shard]
    total = sum(piece.nbytes for shard in filled for piece in shard)
    places: dict[str, str] = {}
    with ByteCount.large(progress, "write weights", total) as count, telling_full_disk(folder):
        for number, shard in enumerate(filled, start=1):
            alone = len(filled) == 1
            name = "model" if alone else f"model-{number:05}-of-{len(filled):05}"
            _write_shard(folder / f"{name}.safetensors", shard, count)
            places |= {piece.name: f"{name}.safetensors" for piece in shard}
        if len(filled) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": places}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            write_text(folder / "model.safetensors.index.json", text)


def _write_shard(path: Path, pieces: Sequence[Piece], count: ByteCount) -> None:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for piece in pieces:
        entry = {"dtype": piece.dtype, "shape": list(piece.shape)}
        entries[piece.name] = {**entry, "data_offsets": [begin, begin + piece.nbytes]}
        begin += piece.nbytes
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for piece in pieces:
            data = _bytes(piece)
            file.write(data)
            count.add(len(data))


def _bytes(piece: Piece) -> memoryview:
    import torch

    tensor = piece.read()
    if piece.dtype in _FLOATS:
        tensor = tensor.to(getattr(torch, TORCH_NAMES[piece.dtype]))
    data: memoryview = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    if len(data) != piece.nbytes or tensor.numel() != math.prod(piece.shape):
        raise ValueError(f"{piece.name} has {len(data)} bytes, not {piece.nbytes}")
    return data


def write_streamed(
    meta: MetaModel,
    plan: PruningPlan,
    stage: Path,
    *,
    replacements: Replacements | None = None,
    progress: Progress = QUIET,  # told of bytes
) -> tuple[LoadedModel, list[int] | None]:
    """Writes a pruned checkpoint into a folder that the caller stages."""
    import torch

    model: Any = meta.model
    before = meta.weights.sources
    with (
        filled_while_running(meta, layers_of(model)),
        torch.inference_mode(),
        progress.task("run the model, layer by layer"),
    ):
        cut = branch_replacements_of(plan.deletions, replacements, model)
        refuse_tokenless(model)
        inputs = probe_inputs(model)
        with branches_replaced(model, cut):
            wanted = answer_to(model, inputs)
        kept = kept_layers(plan.deletions, meta.ref.num_layers)
        structure = structure_for(meta, plan.deletions, cut, inputs)
    if kept:
        try:
            return _write_shallow(meta, plan, kept, wanted, stage, progress)
        except UnknownArchitectureError as error:
            progress.say(f"checkpoint: not with fewer layers. {error}")
            for path in stage.iterdir():
                path.unlink()
    return _write_gaps(meta, structure, cut, before, wanted, stage, progress)


def layers_of(model: Any) -> list[torch.nn.Module]:
    """A whole model's layers."""
    if model.config.model_type not in FAMILIES:
        raise unknown_layers(model)  # Looking for them takes a run.
    return [module.layer for module in layer_modules(model)]


def _write_gaps(
    meta: MetaModel,
    structure: PrunedStructure,
    cut: BranchReplacements,
    before: Mapping[str, Sequence[str]],
    wanted: torch.Tensor,
    stage: Path,
    progress: Progress,
) -> tuple[LoadedModel, list[int] | None]:
    import torch

    from exporter.models.branch_modules import note_drops

    model: Any = meta.model
    layers = layers_of(model)
    place_replacements(model, structure, cut)
    pruned = replace(meta, weights=ShardedWeights(model, meta.shards))
    with filled_while_running(pruned, layers), torch.inference_mode():
        require_same(pruned, answer_to(model, probe_inputs(model)), wanted)
    after = set(chain(*pruned.weights.sources.values()))
    shards = _shards(meta, {name: name for name in meta.shards.entries if name in after})
    own = {name: value for name, value in model.named_parameters() if not value.is_meta}
    empty = torch.empty(0, dtype=model.dtype)
    extra = [piece_of(before[name][0], empty) for name in structure.empty]
    extra += [piece_of(name, value.detach()) for name, value in own.items()]
    shards = [*shards, extra] if len(shards) > 1 else [[*shards[0], *extra]]
    write_shards(stage, shards, progress)
    save_pretrained_files(pruned, stage)
    note_drops(stage, structure)
    return pruned, None


def _write_shallow(
    meta: MetaModel,
    plan: PruningPlan,
    kept: Sequence[int],
    wanted: torch.Tensor,
    stage: Path,
    progress: Progress,
) -> tuple[LoadedModel, list[int] | None]:
    import torch

    model: Any = meta.model
    config = shallow_config_of(meta, plan.deletions, kept)
    with torch.device("meta"):
        made = type(model)(config).to(model.dtype)
    if model.can_generate():
        made.generation_config = model.generation_config
    write_shards(stage, _shards(meta, _renumbered(meta, kept)), progress)
    save_pretrained_files(replace(meta, model=made), stage)
    try:
        again = load_meta(str(stage), dtype=str(model.dtype).removeprefix("torch."))
    except ModelSourceError as error:
        raise UnknownArchitectureError(
            f"{meta.ref.architecture} can't be made with {len(kept)} layers.", HINT
        ) from error
    refuse_other_settings(model, again.model, kept)
    with filled_while_running(again, layers_of(again.model)), torch.inference_mode():
        require_same(again, answer_to(again.model, probe_inputs(again.model)), wanted)
    return again, list(kept)


def _renumbered(meta: MetaModel, kept: Sequence[int]) -> dict[str, str]:
    """From each tensor that stays to its name with its layer's new number."""
    paths = {module: path for path, module in meta.model.named_modules()}
    used = set(chain(*meta.weights.sources.values()))  # old files hold buffers that nobody reads
    names = {name: name for name in meta.shards.entries if name in used}
    place = {layer: number for number, layer in enumerate(kept)}
    for modules in layer_modules(meta.model):
        path, number = f"{paths[modules.layer]}.", re.compile(rf"(?<=\.){modules.number}(?=\.)")
        own = [s for target, s in meta.weights.sources.items() if target.startswith(path)]
        for source in set(chain(*own)):
            if not number.search(source):
                raise UnknownArchitectureError(f"{source} does not tell of layer {modules.number}.")
            if modules.number in place:
                names[source] = number.sub(str(place[modules.number]), source, count=1)
            else:
                del names[source]
    return names


def _shards(meta: MetaModel, names: Mapping[str, str]) -> list[list[Piece]]:
    """What stays, shard by shard as it lies in the base's; in the dtype that was asked for."""
    dtype = safetensors_name(meta.model.dtype)
    item = meta.model.dtype.itemsize
    shards: dict[Path, list[Piece]] = {}
    for source, name in names.items():
        entry = meta.shards.entries[source]
        kind, size = entry.dtype, entry.nbytes
        if kind in _FLOATS and kind != dtype:
            count = size // entry.torch_dtype.itemsize
            kind, size = dtype, count * item
        piece = Piece(name, kind, entry.shape, size, partial(meta.shards.read, source))
        shards.setdefault(entry.file, []).append(piece)
    return list(shards.values())
