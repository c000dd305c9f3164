"""The residual stream of all batches between two layers, in memory or in a file.

The file has no name, so it is gone with the process, whatever ends it. Its space is reserved at the
start: a disk that is too small is told before hours of work, not after. It is written and read by
calls and not mapped, since a mapped file on a disk that fails or fills up kills the process.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from exporter.errors import FULL_DISK, ScoringError, first_line
from exporter.processes import available_bytes
from exporter.progress import Progress

if TYPE_CHECKING:
    import torch

# Of the memory that is left, activations and the runs' scratch take the other half.
_SHARE = 0.5
_LASTING = Path("/var/tmp")  # noqa: S108 - the file there has no name
_MOUNTS = Path("/proc/self/mountinfo")
# File systems that can't reserve; a full disk then shows while it is written.
_CANT_RESERVE = frozenset({errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS})


class StatesInMemory:
    """Keeps a tensor for each stream and batch."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, int], torch.Tensor] = {}

    def put(self, stream: int, batch: int, tensor: torch.Tensor) -> None:
        """Keeps a tensor, in the place of the last one of this stream and batch."""
        self._kept[stream, batch] = tensor

    def get(self, stream: int, batch: int) -> torch.Tensor:
        """The tensor that was kept; the caller does not change it."""
        return self._kept[stream, batch]


class StatesInFile:
    """Keeps the same in a file; made by :func:`states_in_file`."""

    def __init__(
        self,
        file: IO[bytes],
        folder: Path,
        shapes: Sequence[tuple[int, ...]],
        dtype: torch.dtype,
    ) -> None:
        import torch

        self._file, self._folder = file, folder
        self._shapes, self._dtype = [torch.Size(shape) for shape in shapes], dtype
        self._sizes = [shape.numel() * dtype.itemsize for shape in self._shapes]
        self._begins = list(itertools.accumulate(self._sizes, initial=0))

    @property
    def stream_bytes(self) -> int:
        """What one stream takes, over all batches."""
        return self._begins[-1]

    def put(self, stream: int, batch: int, tensor: torch.Tensor) -> None:
        """Writes a tensor.

        Raises:
            ScoringError: The disk is full, or fails.
        """
        assert tensor.shape == self._shapes[batch], "a layer keeps the shape of the stream"
        self._transfer(os.pwrite, stream, batch, tensor)

    def get(self, stream: int, batch: int) -> torch.Tensor:
        """Reads a tensor.

        Raises:
            ScoringError: The disk fails.
        """
        import torch

        tensor = torch.empty(self._shapes[batch], dtype=self._dtype)
        self._transfer(
            lambda file, rest, position: os.preadv(file, [rest], position), stream, batch, tensor
        )
        return tensor

    def _transfer(
        self,
        call: Callable[[int, memoryview[Any], int], int],
        stream: int,
        batch: int,
        tensor: torch.Tensor,
    ) -> None:
        """Moves a tensor's bytes, however many of them a call takes."""
        rest, position = _bytes_of(tensor), stream * self.stream_bytes + self._begins[batch]
        try:
            while rest:
                count = call(self._file.fileno(), rest, position)
                if not count:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                rest, position = rest[count:], position + count
        except OSError as error:
            raise _told(error, self._folder, self._sizes[batch]) from error


HiddenStates = StatesInMemory | StatesInFile


@contextlib.contextmanager
def states_in_file(
    folder: Path, streams: int, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype
) -> Iterator[StatesInFile]:
    """A file with room for all tensors, which is gone after the block.

    Args:
        folder: Where; made if it is not there, and then removed again.
        streams: How many streams.
        shapes: Of the tensors of each batch.
        dtype: Of all tensors.

    Raises:
        ScoringError: There is no room, or no such folder can be.
    """
    with _made(folder), _nameless(folder) as file:
        states = StatesInFile(file, folder, shapes, dtype)
        _reserve(file, folder, streams * states.stream_bytes)
        yield states


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[None]:
    """A folder that is there; what was made of it goes again, unless something else is in it."""
    new: list[Path] = []
    try:
        try:
            new += [each for each in (folder, *folder.parents) if not each.exists()]
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _told(error, folder, 0) from error
        yield
    finally:
        for each in new:
            with contextlib.suppress(OSError):
                each.rmdir()


def _nameless(folder: Path) -> IO[bytes]:
    try:
        return tempfile.TemporaryFile(dir=folder, prefix=".depthcut-stream-")
    except OSError as error:
        raise _told(error, folder, 0) from error


def _reserve(file: IO[bytes], folder: Path, nbytes: int) -> None:
    if shutil.disk_usage(folder).free < nbytes:
        raise _no_room(folder, nbytes)
    if not nbytes or not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(file.fileno(), 0, nbytes)
    except OSError as error:
        if error.errno not in _CANT_RESERVE:
            raise _told(error, folder, nbytes) from error


def _told(error: OSError, folder: Path, nbytes: int) -> ScoringError:
    if error.errno in FULL_DISK:
        return _no_room(folder, nbytes)
    return ScoringError(
        f"The hidden states can't be kept in {folder}: {first_line(error)}.",
        "Name another folder with --stream-dir or the variable TMPDIR.",
        code="not-kept",
    )


def _no_room(folder: Path, nbytes: int) -> ScoringError:
    return ScoringError(
        f"The disk of {folder} has no room for {nbytes / 1e9:.3g} GB of hidden states.",
        "Name a folder on another disk with --stream-dir or the variable TMPDIR, or take fewer "
        "--samples.",
        code="no-room",
    )


def _bytes_of(tensor: torch.Tensor) -> memoryview[Any]:
    """The tensor's memory; of a copy where it does not lie in one piece."""
    import torch

    array: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


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
        "Name a folder on a disk with --stream-dir or the variable TMPDIR.",
        code="kept-in-memory",
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
