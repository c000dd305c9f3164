"""Whether the hidden states fit into memory beside the weights."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.oracle.memory import available_bytes
from exporter.progress import Progress
from exporter.streaming.hidden_states import HiddenStates, StatesInMemory, states_in_file

if TYPE_CHECKING:
    import torch

# Of the memory that is left, activations and the runs' scratch take the other half.
_SHARE = 0.5


@contextlib.contextmanager
def room_for_states(
    folder: Path | None,
    streams: int,
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
    *,
    weights_bytes: int,
    progress: Progress,
) -> Iterator[HiddenStates]:
    """Keeps them in memory where they fit, else in a file.

    Args:
        folder: Where the file is; None: in memory, or in the system's folder for such files.
        streams: How many streams.
        shapes: Of the tensors of each batch.
        dtype: Of all tensors.
        weights_bytes: What the weights will take beside them.
        progress: Told where they are.

    Raises:
        ScoringError: There is no room on the disk.
    """
    nbytes = streams * dtype.itemsize * sum(map(math.prod, shapes))
    free = available_bytes()
    fits = free is None or nbytes <= _SHARE * (free - weights_bytes)
    if folder is None and fits:
        progress.detail(f"hidden states: {nbytes / 1e9:.3g} GB in memory")
        yield StatesInMemory()
        return
    place = folder or Path(tempfile.gettempdir())
    progress.say(f"hidden states: {nbytes / 1e9:.3g} GB in a file in {place}")
    with states_in_file(place, streams, shapes, dtype) as states:
        yield states
