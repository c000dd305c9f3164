"""Puts new values of weights that a model keeps into it: what training or folding made of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from exporter.artifacts.replacement_file import ChangedWeight
from exporter.errors import PlanError
from graph_passes.replacements import array_of

if TYPE_CHECKING:
    import torch

_HINT = "The plan is for another model: plan and heal this one."


def change_weights(model: Any, changes: Mapping[str, ChangedWeight]) -> None:
    """Gives parameters of a PyTorch model the values that healing made, in place.

    Sums are made in float32 and rounded to the model's dtype.

    Args:
        model: The model that was healed, with the weights that it had.
        changes: By the parameter's name.

    Raises:
        PlanError: A parameter does not exist or has another shape, numbers are not finite, or the
            model's weights are still in their shards.
    """
    if changes and model.device.type == "meta":
        raise PlanError(
            "The plan changes weights, and this model's weights are read a layer at a time.",
            "Leave --stream away.",
            code="changed-weights-of-streamed-model",
        )
    parameters = dict(model.named_parameters())
    for name, change in changes.items():
        if name not in parameters:
            raise PlanError(
                f"The plan changes {name}, which this model does not have.",
                _HINT,
                code="unknown-weight",
            )
        parameters[name].data = _changed(name, parameters[name].data, change)


@contextlib.contextmanager
def weights_changed(model: Any, changes: Mapping[str, ChangedWeight]) -> Iterator[None]:
    """The same while the block runs; afterwards the model has the values that it had.

    Raises:
        PlanError: As :func:`change_weights`.
    """
    before = {name: each.data for name, each in model.named_parameters() if name in changes}
    try:
        change_weights(model, changes)
        yield
    finally:
        for name, each in model.named_parameters():
            if name in before:
                each.data = before[name]


def _changed(name: str, old: torch.Tensor, change: ChangedWeight) -> torch.Tensor:
    held = [_tensor(each).to(old.device) for each in change.numbers]
    shapes = [tuple(each.shape) for each in held]
    if len(held) == 2 and _fit(shapes, tuple(old.shape)):
        new = old.float() + held[1] @ held[0]
    elif shapes == [tuple(old.shape)]:
        new = held[0]
    else:
        raise PlanError(
            f"The plan changes {name} by numbers of the shapes {shapes}; here it has "
            f"{list(old.shape)}.",
            _HINT,
            code="weight-of-another-shape",
        )
    new = new.to(old.dtype)
    if not bool(new.isfinite().all()):
        raise PlanError(
            f"The plan's numbers for {name} are not finite in {old.dtype}.",
            "Heal it again.",
            code="weight-not-finite",
        )
    return new.contiguous()


def _fit(shapes: list[tuple[int, ...]], wanted: tuple[int, ...]) -> bool:
    down, up = shapes
    return len(down) == len(up) == 2 and up[1] == down[0] and (up[0], down[1]) == wanted


def _tensor(numbers: Any) -> torch.Tensor:
    import torch

    if isinstance(numbers, torch.Tensor):
        return numbers.float()
    return torch.from_numpy(np.array(array_of(numbers), dtype=np.float32))
