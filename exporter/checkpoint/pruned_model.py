"""A pruned or healed model in PyTorch: without the dropped modules, and as a checkpoint.

The checkpoint is a Hugging Face folder whose safetensors lack what was dropped and hold what took
its place; ``config.json`` says so under ``depthcut``. :func:`load_pruned` needs no code from it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.artifacts import PlannedDeletion
from exporter.artifacts.plans.dialects import ORIGIN, SECTION
from exporter.errors import UnknownArchitectureError, UsageError
from exporter.files import make_readable, staged_directory
from exporter.models.ablation.branch_replacements import (
    BranchReplacement,
    BranchReplacements,
    branches_replaced,
)
from exporter.models.anatomy.residual_stream import probe_inputs
from exporter.models.loading.model_files import save_checkpoint
from exporter.models.loading.model_source import LoadedModel, load_model
from exporter.models.model_folder import OF_IMAGES
from exporter.models.pruned_structure import structure_for
from graph_passes.files.locations import real
from graph_passes.files.reading import read_json
from graph_passes.types import SublayerRef

if TYPE_CHECKING:
    import torch

    from exporter.models.branch_modules import PrunedStructure

LICENSE_FILES = ("LICENSE*", "NOTICE*", "USE_POLICY*")
"""Files of a model that go with whatever is made of it."""
CONFIG_CODE = "configuration_decilm.py"
"""The one file of code that a checkpoint may have: it comes from depthcut."""
_ENDINGS = {".safetensors", ".json", ".md", ".txt", ".model", ".jinja"}
_TOLERANCE = {"float32": 1e-4, "float64": 1e-9}
_NARROW_TOLERANCE = 2e-2  # sums of half a dozen numbers, each rounded


def prune_model(
    loaded: LoadedModel, deletions: Sequence[PlannedDeletion], cut: BranchReplacements
) -> None:
    """Puts modules that do a cut's work into a model, in place; no hook is left.

    A dropped branch becomes one module: nothing, a bias, or one or two products. The norm before it
    goes too, where nothing else reads it. A dropped attention keeps no keys and values; the one
    that the length of the past is read from keeps one number a token.

    Args:
        loaded: The model. It is changed.
        deletions: The plan's, for the config.
        cut: What takes which branch's place.

    Raises:
        PlanError: A sublayer does not exist.
        UnknownArchitectureError: The model's family can't be written so. The model is then broken:
            load it again.
    """
    import torch

    model: Any = loaded.model
    refuse_tokenless(model)
    inputs = probe_inputs(model)
    with branches_replaced(model, cut), torch.inference_mode():
        wanted = answer_to(model, inputs)
    structure = structure_for(loaded, deletions, cut, inputs)
    place_replacements(model, structure, cut)
    with torch.inference_mode():
        found = answer_to(model, inputs)
    require_same(loaded, found, wanted)


def place_replacements(model: Any, structure: PrunedStructure, cut: BranchReplacements) -> None:
    """Puts the modules that a structure tells into a model, with a cut's numbers in them."""
    from exporter.models.branch_modules import ReplacementModule, pruned_class, put_modules

    put_modules(model, structure)
    model.__class__ = pruned_class(type(model), structure)
    for branch in structure.branches:
        module = model.get_submodule(branch.path)
        assert isinstance(module, ReplacementModule)
        module.fill(*_as_in(model, cut[SublayerRef(branch.layer, branch.kind)]))
    model.eval().requires_grad_(False)


def save_pruned(loaded: LoadedModel, folder: Path) -> None:
    """Writes a model that :func:`prune_model` changed, as a folder that is there whole or not.

    Raises:
        UsageError: The folder is there, and holds something else than such a checkpoint.
        OSError: It can't be written.
    """
    refuse_checkpoint_folder(folder)
    with staged_directory(folder) as stage:
        save_pruned_into(loaded, stage)


def save_pruned_into(loaded: LoadedModel, stage: Path) -> None:
    """The same into a folder that the caller stages."""
    from exporter.models.branch_modules import note_drops, structure_of

    save_checkpoint(loaded, stage)
    for path in stage.glob("*.safetensors"):
        make_readable(path)
    structure = structure_of(loaded.model.config)
    if structure is not None:
        note_drops(stage, structure)  # The config was written anew behind the weights.


def refuse_checkpoint_folder(folder: Path, kept: Iterable[Path] = ()) -> None:
    """Keeps a checkpoint from taking the place of anything but an earlier one.

    Args:
        folder: Where it is to stand.
        kept: Files and folders that must stay as they are.

    Raises:
        UsageError: The folder holds something else, or one of those, or lies in one.
    """
    place = real(folder)
    for each in kept:
        if real(each).is_relative_to(place) or (each.is_dir() and place.is_relative_to(real(each))):
            raise UsageError(
                f"{folder} would be the checkpoint, so {each} can't be inside it.",
                "Give the checkpoint a folder of its own.",
                code="places-collide",
            )
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    config: Any = None
    with contextlib.suppress(OSError, ValueError):
        config = read_json(folder / "config.json")
    if not isinstance(config, dict) or not {SECTION, ORIGIN} & config.keys():
        raise UsageError(
            f"{folder} exists, and is not a pruned checkpoint.",
            "Give a folder that doesn't exist.",
            code="not-ours",
        )
    more = sorted(path.name for path in folder.iterdir() if not _is_ours(path))
    if more:
        raise UsageError(
            f"{folder} is a pruned checkpoint, but depthcut did not write {more[0]} in it.",
            "Give a folder that doesn't exist: an existing checkpoint is replaced as a whole.",
            code="not-ours",
        )


def _is_ours(path: Path) -> bool:
    """Whether a checkpoint could have such a file; a training leaves others, and folders."""
    return path.is_file() and (
        path.suffix in _ENDINGS
        or path.name == CONFIG_CODE
        or any(path.match(pattern) for pattern in LICENSE_FILES)
    )


def load_pruned(folder: Path, *, dtype: str = "float32", train: bool = False) -> LoadedModel:
    """Loads a pruned checkpoint, for evaluation or fine-tuning. Runs no code of the folder's.

    The model is transformers' own class and can be given to its ``Trainer`` or any loop;
    :func:`save_pruned`, or its own ``save_pretrained``, writes such a checkpoint again.

    Args:
        folder: The checkpoint, with gaps in its layers or with fewer layers.
        dtype: ``float32``, ``float16`` or ``bfloat16``.
        train: Gives it in training mode, with gradients, replacements' included.

    Raises:
        ModelSourceError: It is no whole checkpoint of this kind.
    """
    loaded = load_model(str(folder), dtype=dtype, pruned=True)
    if train:
        loaded.model.train().requires_grad_(True)
    return loaded


def _as_in(
    model: Any, replacement: BranchReplacement
) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    """The numbers in the model's dtype, to which a graph's are rounded too."""
    # A model that is read a layer at a time is nowhere, and runs on the CPU.
    device = "cpu" if model.device.type == "meta" else model.device
    form = {"device": device, "dtype": model.dtype}
    bias = None if replacement.bias is None else replacement.bias.detach().to(**form)
    return bias, [each.detach().to(**form) for each in replacement.maps]


def refuse_tokenless(model: Any) -> None:
    """Refuses a model that reads neither text nor images, before work goes into it.

    Raises:
        UnknownArchitectureError: It is one, such as a model of sounds; or it gives images no class.
    """
    classifies_images = type(model).__name__.endswith(OF_IMAGES)
    if model.main_input_name != "input_ids" and not classifies_images:
        raise UnknownArchitectureError(
            f"{type(model).__name__} takes no tokens, so it can't be saved pruned.",
            "Export it without a checkpoint, and use the pruned ONNX file.",
            code="takes-no-tokens",
        )


def answer_to(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits, or what else a model answers first, in float64."""
    output = model(**inputs)
    answer: torch.Tensor = output.logits if hasattr(output, "logits") else output[0]
    return answer.double()


def require_same(
    loaded: LoadedModel,
    found: torch.Tensor,
    wanted: torch.Tensor,
    hint: str = "This family can be pruned as ONNX only: depthcut export.",
) -> None:
    """Holds a changed model's answer against what it should be.

    Raises:
        UnknownArchitectureError: It is further off than rounding explains.
    """
    name = str(loaded.model.dtype).removeprefix("torch.")
    scale = max(1.0, float(wanted.abs().max()))
    limit = _TOLERANCE.get(name, _NARROW_TOLERANCE) * scale
    error = float((found - wanted).abs().max()) if found.shape == wanted.shape else float("inf")
    if not error <= limit:
        raise UnknownArchitectureError(
            f"Without its dropped modules {loaded.ref.architecture} computes wrong results: "
            f"the error is {error:.1e}, more than {limit:.1e}.",
            hint,
            code="wrong-results",
        )
