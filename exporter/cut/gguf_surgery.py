"""GGUF file and plan in, GGUF file out, of tensors that are copied byte for byte."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args

from pydantic import Field

from exporter.artifacts import PlannedDeletion
from exporter.artifacts.base import Record
from exporter.artifacts.loaded_plan import LoadedPlan
from exporter.artifacts.plans import validate_plan
from exporter.cut.gguf_deci import DECI, check_deci, check_heads, deci_entries
from exporter.cut.gguf_layers import (
    Layer,
    check_own,
    layers_left,
    new_numbers,
    own_entries,
    place_in_layer,
    sublayers_of,
)
from exporter.cut.gguf_writing import Piece, map_piece, piece_of, write_file, zero_mlp
from exporter.errors import SurgeryError
from exporter.files import refuse_overwriting, sha256_file, telling_full_disk
from exporter.models.gguf_header import Entry, text_entry
from exporter.models.gguf_model_files import HIDDEN, SPLIT_KEYS, GgufModel, layers_of, read_model
from exporter.progress import QUIET, ByteCount, Progress
from graph_passes.files.kinds import GGUF
from graph_passes.files.placing import staging
from graph_passes.plan_record import PLAN_KEY, canonical_json
from graph_passes.types import DeletionKind, SublayerRef

_KINDS = get_args(DeletionKind)
_MAP = "attn_output.weight"
_NORM_OF_MAP = "attn_norm.weight"
_NORM_OF_MLP = "ffn_norm.weight"


class GgufFacts(Record):
    """What was cut out of a GGUF file."""

    files: list[str]
    architecture: tuple[str, str]
    layers: int
    kept: list[int]
    deletions: list[PlannedDeletion]
    tensors_kept: int = Field(ge=0)  # how many are copied byte for byte
    tensors_removed: int = Field(ge=0)
    tensors_added: int = Field(ge=0)
    bytes_before: int
    bytes_after: int


def cut_gguf(
    source: Path,
    target: Path,
    plan: LoadedPlan,
    *,
    progress: Progress = QUIET,
) -> GgufFacts:
    """Cuts sublayers out of a GGUF file, or out of a model in shards of one; it becomes one file.

    Where only whole blocks go, the result is of the source's architecture; else of llama.cpp's
    ``deci``, and appears whole or not at all.

    Args:
        source: The GGUF file, or one of its shards.
        target: The cut file.
        plan: What is dropped, with its numbers.
        progress: Hears of each step.

    Raises:
        SurgeryError: The file was cut before, or llama.cpp would compute the result wrongly.
        GgufFileError: The file can't be read.
    """
    if not target.name or target.is_dir():
        raise SurgeryError(
            f"{target} is a folder.", "Name a file in it, such as cut.gguf.", code="is-a-folder"
        )
    model = read_model(source)
    _check_plan(model, plan, progress)
    layers = layers_left(plan.plan.deletions, layers_of(model))
    entries, pieces = _result(model, layers, plan)
    record = canonical_json([deletion.model_dump() for deletion in plan.plan.deletions])
    noted = [*entries, text_entry(PLAN_KEY, record)]  # as a graph's metadata has it
    noted = [entry for entry in noted if entry.key not in SPLIT_KEYS]
    refuse_overwriting(target, [*(file.path for file in model.files), *plan.inputs], GGUF)
    version, total = model.files[0].version, sum(piece.nbytes for piece in pieces)
    with staging(target) as stage, ByteCount.large(progress, "write tensors", total) as count:
        with telling_full_disk(target):
            write_file(stage.folder / target.name, version, noted, pieces, count.add)
        stage.place([(stage.folder / target.name, target)])
    return _facts(model, layers, plan, target, pieces)


def _check_plan(model: GgufModel, plan: LoadedPlan, progress: Progress) -> None:
    """What can be told before anything is made of the file."""
    source = str(model.path)
    if PLAN_KEY in model.entries:
        raise SurgeryError(
            f"{source} was cut by depthcut before; its layers have other numbers now.",
            "Cut the file that it was made from, by a plan with all that is to go.",
            code="cut-before",
        )
    validate_plan(plan.plan, layers_of(model), _KINDS, model=source, path=plan.path)
    if plan.changed_weights:
        raise SurgeryError(
            f"{plan.path or 'The plan'} has new values of weights that stay; the blocks of "
            f"{source} are copied as they are.",
            "Write the healed model (depthcut checkpoint) and convert that, or plan without.",
            code="changed-weights",
        )
    parts = sublayers_of(model)  # another program may have cut it
    for ref in (ref for deletion in plan.plan.deletions for ref in deletion.sublayers):
        if ref not in parts:
            raise SurgeryError(
                f"{ref} is to go, and {source} has no tensors of it.",
                "Take it out of the plan.",
                code="sublayer-missing",
            )
    if "model" in plan.plan.made_from:
        plan.hold_against(sha256_file(model.path), source, progress)


def _result(
    model: GgufModel, layers: Sequence[Layer], plan: LoadedPlan
) -> tuple[list[Entry], list[Piece]]:
    """The metadata and the tensors of the result; nothing is written yet."""
    if all(layer.whole for layer in layers):
        check_own(model, layers)
        if model.architecture == DECI:
            check_heads(model, layers)
        return own_entries(model, layers), list(_whole_layers(model, layers))
    check_deci(model, layers)
    return deci_entries(model, layers), list(_deci_tensors(model, layers, plan))


def _whole_layers(model: GgufModel, layers: Sequence[Layer]) -> Iterator[Piece]:
    numbers = new_numbers(layers)
    for tensor in model.tensors:
        place = place_in_layer(tensor.name)
        if place is None:
            yield piece_of(tensor)
        elif place[0] in numbers:
            yield piece_of(tensor).renamed(f"blk.{numbers[place[0]]}.{place[1]}")


def _deci_tensors(model: GgufModel, layers: Sequence[Layer], plan: LoadedPlan) -> Iterator[Piece]:
    """What is copied, and behind the norm of a layer's part what takes that part's place."""
    hidden = model.whole(HIDDEN)
    left = {layer.number: (place, layer) for place, layer in enumerate(layers)}
    for tensor in model.tensors:
        at = place_in_layer(tensor.name)
        if at is None:
            yield piece_of(tensor)
            continue
        if at[0] not in left:
            continue
        place, layer = left[at[0]]
        prefix = f"blk.{place}."
        if _stays(layer, at[1]):
            yield piece_of(tensor).renamed(prefix + at[1])
        if at[1] == _NORM_OF_MAP and layer.attention == "linear":
            ref = SublayerRef(layer.number, "attention")
            yield map_piece(prefix + _MAP, plan, ref, hidden)
        if at[1] == _NORM_OF_MLP and layer.mlp is not None:
            yield from zero_mlp(prefix, hidden)


def _stays(layer: Layer, name: str) -> bool:
    """Whether a tensor of a layer is copied; the norm of what is replaced is."""
    if name.startswith("attn_"):
        with_map = layer.attention == "linear" and name == _NORM_OF_MAP
        return layer.attention is None or with_map
    return layer.mlp is None or name == _NORM_OF_MLP


def _facts(
    model: GgufModel,
    layers: Sequence[Layer],
    plan: LoadedPlan,
    target: Path,
    pieces: Sequence[Piece],
) -> GgufFacts:
    whole = all(layer.whole for layer in layers)
    added = sum(piece.is_new for piece in pieces)
    kept = len(pieces) - added
    return GgufFacts(
        files=[target.name],
        architecture=(model.architecture, model.architecture if whole else DECI),
        layers=layers_of(model),
        kept=[layer.number for layer in layers],
        deletions=plan.plan.deletions,
        tensors_kept=kept,
        tensors_removed=len(model.tensors) - kept,
        tensors_added=added,
        bytes_before=sum(tensor.nbytes for tensor in model.tensors),
        bytes_after=sum(piece.nbytes for piece in pieces),
    )
