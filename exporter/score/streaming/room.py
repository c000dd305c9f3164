"""Whether the hidden states fit into memory beside the weights."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.cut.oracle.memory import available_bytes
from exporter.errors import ScoringError
from exporter.progress import Progress
from exporter.score.streaming.hidden_states import HiddenStates, StatesInMemory, states_in_file

if TYPE_CHECKING:
    import torch

# Of the memory that is left, activations and the runs' scratch take the other half.
_SHARE = 0.5
_LASTING = Path("/var/tmp")  # noqa: S108 - the file there has no name
_MOUNTS = Path("/proc/self/mountinfo")


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
        folder: Where the file is; None: in memory, or in the system's folder for such files; in
            ``/var/tmp`` where that one is memory, too.
        streams: How many streams.
        shapes: Of the tensors of each batch.
        dtype: Of all tensors.
        weights_bytes: What the weights will take beside them.
        progress: Told where they are.

    Raises:
        ScoringError: There is no room on the disk, or no folder that is on one.
    """
    nbytes = streams * dtype.itemsize * sum(map(math.prod, shapes))
    free = available_bytes()
    fits = free is None or nbytes <= _SHARE * (free - weights_bytes)
    if folder is None and fits:
        progress.detail(f"hidden states: {nbytes / 1e9:.3g} GB in memory")
        yield StatesInMemory()
        return
    place = folder or _folder_on_disk()
    progress.say(f"hidden states: {nbytes / 1e9:.3g} GB in a file in {place}")
    with states_in_file(place, streams, shapes, dtype) as states:
        yield states


def _folder_on_disk() -> Path:
    usual = Path(tempfile.gettempdir())
    for folder in (usual, _LASTING):
        if folder.is_dir() and os.access(folder, os.W_OK) and not _is_memory(folder):
            return folder
    raise ScoringError(
        f"The hidden states don't fit into memory, and {usual} is kept in memory as well.",
        "Name a folder on a disk with --stream-dir.",
    )


def _is_memory(folder: Path) -> bool:
    """Whether what is written there takes memory (tmpfs), as far as the system tells."""
    number = folder.stat().st_dev
    device = f"{os.major(number)}:{os.minor(number)}"
    try:
        mounts = [line.split() for line in _MOUNTS.read_text(encoding="utf-8").splitlines()]
    except OSError:  # not Linux
        return False
    kinds = {mount[mount.index("-") + 1] for mount in mounts if mount[2] == device}
    return bool(kinds & {"tmpfs", "ramfs"})
