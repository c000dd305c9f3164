"""Weights that take long to write: what stands of them after an interruption."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import onnx_ir as ir

from graph_passes.files.exchange import Identity, identity, sync_names
from graph_passes.files.weight_file import WeightWriter

_NOTE = "written.json"
_NOTE_EVERY_BYTES = 256 << 20


class Unfinished:
    """A data file that a later run goes on with."""

    def __init__(self, folder: Path, made_from: str) -> None:
        self.folder = folder
        self._made_from = made_from
        self._finished: Identity | None = None
        self._name = ""

    @contextlib.contextmanager
    def until_done(self, folder: Path) -> Iterator[None]:
        """Keeps the finished file, too, when what comes after it in the block fails."""
        try:
            yield
        except BaseException:
            self._take_back(folder)
            raise
        self.clear()

    def _take_back(self, folder: Path) -> None:
        for place in folder.glob("*") if self._finished is not None else ():
            if identity(place) == self._finished:
                with contextlib.suppress(OSError):
                    self.folder.mkdir(parents=True, exist_ok=True)
                    place.replace(self.folder / self._name)

    @property
    def bytes_on_disk(self) -> int:
        """What an earlier run has left, whether it can be gone on with or not."""
        return sum(path.stat().st_size for path in self.folder.glob("*"))

    @contextlib.contextmanager
    def writer(
        self,
        target: Path,
        tensors: Sequence[ir.TensorProtocol],
        told: Callable[[int], None] | None = None,
    ) -> Iterator[WeightWriter]:
        """Gives a writer that begins where an earlier run of the same weights ended.

        When the block ends well the file goes to ``target``. After an error of the disk nothing is
        left; after any other, Ctrl-C included, what was written stays for the next run.
        """
        key = _fingerprint(self._made_from, tensors)
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / target.name
        try:
            with _NotingWriter(file, self.folder / _NOTE, key, told) as writer:
                yield writer
            self._finished, self._name = identity(file), target.name
            file.replace(target)
        except OSError:
            self.clear()
            raise

    def clear(self) -> None:
        """Removes what is left of it."""
        for path in self.folder.glob("*"):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()


class _NotingWriter(WeightWriter):
    """Notes now and then, and at the end, how far it is."""

    def __init__(
        self, path: Path, note: Path, key: str, told: Callable[[int], None] | None
    ) -> None:
        self._note, self._key = note, key
        self._noted = _left(path, note, key)
        if not self._noted:
            _forget(note)  # else it would speak of what is written now
        super().__init__(path, told=told, start=self._noted)

    def __exit__(self, *exc_info: object) -> None:
        """Notes what is whole, whatever happened."""
        try:
            self._note_down(least=1)
        finally:
            super().__exit__(None, None, None)

    def _append(self, tensor: ir.TensorProtocol) -> int:
        offset = super()._append(tensor)
        self._note_down(least=_NOTE_EVERY_BYTES)
        return offset

    def _note_down(self, least: int) -> None:
        if self.size - self._noted < least:
            return
        self.sync()
        part = self._note.with_suffix(".part")
        part.write_text(json.dumps({"key": self._key, "bytes": self.size}), encoding="utf-8")
        part.replace(self._note)
        self._noted = self.size


def _forget(note: Path) -> None:
    """Removes a note for good, before the bytes that it speaks of are written over."""
    if not note.exists():
        return
    note.unlink()
    sync_names(note.parent)


def _left(file: Path, note: Path, key: str) -> int:
    """How many bytes an earlier run has left that are the beginning of these weights."""
    try:
        told = json.loads(note.read_text(encoding="utf-8"))
        count = int(told["bytes"]) if told["key"] == key else 0
        return count if 0 <= count <= file.stat().st_size else 0
    except (OSError, ValueError, TypeError, KeyError):
        return 0


def _fingerprint(made_from: str, tensors: Iterable[ir.TensorProtocol]) -> str:
    """Of which weights, in which order: where each stands follows from that.

    Those in memory are taken with their content. That of the others follows from their names.
    """
    total = hashlib.sha256(made_from.encode())
    for tensor in tensors:
        shape = [int(size) for size in tensor.shape.numpy()]
        total.update(f"{tensor.name}\0{tensor.dtype.name}\0{shape}\n".encode())
        if isinstance(tensor, ir.ExternalTensor):
            total.update(f"{tensor.location}\0{tensor.offset}\n".encode())
        elif not isinstance(tensor, ir.LazyTensor | ir.StringTensor):
            total.update(tensor.tobytes())
    return total.hexdigest()
