"""Puts something else in the place of a running model's branches: nothing, a bias, a linear map."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from exporter.artifacts.stacks import Deleted
from exporter.files import sha256_bytes
from exporter.models.architectures import SublayerModules, every_sublayer, named_in
from exporter.models.residual_stream import first_tensor, hooked
from graph_passes.types import SublayerRef

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class BranchReplacement:
    """What a branch adds to the residual stream instead of its own work.

    ``contribution = x @ weight.T + bias`` with ``x`` what the branch reads, behind its norm. With
    neither it adds nothing.
    """

    bias: torch.Tensor | None = None  # `[hidden]`, or None
    weight: torch.Tensor | None = None  # `[hidden, hidden]`, of a linear map, or None

    @property
    def numbers(self) -> list[torch.Tensor]:
        """What there is of the two; empty where it adds nothing."""
        return [item for item in (self.bias, self.weight) if item is not None]

    def turned(self, turn: Callable[[torch.Tensor], torch.Tensor]) -> BranchReplacement:
        """The same with each tensor turned into another."""
        bias, weight = (None if t is None else turn(t) for t in (self.bias, self.weight))
        return BranchReplacement(bias, weight)

    @cached_property
    def sha256(self) -> str:
        """Of its numbers: equal for what an earlier run has fitted alike."""
        result = [(tuple(t.shape), str(t.dtype)) for t in self.numbers]
        numbers = (t.detach().cpu().contiguous().view(-1).numpy().tobytes() for t in self.numbers)
        return sha256_bytes(b"".join([repr(result).encode(), *numbers]))

    def contribution(self, x: torch.Tensor) -> torch.Tensor | None:
        """What joins the stream, ``[..., hidden]`` in the dtype of ``x``; None for nothing.

        x: what the branch reads, `[..., hidden]`.
        """
        bias = None if self.bias is None else self.bias.to(x)
        if self.weight is None:
            return None if bias is None else bias.expand(x.shape)
        total = x @ self.weight.to(x).T
        return total if bias is None else total + bias


NOTHING = BranchReplacement()
"""The branch contributes nothing."""

BranchReplacements = Mapping[SublayerRef, BranchReplacement]
"""What is in the place of which branch, by layer and kind; the others are as they were."""


def without_branches(deletions: Iterable[Deleted], model: Any) -> dict[Any, BranchReplacement]:
    """The cut that leaves the named branches out; a block stands for both of its layer's."""
    return dict.fromkeys(named_in(model, deletions), NOTHING)


def branches_replaced(
    model: Any, cut: BranchReplacements
) -> contextlib.AbstractContextManager[None]:
    """Runs a model with a cut while the block runs; no hook is left behind.

    The branches that are cut still run, and fill their caches; only what they add is another.
    """
    parts = {part.ref: part for part in every_sublayer(model)}
    wanted = named_in(model, cut)
    return hooked(handle for name in wanted for handle in replacing_hooks(parts[name], cut[name]))


def replacing_hooks(part: SublayerModules, replacement: BranchReplacement) -> Iterator[Any]:
    """Registers hooks that give a branch's output another value."""
    read: list[torch.Tensor] = []

    def remember(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        read[:] = [first_input(args, kwargs)]

    def replace(_module: Any, _inputs: Any, output: Any) -> Any:
        return _in_place_of(output, replacement, read.pop(), part.multiplier)

    yield part.reads.register_forward_pre_hook(remember, with_kwargs=True)
    yield part.contribution.register_forward_hook(replace)


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The tensor that a module works on: its first argument, however it is handed over."""
    import torch

    if args:
        return first_tensor(args[0])
    named = kwargs.get("hidden_states")
    if isinstance(named, torch.Tensor):
        return named
    return next(value for value in kwargs.values() if isinstance(value, torch.Tensor))


def _in_place_of(
    output: Any, replacement: BranchReplacement, x: torch.Tensor, multiplier: float
) -> Any:
    old = first_tensor(output)
    contribution = replacement.contribution(x)
    if contribution is None:
        # Zeros, not a product: a branch that overflows would give NaN.
        new = old.new_zeros(old.shape)
    else:
        new = (contribution / multiplier).reshape(old.shape).to(old.dtype)
    return (new, *output[1:]) if isinstance(output, tuple) else new
