"""The processes of one training, as accelerate or torchrun starts them, and their memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

from exporter.errors import HealingError, first_line, is_out_of_memory
from exporter.heal.options import HealOptions

if TYPE_CHECKING:
    import torch

_T = TypeVar("_T")
_LONGEST_WAIT = timedelta(hours=6)
"""For what the first process does alone, such as the fold of a large model."""


def is_first_process() -> bool:
    """Whether this process writes and tells; the only one is the first."""
    return int(os.environ.get("RANK", "0")) == 0


def is_alone() -> bool:
    """Whether this is the only process of a training."""
    return int(os.environ.get("WORLD_SIZE", "1")) == 1


class Workers:
    """All processes of a training. Alone, nothing is exchanged."""

    def __init__(self) -> None:
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self._number = 0
        if self.count > 1:
            import torch
            from accelerate import PartialState

            state = PartialState(cpu=not torch.cuda.is_available(), timeout=_LONGEST_WAIT)
            self.count, self._number = state.num_processes, state.process_index

    def share(self, rows: Sequence[_T]) -> Sequence[_T]:
        """This process's part of what all do; none goes without."""
        return rows[self._number :: self.count] or rows[:1]

    def average(self, tensors: Iterable[torch.Tensor]) -> None:
        """Gives each tensor the mean of all processes' values, in place."""
        for tensor in tensors if self.count > 1 else ():
            tensor.copy_(_mean(tensor))

    def from_first(self, value: _T) -> _T:
        """The first process's value, in all of them."""
        if self.count == 1:
            return value
        from accelerate.utils import broadcast_object_list

        held = [value]
        broadcast_object_list(held)
        return held[0]

    def once(self, make: Callable[[], _T]) -> _T:
        """What the first process makes while the others wait, in all of them."""
        made, failed = cast("_T", None), ""
        if self._number == 0:
            try:
                made = make()
            except Exception as error:
                self.from_first((made, first_line(error)))
                raise
        made, failed = self.from_first((made, failed))
        if failed:
            raise HealingError(
                f"The first process failed: {failed}",
                "See what that one says.",
                code="first-process-failed",
            )
        return made


def _mean(tensor: torch.Tensor) -> torch.Tensor:
    from accelerate.utils import reduce

    result: torch.Tensor = reduce(tensor, reduction="mean")
    return result


@contextlib.contextmanager
def telling_memory(options: HealOptions) -> Iterator[None]:
    """Says what needs less where memory is short."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        smaller = "a smaller --sequence-length or batch_size"
        raise HealingError(
            f"Memory ran out while the cut was healed ({options.decided}).",
            f"Try {smaller}, step_tokens or rank." if options.trains else f"Try {smaller}.",
            code="out-of-memory",
        ) from error


def training_device(model: Any) -> torch.device:
    """Where a model is trained: on this process's GPU where there is one, else where it is."""
    import torch

    if model.device.type != "cpu" or not torch.cuda.is_available():
        result: torch.device = model.device
        return result
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
