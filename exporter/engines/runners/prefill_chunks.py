"""A long prompt in chunks, each run on the cache that those before it have filled.

GroupQueryAttention of ONNX Runtime writes new keys and values behind what its buffer holds, so a
prompt may come in parts. What passes between the operators is then small enough for the processor's
caches and takes a fraction of the memory; and where the kernel computes what the causal mask hides,
as that of older versions does, most of that is left out. The answer is the same.

It takes several tokens on a past for one row alone, so a batch runs whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from exporter.engines.runners.base import Array
from exporter.engines.runners.cache_form import CacheForm
from exporter.engines.runners.left_padding import ALONG_TOKENS, IDS, MASK
from exporter.engines.tensors import TensorSpec

CHUNK_TOKENS = 256
"""The fewest tokens of a chunk."""


def chunk_tokens(specs: Sequence[TensorSpec], form: CacheForm) -> int:
    """The fewest tokens of a chunk of a graph's prompts; 0 where they have to run whole.

    Args:
        specs: The graph's inputs.
        form: Of its caches. All of them have to lie in one buffer as past and present, and each
            attention has to count its mask; a window that is kept alone is overwritten too early.
    """
    known = {MASK, *ALONG_TOKENS, *form.shared}
    fits = form.sums_mask and not form.windows and {spec.name for spec in specs} <= known
    return CHUNK_TOKENS if fits else 0


def chunks(new: int, least: int) -> list[slice]:
    """Where a prompt is cut: into as many equal parts as have so many tokens.

    Args:
        new: The prompt's tokens.
        least: Tokens of a chunk; 0 leaves it whole.
    """
    count = max(1, new // least) if least else 1
    ends = [new * number // count for number in range(count + 1)]
    return [slice(*span) for span in pairwise(ends)]


def in_chunks(inputs: Mapping[str, Array], least: int) -> list[dict[str, Array]]:
    """The calls that do what one call does; only the last one's logits are the call's.

    Args:
        inputs: A call's, its caches with room for all of it. They are handed on as they are, so
            that the calls share them.
        least: See :func:`chunks`.
    """
    whole = [dict(inputs)]
    if not least or IDS not in inputs or MASK not in inputs:
        return whole
    (batch, new), mask = inputs[IDS].shape, inputs[MASK]
    if batch > 1 or not np.all(mask):
        return whole
    past = mask.shape[1] - new
    return [
        {**inputs, **_along_tokens(inputs, span), MASK: mask[:, : past + span.stop]}
        for span in chunks(new, least)
    ]


def _along_tokens(inputs: Mapping[str, Array], span: slice) -> dict[str, Array]:
    return {name: inputs[name][:, span] for name in ALONG_TOKENS if name in inputs}
