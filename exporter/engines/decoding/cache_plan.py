"""What a decoder on engines needs and allows, reckoned from the engines' records alone."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import numpy as np

from exporter.engines.build.engine_set import EngineSet, Slot, no_phase
from exporter.engines.build.profiles import Span
from exporter.engines.build.sidecar import EngineTensor
from exporter.engines.decoding.decoder import IDS, LOGITS, MASK, POSITIONS, cache_pairs, no_decoder
from exporter.engines.tensors import ALIGNMENT_BYTES, byte_count, numpy_dtype, rounded_up
from exporter.errors import BackendError
from exporter.models.graph_facts import CACHE_INPUT

_BATCH, _SEQUENCE, _PAST = 0, 1, 2
_LOGITS_AXES = 3
_NOTHING: Mapping[str, int] = MappingProxyType({})


@dataclass(frozen=True)
class CachePlan:
    """A decoder's cache on the device, and what its profiles hold.

    Attributes:
        name: The engines, for messages.
        prefill: The profile that begins a text.
        decode: The profile that continues it.
        pairs: By cache input, the output that is its next content.
        tokens: Which of the token inputs there are.
        batch: Sequences that are continued together.
        prefill_batch: Sequences whose prompts run together; more than that run in groups.
        prompt: Tokens of a prompt.
        context: Tokens in the cache before a decode step.
        cache_shapes: By cache input, ``[batch, heads, length, size]`` at its largest.
        cache_dtypes: By cache input, its type.
        cache_bytes: By cache input, the bytes of one buffer.
        room: Positions of caches that are updated in place, and of the mask; None where they grow.
            There is one buffer of each then, else two.
        mask_bytes: A sequence's part of that mask; 0 where the caches grow.
    """

    name: str
    prefill: Slot
    decode: Slot
    pairs: Mapping[str, str]
    tokens: tuple[str, ...]
    batch: Span
    prefill_batch: Span
    prompt: Span
    context: Span
    cache_shapes: Mapping[str, tuple[int, ...]]
    cache_dtypes: Mapping[str, np.dtype[Any]]
    cache_bytes: Mapping[str, int]
    room: int | None = None
    mask_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """Device memory for the cache: what a step reads, and what it writes."""
        banks = 2 if self.room is None else 1
        return banks * sum(self.cache_bytes.values())

    @property
    def longest(self) -> int:
        """Positions that the cache has room for."""
        return self.room or max(self.prompt.high, self.context.high + 1)

    def shapes(self, batch: int, sequence: int, past: int) -> dict[str, tuple[int, ...]]:
        """By input, its shape in a step."""
        total, length = (past + sequence, past) if self.room is None else (self.room, self.room)
        sizes = {IDS: sequence, MASK: total, POSITIONS: sequence}
        return {
            **{name: (batch, sizes[name]) for name in self.tokens},
            **{name: (batch, s[1], length, s[3]) for name, s in self.cache_shapes.items()},
        }

    def groups(self, batch: int) -> list[slice]:
        """The sequences whose prompts run together, as evenly as can be."""
        count = -(-batch // self.prefill_batch.high)
        ends = [batch * number // count for number in range(count + 1)]
        return [slice(begin, end) for begin, end in pairwise(ends)]

    def offsets(self, row: int, length: int) -> dict[str, int]:
        """By cache input, where a sequence begins in its buffer, in bytes; the mask's too.

        Args:
            row: The sequence.
            length: Positions of each, where the caches grow.
        """
        each = self.room or length
        found = {MASK: row * self.mask_bytes} if self.room else {}
        return found | {
            name: row * byte_count(self.cache_dtypes[name], (shape[1], each, shape[3]))
            for name, shape in self.cache_shapes.items()
        }

    def refuse_unfit(self, batch: int, prompt: int, new_tokens: int) -> None:
        """Refuses what the profiles don't hold, before anything runs.

        Raises:
            BackendError: It says what is asked and what the engines hold.
        """
        self.refuse_batch(batch)
        self._refuse(f"a prompt length of {prompt}", prompt, self.prompt, "--prompt-range")
        for rows in self.groups(batch):
            size = rows.stop - rows.start
            self._refuse(f"a prefill batch of {size}", size, self.prefill_batch, "--batch-range")
            if any(
                offset % ALIGNMENT_BYTES for offset in self.offsets(rows.start, prompt).values()
            ):
                raise BackendError(
                    f"{self.name}: prompts of {prompt} tokens can't be run in groups, since a "
                    f"group's cache would not begin at a multiple of {ALIGNMENT_BYTES} bytes.",
                    "Make the prompts longer or shorter, or build for a larger prefill batch.",
                    code="groups-unaligned",
                )
        if new_tokens > 1:
            self.refuse_context(prompt)
            self.refuse_context(prompt + new_tokens - 2)

    def refuse_batch(self, batch: int) -> None:
        """Refuses a number of sequences that the decode profile doesn't hold.

        Raises:
            BackendError: It says what the engine holds.
        """
        self._refuse(f"a batch of {batch}", batch, self.batch, "--batch-range")

    def refuse_context(self, length: int) -> None:
        """Refuses a decode step after a cache of this length, where the profile doesn't hold it.

        Raises:
            BackendError: It says what the engine holds.
        """
        self._refuse(f"a context length of {length}", length, self.context, "--context-range")

    def _refuse(self, what: str, size: int, held: Span, option: str) -> None:
        if not held.low <= size <= held.high:
            raise BackendError(
                f"{self.name}: {what} is asked for; it was built for {held.low} to {held.high}.",
                f"Ask for {'more' if size < held.low else 'less'}, or build it with another "
                f"{option}.",
                code="out-of-range",
            )


class DeviceCache:
    """Each cache tensor's buffers on the device.

    Two for caches that grow: a step reads one, writes the other, then they change places. One for
    caches in place: a step writes behind what it reads.

    Args:
        pairs: By cache input, the output that is its next content.
        banks: One or two sets of buffers: by cache input, an address.
    """

    def __init__(self, pairs: Mapping[str, str], *banks: Mapping[str, int]) -> None:
        self._pairs = pairs
        self._banks = banks

    def bindings(self, offsets: Mapping[str, int] = _NOTHING) -> dict[str, int]:
        """By input and output, its address in the next step.

        Args:
            offsets: By cache input, how far into the buffer what is written begins, in bytes; in
                place, what is read too.
        """
        read, written = self._banks[0], self._banks[-1]
        in_place = len(self._banks) == 1
        found = {}
        for past, present in self._pairs.items():
            offset = offsets.get(past, 0)
            found[past] = read[past] + (offset if in_place else 0)
            found[present] = written[past] + offset
        return found

    def swap(self) -> None:
        """After a step: what was written is the next one's past."""
        self._banks = self._banks[::-1]


def plan_cache(engines: EngineSet, *, batch: int | None = None, begins: bool = True) -> CachePlan:
    """Reckons a decoder's plan.

    Args:
        engines: Which.
        batch: Sequences that there is to be room for; None for as many as the engines hold.
        begins: Whether it begins texts; else it only continues them, and needs no prefill.

    Raises:
        BackendError: They are no decoder with a cache, or lack a phase.
    """
    caches = {each.name: each for each in engines.inputs if CACHE_INPUT.fullmatch(each.name)}
    outputs = {each.name: len(each.shape) for each in engines.outputs}
    if not caches or outputs.get(LOGITS) != _LOGITS_AXES:
        raise no_decoder(engines.name)
    decode = _slot(engines, "decode")
    prefill = _slot(engines, "prefill") if begins else decode
    room = _room(engines, caches.values())
    past = next(iter(caches))
    if begins and room is None and _span(engines, prefill, past, _PAST).low != 0:
        raise BackendError(f"{engines.name}: its prefill profile does not take an empty cache.")
    prefill_batch, rows = (_span(engines, slot, IDS, _BATCH) for slot in (prefill, decode))
    rows = rows if batch is None else Span(*(min(batch, size) for size in vars(rows).values()))
    prompt, context = _lengths(engines, prefill, decode, past, room)
    longest = room or max(prompt.high, context.high + 1)
    shapes = {name: _cache_shape(each, rows.high, longest) for name, each in caches.items()}
    dtypes = {name: numpy_dtype(each.dtype) for name, each in caches.items()}
    return CachePlan(
        name=engines.name,
        prefill=prefill,
        decode=decode,
        pairs=cache_pairs(caches, outputs),
        tokens=_tokens(engines, caches),
        batch=rows,
        prefill_batch=prefill_batch,
        prompt=prompt,
        context=context,
        cache_shapes=shapes,
        cache_dtypes=dtypes,
        cache_bytes={
            name: rounded_up(byte_count(dtypes[name], shape)) for name, shape in shapes.items()
        },
        room=room,
        mask_bytes=_mask_bytes(engines) if room else 0,
    )


def _room(engines: EngineSet, caches: Iterable[EngineTensor]) -> int | None:
    """The positions of caches whose length is fixed; None where they grow.

    Raises:
        BackendError: The lengths differ, or the mask has another one.
    """
    masks = {each.shape[_SEQUENCE] for each in engines.inputs if each.name == MASK}
    found = {each.shape[_PAST] for each in caches}
    if all(size < 0 for size in found | masks):
        return None
    if not masks or len(found | masks) != 1:
        raise BackendError(
            f"{engines.name}: its caches and its mask have no length in common.",
            code="cache-lengths-differ",
        )
    return found.pop()


def _mask_bytes(engines: EngineSet) -> int:
    (mask,) = (each for each in engines.inputs if each.name == MASK)
    return byte_count(numpy_dtype(mask.dtype), mask.shape[_SEQUENCE:])


def _lengths(
    engines: EngineSet, prefill: Slot, decode: Slot, past: str, room: int | None
) -> tuple[Span, Span]:
    """Tokens of a prompt, and tokens in the cache before a step."""
    prompt = _span(engines, prefill, IDS, _SEQUENCE)
    if room is None:
        return prompt, _span(engines, decode, past, _PAST)
    usual, high = min(prompt.usual, room), min(prompt.high, room)
    return Span(prompt.low, usual, high), Span(1, room - 1, room - 1)


def _tokens(engines: EngineSet, caches: Collection[str]) -> tuple[str, ...]:
    names = tuple(each.name for each in engines.inputs if each.name not in caches)
    unknown = next((name for name in names if name not in (IDS, MASK, POSITIONS)), None)
    if unknown:
        raise BackendError(
            f"{engines.name} has an input {unknown!r} of unknown meaning.", code="unknown-input"
        )
    return names


def _cache_shape(cache: EngineTensor, batch: int, length: int) -> tuple[int, ...]:
    _, heads, _, size = cache.shape
    if heads < 0 or size < 0:
        raise BackendError(f"{cache.name} declares no number of heads or no head size.")
    return batch, heads, length, size


def _slot(engines: EngineSet, phase: str) -> Slot:
    found = next((slot for slot in engines.slots if slot.profile.phase == phase), None)
    if found is None:
        raise no_phase(engines.name, phase)
    return found


def _span(engines: EngineSet, slot: Slot, name: str, axis: int) -> Span:
    low, usual, high = (engines.shapes(slot, end)[name][axis] for end in ("low", "usual", "high"))
    return Span(low, usual, high)
