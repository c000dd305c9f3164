"""From a plan and its file of replacements to what PyTorch puts in the places of the branches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from exporter.artifacts import PlannedDeletion
from exporter.errors import PlanError
from exporter.models.ablation.branch_replacements import (
    NOTHING,
    BranchReplacement,
    BranchReplacements,
)
from exporter.models.architectures import named_in
from graph_passes.replacements import array_of
from graph_passes.types import SublayerRef

if TYPE_CHECKING:
    import torch

    from exporter.artifacts.loaded_plan import Replacements
    from graph_passes.replacements import Numbers, ReplacementTensors


def branch_replacements_of(
    deletions: Iterable[PlannedDeletion], replacements: Replacements | None, model: Any
) -> BranchReplacements:
    """What a plan puts in the place of each branch."""
    cut: dict[SublayerRef, BranchReplacement] = {}
    for deletion in deletions:
        for name in named_in(model, [deletion]):
            if deletion.replacement == "none":
                cut[name] = NOTHING
            else:
                cut[name] = _branch_replacement(SublayerRef(*name), deletion, replacements, model)
    return dict(sorted(cut.items()))


def _branch_replacement(
    ref: SublayerRef, deletion: PlannedDeletion, replacements: Replacements | None, model: Any
) -> BranchReplacement:
    given = None if replacements is None else replacements.tensors.get(ref)
    if given is None or bool(given.maps) != (deletion.replacement == "linear"):
        raise PlanError(
            f"{ref} is to be replaced ({deletion.replacement}), but there are no such numbers for "
            "it.",
            "Make the plan and its file of replacements again: depthcut heal.",
            code="numbers-missing",
        )
    where = "" if replacements is None else f"{replacements.path}: "
    key = f"{ref.kind}.{ref.layer}"
    _check_widths(f"{where}{key}", given, int(model.config.get_text_config().hidden_size))
    return BranchReplacement(
        bias=_tensor(f"{where}{key}.bias", given.bias, model),
        maps=tuple(_tensor(f"{where}{key}.{n}", w, model) for n, w in given.maps.items()),
    )


def _check_widths(what: str, given: ReplacementTensors, hidden: int) -> None:
    shapes = {name: _shape(numbers) for name, numbers in given.maps.items()}
    rank = next(iter(shapes.values()))[0] if len(shapes) > 1 else hidden
    wanted = {
        "bias": (hidden,),
        "weight": (hidden, hidden),
        "weight_down": (rank, hidden),
        "weight_up": (hidden, rank),
    }
    for name, shape in {"bias": _shape(given.bias), **shapes}.items():
        if shape != wanted[name]:
            raise PlanError(
                f"{what}.{name} has the shape {list(shape)}; this model "
                f"takes {list(wanted[name])}.",
                "The plan is for another model: plan and heal this one.",
                code="wrong-shape",
            )


def _shape(numbers: Numbers) -> tuple[int, ...]:
    shape = numbers.shape
    return tuple(shape) if isinstance(shape, tuple) else tuple(shape.numpy())


def _tensor(what: str, numbers: Numbers, model: Any) -> torch.Tensor:
    """In the model's dtype, to which the graph's numbers are rounded too."""
    import torch

    array = array_of(numbers)
    wide = np.array(array, dtype=np.float64 if array.dtype == np.float64 else np.float32)
    # A model whose weights come later has them on the CPU.
    device = "cpu" if model.device.type == "meta" else model.device
    tensor = torch.from_numpy(wide).to(device=device, dtype=model.dtype)
    if not bool(tensor.isfinite().all()):
        dtype = str(model.dtype).removeprefix("torch.")
        raise PlanError(
            f"{what} holds numbers that are not finite in {dtype}.",
            "Fit it again.",
            code="not-finite",
        )
    return tensor
