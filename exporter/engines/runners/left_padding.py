"""Padded rows for an attention that takes each row's length from the sum of its mask.

GroupQueryAttention of ONNX Runtime is told how many positions of each row are filled, not which:
it takes the first ones, and goes on behind them. Padding on the left, or in the midst, it would
take for tokens. So each row's real tokens, and what its cache holds of them, are moved to the
front, the mask is told as so many ones, and the results are moved back. Attention looks back only,
so what then stands behind a row's own tokens changes none of them.

It also takes several new tokens on a filled cache for one row alone; such rows run one by one.
Source: ``group_query_attention_helper.h`` of microsoft/onnxruntime, version 1.32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.engines.runners.base import Array
from exporter.errors import BackendError

IDS, MASK = "input_ids", "attention_mask"
ALONG_TOKENS = (IDS, "position_ids", "token_type_ids")
"""Inputs ``[batch, new]``."""

_CACHE_AXIS = 2

Run = Callable[[Mapping[str, Array], Sequence[str]], dict[str, Array]]


def needs_packing(inputs: Mapping[str, Array]) -> bool:
    """Whether such an attention would misread a call, or refuse it.

    Args:
        inputs: A call's; ``input_ids`` ``[batch, new]``, ``attention_mask`` ``[batch, total]``.
    """
    if IDS not in inputs or MASK not in inputs:
        return False
    (batch, new), total = inputs[IDS].shape, inputs[MASK].shape[1]
    return (batch > 1 and 1 < new < total) or not np.all(inputs[MASK])


def padded_before(inputs: Mapping[str, Array]) -> bool:
    """Whether padding stands before a row's tokens, or among them."""
    if MASK not in inputs:
        return False
    told = inputs[MASK].astype(bool)
    return bool(np.any(told[:, 1:] & ~told[:, :-1]))


def run_packed(
    run: Run, inputs: Mapping[str, Array], outputs: Sequence[str], caches: Mapping[str, str]
) -> dict[str, Array]:
    """Runs a call whose rows are padded in any way.

    Args:
        run: Runs the graph on rows without padding before their tokens.
        inputs: The call's, as for a graph that reads the whole mask.
        outputs: What is wanted.
        caches: By cache input, ``[batch, heads, past, size]``, the output that continues it.

    Returns:
        The outputs, each value where its token stands in the call; the caches are 0 where the mask
        is 0, and other outputs hold anything there.

    Raises:
        BackendError: The run fails, or mask, tokens and caches don't fit together.
    """
    (batch, new), total = inputs[IDS].shape, inputs[MASK].shape[1]
    if any(inputs[past].shape[_CACHE_AXIS] != total - new for past in caches if past in inputs):
        raise BackendError(
            f"The attention mask has {total} positions; the caches and {new} new tokens make "
            "another number.",
            code="wrong-mask-length",
        )
    alone = 1 < new < total
    groups = [slice(row, row + 1) for row in range(batch)] if alone else [slice(0, batch)]
    found = []
    for rows in groups:
        part = {name: array[rows] if array.ndim else array for name, array in inputs.items()}
        order = _Packing.of(part[MASK], new)
        answer = run(order.packed(part, caches), outputs)
        found.append(order.restored(answer, set(caches.values())))
    return {name: np.concatenate([part[name] for part in found]) for name in outputs}


def packed(inputs: Mapping[str, Array], caches: Mapping[str, str]) -> dict[str, Array]:
    """A call with each row's real positions in front, whose results stay where they come."""
    return _Packing.of(inputs[MASK], inputs[IDS].shape[1]).packed(inputs, caches)


@dataclass(frozen=True)
class _Packing:
    """Which position of a call goes where.

    Attributes:
        past: Of the cache's positions, the real ones first, ``[batch, past]``.
        new: The same of the new tokens, ``[batch, new]``.
        filled: How much of each row's past is real, ``[batch]``.
        real: The mask, ``[batch, past + new]``.
    """

    past: NDArray[np.intp]
    new: NDArray[np.intp]
    filled: NDArray[np.intp]
    real: NDArray[np.bool_]

    @classmethod
    def of(cls, mask: Array, new: int) -> _Packing:
        real = mask.astype(bool)
        past = real[:, : real.shape[1] - new]
        return cls(_front(past), _front(real[:, -new:]), past.sum(axis=1), real)

    def packed(self, inputs: Mapping[str, Array], caches: Mapping[str, str]) -> dict[str, Array]:
        """The same call with each row's real positions in front."""
        mask = inputs[MASK]
        told = np.arange(mask.shape[1]) < (self.filled + self.new.shape[1])[:, None]
        found: dict[str, Array] = {**inputs, MASK: told.astype(mask.dtype)}
        for name in ALONG_TOKENS:
            if name in inputs:
                found[name] = np.take_along_axis(inputs[name], self.new, axis=1)
        for name in caches:
            if name in inputs:
                found[name] = np.take_along_axis(inputs[name], _along_cache(self.past), _CACHE_AXIS)
        return found

    def restored(self, outputs: Mapping[str, Array], caches: set[str]) -> dict[str, Array]:
        """The outputs of such a call with each position back in its place."""
        return {
            name: self._cache(array) if name in caches else self._tokens(array)
            for name, array in outputs.items()
        }

    def _tokens(self, array: Array) -> Array:
        if array.ndim < 2 or array.shape[1] != self.new.shape[1]:
            return array
        back = np.argsort(self.new, axis=1)
        return np.take_along_axis(array, back.reshape(*back.shape, *[1] * (array.ndim - 2)), 1)

    def _cache(self, array: Array) -> Array:
        length = self.past.shape[1]
        back: NDArray[Any] = np.empty(self.real.shape, np.intp)
        for row, filled in enumerate(self.filled):
            here = [*self.past[row, :filled], *(length + self.new[row]), *self.past[row, filled:]]
            back[row, here] = np.arange(len(here))
        moved = np.take_along_axis(array, _along_cache(back), _CACHE_AXIS)
        return np.where(self.real[:, None, :, None], moved, np.zeros((), array.dtype))


def _front(real: NDArray[np.bool_]) -> NDArray[np.intp]:
    """The order in which real positions come first, otherwise as they are."""
    return np.argsort(~real, axis=1, kind="stable")


def _along_cache(order: NDArray[np.intp]) -> NDArray[np.intp]:
    return order[:, None, :, None]
