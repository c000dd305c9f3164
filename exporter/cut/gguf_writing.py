"""Writes GGUF files: a header, and tensors that are copied or made a piece at a time."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.artifacts.loaded_plan import LoadedPlan
from exporter.cut.gguf_deci import ZERO_WIDTH
from exporter.errors import PlanError
from exporter.models.gguf_header import (
    ALIGNMENT_KEY,
    BLOCK_TYPES,
    DEFAULT_ALIGNMENT,
    MAGIC,
    NUMBERS,
    Entry,
    Tensor,
)
from graph_passes.files.reading import opened
from graph_passes.replacements import array_of
from graph_passes.types import SublayerRef

_PIECE_BYTES = 4 << 20


@dataclass(frozen=True)
class Piece:
    """One tensor to be written."""

    name: str
    shape: tuple[int, ...]
    kind: int
    nbytes: int  # how many bytes it takes
    read: Callable[[], Iterable[bytes]]
    is_new: bool = False

    def renamed(self, name: str) -> Piece:
        """The same under another name."""
        return replace(self, name=name)


def piece_of(tensor: Tensor) -> Piece:
    """A tensor of a file as it is there, byte for byte."""
    return Piece(tensor.name, tensor.shape, tensor.kind, tensor.nbytes, lambda: _bytes_of(tensor))


def made_piece(name: str, shape: tuple[int, ...], kind: int, data: bytes) -> Piece:
    """A tensor that is in memory."""
    return Piece(name, shape, kind, len(data), lambda: (data,), is_new=True)


def _bytes_of(tensor: Tensor) -> Iterator[bytes]:
    with opened(tensor.file, named=True) as file:
        file.seek(tensor.start)
        left = tensor.nbytes
        while left and (data := file.read(min(left, _PIECE_BYTES))):
            left -= len(data)
            yield data


def write_file(
    path: Path,
    version: int,
    entries: Sequence[Entry],
    pieces: Sequence[Piece],
    advance: Callable[[int], None],
) -> None:
    """Writes one file."""
    wholes = (entry.whole for entry in entries if entry.key == ALIGNMENT_KEY)
    alignment = next(wholes, None) or DEFAULT_ALIGNMENT
    with path.open("xb") as file:
        file.write(_header(version, entries, pieces, alignment))
        _pad(file, alignment)
        for piece in pieces:
            start = file.tell()
            for data in piece.read():
                file.write(data)
                advance(len(data))
            if file.tell() - start != piece.nbytes:
                raise ValueError(f"{piece.name} has {file.tell() - start} bytes")
            _pad(file, alignment)


def _pad(file: Any, alignment: int) -> None:
    file.write(b"\0" * (-file.tell() % alignment))


def _header(
    version: int, entries: Sequence[Entry], pieces: Sequence[Piece], alignment: int
) -> bytes:
    parts = [MAGIC, struct.pack("<IQQ", version, len(pieces), len(entries))]
    for entry in entries:
        parts += [_named(entry.key), struct.pack("<I", entry.kind), entry.value]
    offset = 0
    for piece in pieces:
        count = len(piece.shape)
        described = struct.pack(f"<I{count}QIQ", count, *piece.shape, piece.kind, offset)
        parts += [_named(piece.name), described]
        offset += piece.nbytes + -piece.nbytes % alignment
    return b"".join(parts)


def _named(name: str) -> bytes:
    encoded = name.encode()
    return struct.pack("<Q", len(encoded)) + encoded


_HEAL = "Heal the plan for llama.cpp: depthcut heal --for llama.cpp."


def map_piece(name: str, plan: LoadedPlan, ref: SublayerRef, hidden: int) -> Piece:
    """A plan's linear map for a sublayer, as the tensor of a product."""
    given = plan.tensors.get(ref)
    if given is None or given.weight is None:
        raise PlanError(f"The plan has no linear map for {ref}.", _HEAL, code="numbers-missing")
    if np.any(array_of(given.bias)):
        raise PlanError(
            f"The map in place of {ref} has an intercept; llama.cpp takes only maps without one.",
            _HEAL,
            code="replacement-unheld",
        )
    matrix = array_of(given.weight).astype(np.float32)
    if matrix.shape != (hidden, hidden):
        raise PlanError(
            f"The map in place of {ref} has the shape {list(matrix.shape)}; this model takes "
            f"{[hidden, hidden]}.",
            "The plan is for another model: plan and heal this one.",
            code="wrong-shape",
        )
    kind, data = _blocks(matrix, name)
    return made_piece(name, (hidden, hidden), NUMBERS[kind], data)


def zero_mlp(prefix: str, hidden: int) -> list[Piece]:
    """The products of an MLP that adds exactly nothing, beside the norm that the layer keeps."""
    shapes = {
        "gate": (hidden, ZERO_WIDTH),
        "down": (ZERO_WIDTH, hidden),
        "up": (hidden, ZERO_WIDTH),
    }
    zeros, kind = bytes(4 * hidden * ZERO_WIDTH), NUMBERS["F32"]
    return [
        made_piece(f"{prefix}ffn_{part}.weight", shape, kind, zeros)
        for part, shape in shapes.items()
    ]


def _blocks(matrix: NDArray[np.float32], name: str) -> tuple[str, bytes]:
    """A matrix in Q8_0, or where its rows are no whole blocks in F16; and which of them."""
    size = BLOCK_TYPES[NUMBERS["Q8_0"]].block
    in_blocks = matrix.shape[1] % size == 0
    blocks = matrix.reshape(-1, size) if in_blocks else matrix
    scales = np.abs(blocks).max(axis=1, keepdims=True) / 127
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # told below
        halves = (scales if in_blocks else matrix).astype(np.float16)
        steps = np.nan_to_num(np.rint(blocks / scales)).astype(np.int8)
    if not np.isfinite(halves).all():
        raise PlanError(
            f"{name} holds numbers that are not finite, or too large for float16.",
            "Fit it again.",
            code="not-finite",
        )
    if not in_blocks:
        return "F16", halves.tobytes()
    return "Q8_0", np.hstack([halves.view(np.uint8), steps.view(np.uint8)]).tobytes()
