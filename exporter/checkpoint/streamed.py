"""Pruned checkpoints of models larger than memory: from shards to shards, a tensor at a time.

The model runs on a few tokens, a layer's weights in memory at a time, to see which modules go and
that what is left computes what it should. Then what stays is copied.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.artifacts import PruningPlan
from exporter.checkpoint.pruned_model import (
    answer_to,
    place_replacements,
    refuse_tokenless,
    require_same,
)
from exporter.checkpoint.shallow_model import (
    HINT,
    kept_layers,
    refuse_other_settings,
    shallow_config_of,
)
from exporter.checkpoint.shard_writer import FLOATS, Piece, piece_of, safetensors_name, write_shards
from exporter.cut.branch_replacements import branch_replacements_of
from exporter.errors import ModelSourceError, UnknownArchitectureError
from exporter.files import telling_full_disk
from exporter.models.ablation.branch_replacements import BranchReplacements, branches_replaced
from exporter.models.anatomy.architectures import layer_modules, unknown_layers
from exporter.models.anatomy.families import FAMILIES
from exporter.models.anatomy.residual_stream import probe_inputs
from exporter.models.loading.filled_modules import filled_while_running
from exporter.models.loading.meta_model import MetaModel, ShardedWeights, load_meta
from exporter.models.loading.model_files import save_pretrained_files
from exporter.models.loading.model_source import LoadedModel
from exporter.models.pruned_structure import structure_for
from exporter.progress import QUIET, ByteCount, Progress

if TYPE_CHECKING:
    import torch

    from exporter.artifacts.replacement_file import Replacements
    from exporter.models.branch_modules import PrunedStructure


def write_streamed(
    meta: MetaModel,
    plan: PruningPlan,
    stage: Path,
    *,
    replacements: Replacements | None = None,
    progress: Progress = QUIET,
) -> tuple[LoadedModel, list[int] | None]:
    """Writes a pruned checkpoint into a folder that the caller stages.

    Args:
        meta: The whole model; it is pruned, or of no use afterwards.
        plan: What to drop.
        stage: An empty folder.
        replacements: The plan's numbers.
        progress: Told of bytes.

    Returns:
        The model that was written, without its weights; and the layers that it has, where it has
        fewer.

    Raises:
        PlanError: The plan is not for this model.
        UnknownArchitectureError: This family can't be written so.
        ModelSourceError: A shard can't be read.
        OSError: It can't be written.
    """
    import torch

    model: Any = meta.model
    before = meta.weights.sources()
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
    """A whole model's layers.

    Raises:
        UnknownArchitectureError: It is not known where the model keeps them.
    """
    if model.config.model_type not in FAMILIES:
        raise unknown_layers(model)  # Looking for them takes a run.
    return [each.layer for each in layer_modules(model)]


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
    after = _flat(pruned.weights.sources().values())
    shards = _shards(meta, {name: name for name in meta.shards.entries if name in after})
    own = {name: value for name, value in model.named_parameters() if not value.is_meta}
    empty = torch.empty(0, dtype=model.dtype)
    extra = [piece_of(before[name][0], empty) for name in structure.empty]
    extra += [piece_of(name, value.detach()) for name, value in own.items()]
    _write(stage, [*shards, extra] if len(shards) > 1 else [[*shards[0], *extra]], progress)
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
    _write(stage, _shards(meta, _renumbered(meta, kept)), progress)
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
    """From each tensor that stays to its name with its layer's new number.

    Raises:
        UnknownArchitectureError: The shards name layers otherwise than the model does.
    """
    paths = {module: path for path, module in meta.model.named_modules()}
    used = _flat(meta.weights.sources().values())  # old files hold buffers that nobody reads
    names = {name: name for name in meta.shards.entries if name in used}
    place = {layer: number for number, layer in enumerate(kept)}
    for each in layer_modules(meta.model):
        path, number = f"{paths[each.layer]}.", re.compile(rf"(?<=\.){each.number}(?=\.)")
        own = [s for target, s in meta.weights.sources().items() if target.startswith(path)]
        for source in _flat(own):
            if not number.search(source):
                raise UnknownArchitectureError(f"{source} does not tell of layer {each.number}.")
            if each.number in place:
                names[source] = number.sub(str(place[each.number]), source, count=1)
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
        if kind in FLOATS and kind != dtype:
            count = size // entry.torch_dtype.itemsize
            kind, size = dtype, count * item
        piece = Piece(name, kind, entry.shape, size, _Reading(meta, source))
        shards.setdefault(entry.file, []).append(piece)
    return list(shards.values())


@dataclass(frozen=True)
class _Reading:
    """Reads one tensor of the shards when it is called."""

    meta: MetaModel
    source: str

    def __call__(self) -> torch.Tensor:
        return self.meta.shards.read(self.source)


def _write(stage: Path, shards: Sequence[Sequence[Piece]], progress: Progress) -> None:
    total = sum(piece.nbytes for shard in shards for piece in shard)
    with ByteCount.large(progress, "write weights", total) as told, telling_full_disk(stage):
        write_shards(stage, shards, told.add)


def _flat(sources: Iterable[Sequence[str]]) -> set[str]:
    return {name for names in sources for name in names}
