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
    from graph_passes.replacements import Numbers


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
    if given is None or (given.weight is not None) != (deletion.replacement == "linear"):
        raise PlanError(
            f"{ref} is to be replaced ({deletion.replacement}), but there are no such numbers for "
            "it.",
            "Make the plan and its file of replacements again: depthcut heal.",
            code="numbers-missing",
        )
    where = "" if replacements is None else f"{replacements.path}: "
    key = f"{ref.kind}.{ref.layer}"
    hidden, parts = int(model.config.get_text_config().hidden_size), {"bias": given.bias}
    if given.weight is not None:
        parts["weight"] = given.weight
    for name, numbers in parts.items():
        shape, wanted = _shape(numbers), (hidden,) if name == "bias" else (hidden, hidden)
        if shape != wanted:
            raise PlanError(
                f"{where}{key}.{name} has the shape {list(shape)}; this model takes "
                f"{list(wanted)}.",
                "The plan is for another model: plan and heal this one.",
                code="wrong-shape",
            )
    tensors = {n: _tensor(f"{where}{key}.{n}", numbers, model) for n, numbers in parts.items()}
    return BranchReplacement(**tensors)


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
