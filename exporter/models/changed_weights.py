"""Puts new values of weights that a model keeps into it: what training or folding made of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from exporter.artifacts.loaded_plan import ChangedWeight
from exporter.errors import HealingError, PlanError
from graph_passes.replacements import array_of

if TYPE_CHECKING:
    import torch

_TRANSPOSED = "Conv1D"
"""transformers' class of products whose weight is ``[in, out]``."""


@dataclass(eq=False)
class OwnValue:
    """A parameter for which the healed model has a value of its own."""

    name: str
    parameter: torch.nn.Parameter
    other: torch.Tensor

    def swap(self) -> None:
        """Puts the other value in its place."""
        self.parameter.data, self.other = self.other, self.parameter.data


@contextlib.contextmanager
def swapped(values: Sequence[OwnValue]) -> Iterator[None]:
    """Gives the model its other values while the block runs."""
    with contextlib.ExitStack() as stack:
        for value in values:
            value.swap()
            stack.callback(value.swap)
        yield


def changes_of(values: Sequence[OwnValue]) -> dict[str, ChangedWeight]:
    """The other values that differ from the model's, as changes of it."""
    return {
        value.name: ChangedWeight((value.other.detach().clone(),))
        for value in values
        if not bool((value.other == value.parameter).all())
    }


def products_in(model: Any, modules: Iterable[Any]) -> dict[str, Any]:
    """Those of some modules that multiply by a weight, and maybe add a bias, by their names."""
    import torch

    inside, linear = {id(module) for module in modules}, torch.nn.Linear
    return {
        name: module
        for name, module in model.named_modules()
        if id(module) in inside
        # Routers give more than a product.
        and ((isinstance(module, linear) and type(module).forward is linear.forward)
             or is_transposed(module))
    }  # fmt: skip


def is_transposed(module: Any) -> bool:
    """Whether a product's weight is ``[in, out]``."""
    return type(module).__name__ == _TRANSPOSED


def refuse_quantized(model: Any) -> None:
    """Refuses weights that are no floating-point numbers."""
    quantized = getattr(model, "is_quantized", False) or any(
        not item.is_floating_point() for item in model.parameters()
    )
    if quantized:
        raise HealingError(
            f"The weights of {model.config.model_type} are quantised and can't be changed.",
            "Heal the model in float32 or bfloat16, and quantise it afterwards.",
            code="quantized",
        )


def change_weights(model: Any, changes: Mapping[str, ChangedWeight]) -> None:
    """Gives parameters of a PyTorch model the values that healing made, in place.

    Sums are made in float32 and rounded to the model's dtype.
    """
    for value in _own_values(model, changes):
        value.swap()


@contextlib.contextmanager
def weights_changed(model: Any, changes: Mapping[str, ChangedWeight]) -> Iterator[None]:
    """The same while the block runs; afterwards the model has the values that it had."""
    with swapped(_own_values(model, changes)):
        yield


def _own_values(model: Any, changes: Mapping[str, ChangedWeight]) -> list[OwnValue]:
    parameters, own_values = dict(model.named_parameters()), []
    for name, change in changes.items():
        old = parameters.get(name)
        new = None if old is None or old.is_meta else _changed(old.data, change)
        if old is None or new is None or not bool(new.isfinite().all()):
            here = "does not have" if old is None else f"has as {list(old.shape)} in {old.dtype}"
            here = "reads a layer at a time" if old is not None and old.is_meta else here
            raise PlanError(
                f"The plan changes {name}, which this model {here}, by numbers of the shapes "
                f"{[list(item.shape) for item in change.numbers]}: they don't fit, or are not "
                "finite.",
                "Plan and heal this very model.",
                code="unknown-weight",
            )
        own_values.append(OwnValue(name, old, new))
    return own_values


def _changed(old: torch.Tensor, change: ChangedWeight) -> torch.Tensor | None:
    """The new value; None where the numbers are for a weight of another shape."""
    held = [_tensor(number).to(old.device) for number in change.numbers]
    shapes = [tuple(item.shape) for item in held]
    if len(held) == 2 and _fit(shapes, tuple(old.shape)):
        new = old.float() + held[1] @ held[0]
    elif shapes == [tuple(old.shape)]:
        new = held[0]
    else:
        return None
    return new.to(old.dtype).contiguous()


def _fit(shapes: list[tuple[int, ...]], wanted: tuple[int, ...]) -> bool:
    down, up = shapes
    return len(down) == len(up) == 2 and up[1] == down[0] and (up[0], down[1]) == wanted


def _tensor(numbers: Any) -> torch.Tensor:
    import torch

    if isinstance(numbers, torch.Tensor):
        return numbers.float()
    return torch.from_numpy(np.array(array_of(numbers), dtype=np.float32))


def bfloat16_where_fast(model: Any) -> contextlib.AbstractContextManager[Any]:
    """bfloat16 for products, where the device has it in hardware; else the model's own dtype.

    Beside float16, whose norms take no sums of both types, it is the model's own.
    """
    import torch

    device = model.device
    fast = device.type == "cpu" and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported()
    enabled = fast and model.dtype != torch.float16
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)
