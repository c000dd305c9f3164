"""Linear maps in place of attentions, and MLPs of zeros, as tensors of a GGUF file."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from exporter.artifacts.plans.loaded import LoadedPlan
from exporter.cut.gguf.deci import ZERO_WIDTH
from exporter.cut.gguf.writing import Piece, made_piece
from exporter.errors import PlanError, SurgeryError
from exporter.models.gguf.block_types import BLOCK_TYPES, NUMBERS
from exporter.optional import require
from graph_passes.replacements import ReplacementTensors, array_of
from graph_passes.types import SublayerRef

MapType = Literal["F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"]
"""The types that a map can be written in; the quantised ones by the package gguf."""

_FLOATS = {"F32": np.float32, "F16": np.float16}
_HEAL = "Heal the plan for llama.cpp: depthcut heal --for llama.cpp."


def map_piece(name: str, plan: LoadedPlan, ref: SublayerRef, hidden: int, kind: MapType) -> Piece:
    """A plan's linear map for a sublayer, as the tensor of a product.

    Args:
        name: The tensor's.
        plan: The plan.
        ref: The sublayer.
        hidden: The width of the residual stream.
        kind: In which type it is written.
    """
    given = plan.tensors.get(ref)
    if given is None or not given.maps:
        raise PlanError(f"The plan has no linear map for {ref}.", _HEAL, code="numbers-missing")
    if np.any(array_of(given.bias)):
        raise PlanError(
            f"The map in place of {ref} has an intercept; llama.cpp takes only maps without one.",
            _HEAL,
            code="intercept",
        )
    data = _blocks(_matrix(given, ref, hidden), kind, name)
    return made_piece(name, (hidden, hidden), NUMBERS[kind], data)


def zero_piece(name: str, shape: tuple[int, int]) -> Piece:
    """Zeros in float32."""
    return made_piece(name, shape, NUMBERS["F32"], bytes(4 * shape[0] * shape[1]))


def zero_mlp(prefix: str, hidden: int) -> list[Piece]:
    """The products of an MLP that adds exactly nothing, beside the norm that the layer keeps."""
    return [
        zero_piece(f"{prefix}ffn_gate.weight", (hidden, ZERO_WIDTH)),
        zero_piece(f"{prefix}ffn_down.weight", (ZERO_WIDTH, hidden)),
        zero_piece(f"{prefix}ffn_up.weight", (hidden, ZERO_WIDTH)),
    ]


def _matrix(given: ReplacementTensors, ref: SublayerRef, hidden: int) -> NDArray[np.float32]:
    """``[hidden_out, hidden_in]``; factors of a map of low rank are multiplied out."""
    maps = [array_of(each).astype(np.float32) for each in given.maps.values()]
    inner = maps[0].shape[0]
    wanted = [(hidden, hidden)] if len(maps) == 1 else [(inner, hidden), (hidden, inner)]
    if [each.shape for each in maps] != wanted:
        raise PlanError(
            f"The map in place of {ref} has the shape {[list(each.shape) for each in maps]}; this "
            f"model takes {[list(each) for each in wanted]}.",
            "The plan is for another model: plan and heal this one.",
            code="wrong-shape",
        )
    return maps[0] if len(maps) == 1 else maps[1] @ maps[0]


def _blocks(matrix: NDArray[np.float32], kind: MapType, name: str) -> bytes:
    block = BLOCK_TYPES[NUMBERS[kind]].block
    if matrix.shape[1] % block:
        raise SurgeryError(
            f"{name} has rows of {matrix.shape[1]} numbers, no multiple of {kind}'s {block}.",
            "Write the maps in another type: --map-type F16.",
            code="rows-unblocked",
        )
    if kind in _FLOATS:
        with np.errstate(over="ignore"):  # told below
            data: NDArray[Any] = matrix.astype(_FLOATS[kind])
    else:
        gguf = require("gguf", extra="gguf")
        data = gguf.quants.quantize(matrix, gguf.GGMLQuantizationType[kind])
    if not np.isfinite(matrix).all() or (kind == "F16" and not np.isfinite(data).all()):
        raise PlanError(
            f"{name} holds numbers that are not finite in {kind}.", "Fit it again.",
            code="not-finite",
        )  # fmt: skip
    return np.ascontiguousarray(data).tobytes()
