"""A checkpoint's safetensors files: what is in them, read a tensor at a time."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import CancelledError
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from exporter.errors import ModelSourceError, UnsafeModelError, first_line
from exporter.processes import available_bytes
from graph_passes.files.reading import TABLE_BYTES, opened, parse_json, read_json

if TYPE_CHECKING:
    import torch

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_LENGTH_BYTES = 8
TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64",
    "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "U16": "uint16", "U32": "uint32",
    "U64": "uint64", "C64": "complex64",
}  # fmt: skip
"""By what safetensors calls a type, what PyTorch does."""
_PIECE_BYTES = 16 << 20
AGAIN = "Fetch the model again, or correct its config."


def unreadable(what: object) -> ModelSourceError:
    """The error of a model whose files are cut short, contradict each other, or can't be opened."""
    return ModelSourceError(f"{what}.", AGAIN, code="unreadable")


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int  # its first byte, from the file's beginning
    end: int  # behind its last byte

    @property
    def nbytes(self) -> int:
        """How many bytes the tensor takes."""
        return self.end - self.begin

    @property
    def torch_dtype(self) -> torch.dtype:
        """PyTorch's name for the dtype."""
        import torch

        dtype = getattr(torch, TORCH_NAMES.get(self.dtype, "-"), None)
        if not isinstance(dtype, torch.dtype):
            raise unreadable(f"{self.file} holds the type {self.dtype}, which is not known")
        return dtype


class CheckpointShards:
    """The tensors of a checkpoint, by name; made by :meth:`open`. Threads may share it."""

    def __init__(self, folder: Path, entries: Mapping[str, TensorEntry]) -> None:
        self.folder, self.entries = folder, entries
        self._bytes_read = 0
        self._lock = threading.Lock()

    @classmethod
    def open(cls, folder: Path) -> CheckpointShards:
        """Reads the headers of ``model.safetensors``, or of what its index names."""
        if (folder / _SINGLE).is_file():
            return cls(folder, read_header(folder / _SINGLE))
        index = folder / _INDEX
        if not index.is_file():
            raise ModelSourceError(
                f"{folder} holds neither {_SINGLE} nor {_INDEX}.",
                "Is it the folder of a Hugging Face model with its weights?",
                code="no-model",
            )
        places, entries = read_index(index), dict[str, TensorEntry]()
        for shard in sorted(set(places.values())):
            header = read_header(folder / shard)
            named = {name for name, place in places.items() if place == shard}
            for name in sorted(header.keys() & entries.keys()):
                raise unreadable(f"{folder / shard} holds {name} of {entries[name].file.name}")
            for name in sorted(named - header.keys()):
                raise unreadable(f"{index} says that {name} is in {shard}, which lacks it")
            entries |= header
        return cls(folder, entries)

    @property
    def nbytes(self) -> int:
        """The size of all tensors, in bytes."""
        return sum(entry.nbytes for entry in self.entries.values())

    @property
    def bytes_read(self) -> int:
        """How many bytes of tensors were read so far; a tensor that is read twice counts twice."""
        return self._bytes_read

    def read(self, name: str, stop: threading.Event | None = None) -> torch.Tensor:
        """Reads one tensor into memory of its own, as aligned as PyTorch's own."""
        import torch

        entry = self.entries[name]
        dtype, free = entry.torch_dtype, available_bytes()
        if free is not None and entry.nbytes > free:
            raise ModelSourceError(
                f"{entry.file}: {name} takes {entry.nbytes / 1e9:.3g} GB, and so much isn't free.",
                "Take a machine with more memory; a single tensor must fit.",
                code="too-little-memory",
            )
        raw = torch.empty(entry.nbytes, dtype=torch.uint8)
        if entry.nbytes:
            _fill(raw.numpy(), entry, name, stop=stop)
        with self._lock:
            self._bytes_read += entry.nbytes
        return raw.view(dtype).reshape(entry.shape)

    def same(self, first: str, second: str) -> bool:
        """Whether two tensors hold the same bytes; reads them in pieces."""
        one, other = self.entries[first], self.entries[second]
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return False
        for start in range(0, one.nbytes, _PIECE_BYTES):
            pieces = [bytearray(min(_PIECE_BYTES, one.nbytes - start)) for _ in range(2)]
            _fill(pieces[0], one, first, start)
            _fill(pieces[1], other, second, start)
            if pieces[0] != pieces[1]:
                return False
        return True


def _fill(
    buffer: Any, entry: TensorEntry, name: str, start: int = 0, stop: threading.Event | None = None
) -> None:
    try:
        with opened(entry.file, buffered=False) as file:
            file.seek(entry.begin + start)
            rest = memoryview(buffer)
            while rest:
                if stop is not None and stop.is_set():
                    raise CancelledError
                count = file.readinto(rest[:_PIECE_BYTES])  # a read can't be interrupted
                if not count:
                    break
                rest = rest[count:]
    except OSError as error:
        raise unreadable(f"{entry.file} can't be read: {first_line(error)}") from error
    if rest:
        raise unreadable(f"{entry.file} ends inside {name}: it is shorter than it was")


def read_index(index: Path) -> dict[str, str]:
    """From each tensor's name to its shard's, as an index has it."""
    try:
        places = read_json(index, limit=TABLE_BYTES)["weight_map"]
        names = sorted(set(places.values()))
        outside = [name for name in names if Path(name).name != name]
        gone = [name for name in names if not (index.parent / name).is_file()]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        text = f"{index} can't be read, or its weight_map names no file for a tensor"
        raise unreadable(f"{text}: {first_line(error)}") from error
    if outside:
        raise UnsafeModelError(
            f"{index} points outside the model's folder: {outside[0]}.",
            AGAIN,
            code="outside-folder",
        )
    if gone:
        raise unreadable(f"{index} names {gone[0]}, which is not there")
    return dict(places)


def read_header(file: Path) -> dict[str, TensorEntry]:
    """Where each tensor of one file lies; the library holds the header against the file."""
    try:
        with opened(file) as stream:
            with safe_open(file, "np"):
                length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
            if length > TABLE_BYTES:  # another file was put there since
                raise ValueError(f"its header has {length:,} bytes")
            header: dict[str, Any] = parse_json(stream.read(length), str(file))
        start = _LENGTH_BYTES + length
        return {
            name: TensorEntry(
                file,
                value["dtype"],
                tuple(value["shape"]),
                *(start + n for n in value["data_offsets"]),
            )
            for name, value in header.items()
            if name != "__metadata__"
        }
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        text = f"{file} is cut short or no whole safetensors file"
        raise unreadable(f"{text}: {first_line(error)}") from error
