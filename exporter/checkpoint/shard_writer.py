"""Writes safetensors shards a tensor at a time, so that one tensor is in memory.

Format: https://github.com/huggingface/safetensors (8 bytes length, JSON header, data).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.files import write_text

if TYPE_CHECKING:
    import torch

_ALIGNMENT = 8
_NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
FLOATS = tuple(_NAMES.values())
"""What safetensors calls the types that a cast is for."""


@dataclass(frozen=True)
class Piece:
    """One tensor to be written.

    Attributes:
        name: In the file.
        dtype: As safetensors calls it, such as ``BF16``.
        shape: Of the tensor.
        nbytes: How many bytes it takes.
        read: Gives it, in any floating dtype where ``dtype`` is one.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    read: Callable[[], torch.Tensor]


def safetensors_name(dtype: torch.dtype) -> str:
    """What safetensors calls one of PyTorch's floating types."""
    return _NAMES[str(dtype).removeprefix("torch.")]


def piece_of(name: str, tensor: torch.Tensor) -> Piece:
    """A tensor that is in memory."""
    dtype = safetensors_name(tensor.dtype)
    return Piece(name, dtype, tuple(tensor.shape), tensor.nbytes, lambda: tensor)


def write_shards(
    folder: Path, shards: Sequence[Sequence[Piece]], advance: Callable[[int], None]
) -> None:
    """Writes the shards and, where there are several, their index.

    Args:
        folder: It is there; the caller stages it.
        shards: The tensors of each; empty ones are left out.
        advance: Told how many bytes were written.

    Raises:
        OSError: Something can't be written; a full disk by its number.
    """
    filled = [shard for shard in shards if shard]
    places: dict[str, str] = {}
    for number, shard in enumerate(filled, start=1):
        alone = len(filled) == 1
        name = "model" if alone else f"model-{number:05}-of-{len(filled):05}"
        _write_shard(folder / f"{name}.safetensors", shard, advance)
        places |= {piece.name: f"{name}.safetensors" for piece in shard}
    if len(filled) > 1:
        total = sum(piece.nbytes for shard in filled for piece in shard)
        index = {"metadata": {"total_size": total}, "weight_map": places}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        write_text(folder / "model.safetensors.index.json", text)


def _write_shard(path: Path, pieces: Iterable[Piece], advance: Callable[[int], None]) -> None:
    pieces = list(pieces)
    header = json.dumps(_header(pieces), separators=(",", ":")).encode()
    header += b" " * (-len(header) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for piece in pieces:
            data = _bytes(piece)
            file.write(data)
            advance(len(data))


def _header(pieces: Sequence[Piece]) -> Mapping[str, Any]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for piece in pieces:
        end = begin + piece.nbytes
        offsets = [begin, end]
        header[piece.name] = {
            "dtype": piece.dtype, "shape": list(piece.shape), "data_offsets": offsets,
        }  # fmt: skip
        begin = end
    return header


def _bytes(piece: Piece) -> memoryview:
    import torch

    tensor = piece.read()
    if piece.dtype in FLOATS:
        wanted = next(name for name, told in _NAMES.items() if told == piece.dtype)
        tensor = tensor.to(getattr(torch, wanted))
    data: memoryview = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    if len(data) != piece.nbytes or tensor.numel() != math.prod(piece.shape):
        raise ValueError(f"{piece.name} has {len(data)} bytes, not {piece.nbytes}")
    return data
