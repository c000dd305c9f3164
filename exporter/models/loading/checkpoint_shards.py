"""A checkpoint's safetensors files: what is in them, read a tensor at a time."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import CancelledError
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from exporter.errors import ModelSourceError, UnsafeModelError, first_line, is_out_of_memory
from exporter.processes import available_bytes
from graph_passes.files.reading import TABLE_BYTES, opened, parse_json, read_json

if TYPE_CHECKING:
    import torch

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_LENGTH_BYTES = 8
_TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64",
    "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "U16": "uint16", "U32": "uint32",
    "U64": "uint64", "C64": "complex64",
}  # fmt: skip
_PIECE_BYTES = 16 << 20
_AGAIN = "Fetch the model again."


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

        dtype = getattr(torch, _TORCH_NAMES.get(self.dtype, "-"), None)
        if not isinstance(dtype, torch.dtype):
            raise ModelSourceError(f"{self.file} holds the type {self.dtype}, which is not known.")
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
        index = folder / _INDEX
        if (folder / _SINGLE).is_file():
            return cls(folder, read_header(folder / _SINGLE))
        if not index.is_file():
            raise ModelSourceError(
                f"{folder} holds neither {_SINGLE} nor {_INDEX}.",
                "Is it the folder of a Hugging Face model with its weights?",
                code="no-weights",
            )
        places = read_index(index)
        shards = {name: read_header(index.parent / name) for name in sorted(set(places.values()))}
        return cls(folder, _agreed(index, places, shards))

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
        entry = self.entries[name]
        dtype = entry.torch_dtype
        raw = _memory_for(entry, name)
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
        pieces = (bytearray(min(_PIECE_BYTES, one.nbytes)) for _ in range(2))
        buffers = [memoryview(piece) for piece in pieces]
        for start in range(0, one.nbytes, _PIECE_BYTES):
            size = min(_PIECE_BYTES, one.nbytes - start)
            for buffer, entry, name in zip(buffers, (one, other), (first, second), strict=True):
                _fill(buffer[:size], entry, name, start)
            if buffers[0][:size] != buffers[1][:size]:
                return False
        return True


def _memory_for(entry: TensorEntry, name: str) -> torch.Tensor:
    import torch

    free = available_bytes()
    try:
        if free is not None and entry.nbytes > free:
            raise MemoryError
        return torch.empty(entry.nbytes, dtype=torch.uint8)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ModelSourceError(
            f"{entry.file}: {name} takes {entry.nbytes / 1e9:.3g} GB, and so much isn't free.",
            "Take a machine with more memory; a single tensor must fit.",
            code="too-little-memory",
        ) from error


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
        raise ModelSourceError(
            f"{entry.file} can't be read: {first_line(error)}.", code="unreadable"
        ) from error
    if rest:
        raise ModelSourceError(
            f"{entry.file} ends inside {name}: it has become shorter since it was opened.",
            _AGAIN,
            code="file-shrank",
        )


def read_index(index: Path) -> dict[str, str]:
    """From each tensor's name to its shard's, as an index has it."""
    try:
        places = _names(read_json(index, limit=TABLE_BYTES)["weight_map"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelSourceError(
            f"{index} can't be read: {first_line(error)}.", _AGAIN, code="unreadable"
        ) from error
    for name in sorted(set(places.values())):
        if Path(name).name != name:
            raise UnsafeModelError(
                f"{index} points outside the model's folder: {name}.", _AGAIN, code="outside-folder"
            )
        if not (index.parent / name).is_file():
            raise ModelSourceError(
                f"{index} names {name}, which is not there.", _AGAIN, code="shard-missing"
            )
    return places


def _names(places: Any) -> dict[str, str]:
    if isinstance(places, dict) and all(isinstance(name, str) for name in places.values()):
        return places
    raise ValueError("its weight_map does not give a file's name for each tensor")


def _agreed(
    index: Path, places: Mapping[str, str], shards: Mapping[str, Mapping[str, TensorEntry]]
) -> dict[str, TensorEntry]:
    """All entries, each of one shard, and where the index says."""
    entries: dict[str, TensorEntry] = {}
    for header in shards.values():
        for name, entry in header.items():
            if name in entries:
                raise ModelSourceError(
                    f"{entry.file} holds {name}, and so does {entries[name].file.name}.",
                    _AGAIN,
                    code="held-twice",
                )
            entries[name] = entry
    for name, shard in places.items():
        result = entries.get(name)
        if result is None or result.file.name != shard:
            where = "no shard" if result is None else result.file.name
            raise ModelSourceError(
                f"{index} says that {name} is in {shard}, but {where} holds it.",
                _AGAIN,
                code="not-in-shard",
            )
    return entries


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
    except OSError as error:
        raise ModelSourceError(
            f"{file} can't be read: {first_line(error)}.", code="unreadable"
        ) from error
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelSourceError(
            f"{file} is cut short or no whole safetensors file: {first_line(error)}.",
            _AGAIN,
            code="broken-header",
        ) from error
