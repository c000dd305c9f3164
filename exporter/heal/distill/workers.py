"""The processes of one training, as accelerate or torchrun starts them.

Each takes a share of every step, the gradients are averaged, and all decide alike.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

_T = TypeVar("_T")


def is_first_process() -> bool:
    """Whether this process writes and tells; the only one is the first."""
    return int(os.environ.get("RANK", "0")) == 0


class Workers:
    """All processes of a training. Alone, nothing is exchanged."""

    def __init__(self) -> None:
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self._number = 0
        if self.count > 1:
            import torch
            from accelerate import PartialState

            state = PartialState(cpu=not torch.cuda.is_available())
            self.count, self._number = state.num_processes, state.process_index

    def share(self, rows: Sequence[_T]) -> Sequence[_T]:
        """This process's part of what all do; none goes without."""
        return rows[self._number :: self.count] or rows[:1]

    def average(self, tensors: Iterable[torch.Tensor]) -> None:
        """Gives each tensor the mean of all processes' values, in place."""
        for tensor in tensors if self.count > 1 else ():
            tensor.copy_(_mean(tensor))

    def mean(self, value: float, device: Any) -> float:
        """The mean of a number over all processes, so that all decide alike."""
        if self.count == 1:
            return value
        import torch

        return float(_mean(torch.tensor(value, dtype=torch.float32, device=device)))

    def from_first(self, value: _T) -> _T:
        """The first process's value, in all of them."""
        if self.count == 1:
            return value
        from accelerate.utils import broadcast_object_list

        held = [value]
        broadcast_object_list(held)
        return held[0]


def _mean(tensor: torch.Tensor) -> torch.Tensor:
    from accelerate.utils import reduce

    found: torch.Tensor = reduce(tensor, reduction="mean")
    return found
