"""How closely the masked oracle looks: fully, or with little memory where a model is large."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from exporter.errors import TooLittleMemoryError
from exporter.processes import available_bytes

_SPARE = 1.2  # a session was seen to take 1.02 to 1.06 times its weights in fp32
_OWN_BYTES = 256 << 20  # ONNX Runtime, the graph, activations
_INLINE_COPIES = 3  # weights inside the ONNX file: ours, the serialised ones, the runtime's
_FP32_BYTES = 4


@dataclass(frozen=True)
class Setting:
    """One of the two settings, and why it was chosen.

    Attributes:
        thrifty: All runs in one case only, the one that tells most (decode for a decoder with a
            cache); the graph is run as it is written, and weights stay in their file, mapped into
            memory, instead of being copied into the kernels' layout.
        reason: Why, for the console and the report; empty at the full setting.
    """

    thrifty: bool
    reason: str = ""


FULL = Setting(thrifty=False)


def choose(model: ir.Model, limit_bytes: int) -> Setting:
    """Chooses how a model is verified.

    At the full setting a session holds all weights in memory, in fp32 even where the file has fp16.
    At the cheaper one it holds one at a time, so that the model may be larger than the memory; then
    each of the three runs reads the weights from disk once. Those in bfloat16 are held in fp32 at
    both, see :mod:`exporter.engines.runners.widening`.

    Args:
        model: The original.
        limit_bytes: The size of the weights up to which the full setting is taken.

    Raises:
        TooLittleMemoryError: Not even the cheaper setting fits into the memory that is free.
    """
    weights = list(_tensors(model))
    total = sum(tensor.nbytes for tensor in weights)
    free = available_bytes()
    if total > limit_bytes:
        reason = f"{_size(total)} of weights, more than the limit of {_size(limit_bytes)}"
    elif free is not None and (needed := _needed_in_full(weights)) > free:
        reason = f"the full check would take {_size(needed)} of memory, {_size(free)} are free"
    else:
        return FULL
    needed = _needed_by_the_thrifty(weights)
    if free is not None and needed > free:
        raise TooLittleMemoryError(
            f"The result can't be verified here: ONNX Runtime would need about {_size(needed)} of "
            f"memory, and {_size(free)} are free. Nothing was written.",
            "Free some memory, use a larger machine, or leave the check out with --verify none; "
            "the report will say so.",
        )
    return Setting(thrifty=True, reason=reason)


def _tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    for graph in (model.graph, *model.graph.subgraphs()):
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value.const_value


def _needed_in_full(weights: list[ir.TensorProtocol]) -> int:
    return _OWN_BYTES + int(_SPARE * sum(map(_in_fp32, weights))) + _held(weights)


def _needed_by_the_thrifty(weights: list[ir.TensorProtocol]) -> int:
    """What is inside the ONNX file, and twice the largest weight that has to become fp32."""
    inline = sum(w.nbytes for w in weights if not isinstance(w, ir.ExternalTensor))
    widened = max((_in_fp32(w) for w in weights if _in_fp32(w) > w.nbytes), default=0)
    return _OWN_BYTES + _INLINE_COPIES * inline + 2 * widened + _held(weights)


def _held(weights: list[ir.TensorProtocol]) -> int:
    """What is handed to ONNX Runtime in another type than the file's, beside its own copies."""
    return sum(_in_fp32(w) for w in weights if w.dtype == ir.DataType.BFLOAT16)


def _in_fp32(tensor: ir.TensorProtocol) -> int:
    """The bytes of a weight where there is no kernel for its own floating-point type."""
    if tensor.dtype.is_floating_point():
        return max(tensor.nbytes, _FP32_BYTES * int(tensor.size))
    return int(tensor.nbytes)


def _size(count: int) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 10**9 else f"{count / 1e6:.3g} MB"
