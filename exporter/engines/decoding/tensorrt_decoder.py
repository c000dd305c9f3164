"""A decoder on engines; the cache stays on the device."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.engines.build.cuda import Bytes
from exporter.engines.build.engine_set import EngineSet, EngineTensor, Slot, no_phase
from exporter.engines.build.profiles import Span
from exporter.engines.build.session import Launches, ReadyProfile, Session
from exporter.engines.decoding.decoder import (
    IDS,
    LOGITS,
    LOGITS_AXES,
    MASK,
    POSITIONS,
    Decoder,
    cache_pairs,
    no_decoder,
)
from exporter.engines.runners.tensorrt import OnEngines
from exporter.engines.tensors import ALIGNMENT_BYTES, byte_count, numpy_dtype, rounded_up
from exporter.errors import BackendError
from exporter.models.graph_facts import CACHE_INPUT

_BATCH, _SEQUENCE, _PAST = 0, 1, 2
_NOTHING: Mapping[str, int] = MappingProxyType({})


@dataclass(frozen=True)
class CachePlan:
    """A decoder's cache on the device, and what its profiles hold."""

    name: str
    prefill: Slot
    decode: Slot
    pairs: Mapping[str, str]
    tokens: tuple[str, ...]
    batch: Span
    prefill_batch: Span
    prompt: Span
    context: Span
    # by cache input, `[batch, heads, length, size]` at its largest
    cache_shapes: Mapping[str, tuple[int, ...]]
    cache_dtypes: Mapping[str, np.dtype[Any]]
    cache_bytes: Mapping[str, int]  # by cache input, the bytes of one buffer
    room: int | None = None  # None where they grow
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
        """By cache input, where a sequence begins in its buffer, in bytes; the mask's too."""
        room = self.room or length
        numbers = {MASK: row * self.mask_bytes} if self.room else {}
        return numbers | {
            name: row * byte_count(self.cache_dtypes[name], (shape[1], room, shape[3]))
            for name, shape in self.cache_shapes.items()
        }

    def refuse_unfit(self, batch: int, prompt: int, new_tokens: int) -> None:
        """Refuses what the profiles don't hold, before anything runs."""
        self.refuse(batch=batch, prompt=prompt)
        for rows in self.groups(batch):
            self.refuse(prefill_batch=rows.stop - rows.start)
            if any(
                offset % ALIGNMENT_BYTES for offset in self.offsets(rows.start, prompt).values()
            ):
                raise BackendError(
                    f"{self.name}: prompts of {prompt} tokens can't be run in groups, since a "
                    f"group's cache would not begin at a multiple of {ALIGNMENT_BYTES} bytes.",
                    "Make the prompts longer or shorter, or build for a larger prefill batch.",
                    code="no-profile-fits",
                )
        if new_tokens > 1:
            self.refuse(context=prompt)
            self.refuse(context=prompt + new_tokens - 2)

    def refuse(self, **sizes: int) -> None:
        """Refuses a batch, a prompt's length or a decode step's context that no profile holds."""
        for name, size in sizes.items():
            held: Span = getattr(self, name)
            if not held.low <= size <= held.high:
                raise BackendError(
                    f"{self.name}: {name.replace('_', ' ')} {size} is asked for; it was built for "
                    f"{held.low} to {held.high}.",
                    f"Ask for {'more' if size < held.low else 'less'}, or build it with another "
                    f"--{name.removeprefix('prefill_')}-range.",
                    code="no-profile-fits",
                )


class DeviceCache:
    """Each cache tensor's buffers on the device.

    Two for caches that grow: a step reads one, writes the other, then they change places. One for
    caches in place: a step writes behind what it reads.
    """

    def __init__(self, pairs: Mapping[str, str], *banks: Mapping[str, int]) -> None:
        self._pairs = pairs
        self._banks = banks

    def bindings(self, offsets: Mapping[str, int] = _NOTHING) -> dict[str, int]:
        """By input and output, its address in the next step."""
        read, written = self._banks[0], self._banks[-1]
        in_place = len(self._banks) == 1
        numbers = {}
        for past, present in self._pairs.items():
            offset = offsets.get(past, 0)
            numbers[past] = read[past] + (offset if in_place else 0)
            numbers[present] = written[past] + offset
        return numbers

    def swap(self) -> None:
        """After a step: what was written is the next one's past."""
        self._banks = self._banks[::-1]


def plan_cache(engines: EngineSet, *, batch: int | None = None, begins: bool = True) -> CachePlan:
    """Reckons a decoder's plan."""
    caches = {
        tensor.name: tensor for tensor in engines.inputs if CACHE_INPUT.fullmatch(tensor.name)
    }
    outputs = {output.name: len(output.shape) for output in engines.outputs}
    if not caches or outputs.get(LOGITS) != LOGITS_AXES:
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
    shapes = {name: _cache_shape(cache, rows.high, longest) for name, cache in caches.items()}
    dtypes = {name: numpy_dtype(cache.dtype) for name, cache in caches.items()}
    mask = next((tensor for tensor in engines.inputs if tensor.name == MASK), None)
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
        mask_bytes=byte_count(numpy_dtype(mask.dtype), mask.shape[_SEQUENCE:])
        if room and mask
        else 0,
    )


def _room(engines: EngineSet, caches: Iterable[EngineTensor]) -> int | None:
    """The positions of caches whose length is fixed; None where they grow."""
    masks = {tensor.shape[_SEQUENCE] for tensor in engines.inputs if tensor.name == MASK}
    numbers = {tensor.shape[_PAST] for tensor in caches}
    if all(size < 0 for size in numbers | masks):
        return None
    if not masks or len(numbers | masks) != 1:
        raise BackendError(
            f"{engines.name}: its caches and its mask have no length in common.",
            code="unknown-input",
        )
    return numbers.pop()


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
    names = tuple(tensor.name for tensor in engines.inputs if tensor.name not in caches)
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
    result = next((slot for slot in engines.slots if slot.profile.phase == phase), None)
    if result is None:
        raise no_phase(engines.name, phase)
    return result


def _span(engines: EngineSet, slot: Slot, name: str, axis: int) -> Span:
    low, usual, high = (engines.shapes(slot, end)[name][axis] for end in ("low", "usual", "high"))
    return Span(low, usual, high)


_FED = (IDS, POSITIONS)


class TensorRtDecoder(OnEngines, Decoder):
    """Keeps the cache in one or two sets of buffers on the device.

    A step reads one set and writes the other, whose part is the next step's past; or it writes
    behind what it reads, see :mod:`graph_passes.fusing.cache_in_place`. Only tokens and positions
    go to the device, only the last position's logits come back. Prompts run in groups where the
    prefill profile takes fewer sequences than the decode profile.
    """

    def __init__(
        self,
        engines: EngineSet,
        *,
        trial: bool = True,
        on: OnEngines | None = None,
        batch: int | None = None,  # None for as many as the engines hold
        begins: bool = True,
    ) -> None:
        super().__init__(engines, trial=trial and on is None, on=on)
        self.plan = plan_cache(engines, batch=batch, begins=begins)
        self._dtypes = {
            tensor.name: numpy_dtype(tensor.dtype) for tensor in (*engines.inputs, *engines.outputs)
        }
        self._profiles: dict[str, ReadyProfile] = {}
        self._buffers: dict[str, int] = {}
        self._cache = DeviceCache({})
        self._bound: dict[str, object] = {}
        self._pinned: dict[str, Bytes] = {}
        self._batch = self._length = 0

    def _forget(self) -> None:
        self._profiles, self._buffers, self._pinned, self._bound = {}, {}, {}, {}

    def refuse_unfit(self, batch: int, prompt: int, new_tokens: int) -> None:
        """Refuses what the profiles don't hold."""
        self.plan.refuse_unfit(batch, prompt, new_tokens)

    def prefill(self, token_ids: NDArray[np.int64], *, context: int | None = None) -> NDArray[Any]:
        """Empties the cache and runs a prompt."""
        batch, prompt = token_ids.shape
        self.plan.refuse_unfit(batch, prompt, new_tokens=1)
        self._batch, self._length = batch, 0
        self._tell_filled(prompt)
        arrays = [
            self._run("prefill", token_ids[rows], rows.start) for rows in self.plan.groups(batch)
        ]
        self._advance(prompt)
        return np.concatenate(arrays)

    def step(self, token_ids: NDArray[np.int64]) -> NDArray[Any]:
        """Runs one more token of each sequence."""
        if token_ids.shape != (self._batch, 1):
            raise BackendError(f"A step takes {self._batch} sequences of one token each.")
        self._tell_next()
        logits = self._run("decode", token_ids)
        self._advance(1)
        return logits

    def begin_at(self, batch: int, length: int) -> None:
        """Takes so many positions of the caches for filled, whatever lies there: for timing."""
        self.plan.refuse(batch=batch, context=length)
        self._batch, self._length = batch, 0
        self._tell_filled(length)
        self._length = length

    def timed_steps(self, count: int) -> float:
        """Milliseconds of each of some more steps by the device, which waits for no host meanwhile.

        They read the token of the step before them, at its position.
        """
        cuda, profile = self._loaded().cuda, self._profiles["decode"]
        begin, end = cuda.event(), cuda.event()
        cuda.record(begin)
        for _ in range(count):
            self._tell_next()
            self._bind("decode", self._batch, 1, 0)
            profile.enqueue()
            self._advance(1)
        cuda.record(end)
        cuda.wait()
        return cuda.elapsed_ms(begin, end) / count

    @property
    def launches(self) -> Launches:
        """How its steps get on the stream."""
        return self._profiles["decode"].launches

    def _advance(self, tokens: int) -> None:
        self._cache.swap()
        self._length += tokens

    def _tell_filled(self, prompt: int) -> None:
        """Says in a mask of fixed length what a prompt fills."""
        room = self.plan.room
        if room is not None:
            mask = np.zeros((self._batch, room), self._dtypes[MASK])
            mask[:, :prompt] = 1
            self._loaded().cuda.upload(self._buffers[MASK], mask)

    def _tell_next(self) -> None:
        """Says there that one more position is filled; a 1 is its lowest byte."""
        self.plan.refuse(context=self._length)
        room = self.plan.room
        if room is not None:
            step = self.plan.mask_bytes
            first = self._buffers[MASK] + self._length * (step // room)
            self._loaded().cuda.mark(first, step, self._batch)

    def _run(self, phase: str, token_ids: NDArray[np.int64], row: int = 0) -> NDArray[Any]:
        profile = self._start(phase, token_ids, row)
        return self._last_logits(self._loaded(), profile)

    def _start(self, phase: str, token_ids: NDArray[np.int64], row: int = 0) -> ReadyProfile:
        session, profile = self._loaded(), self._profiles[phase]
        batch, sequence = token_ids.shape
        positions = np.arange(self._length, self._length + sequence)
        fed = {IDS: token_ids, POSITIONS: np.broadcast_to(positions, (batch, sequence))}
        self._bind(phase, batch, sequence, row)
        for name in self._pinned.keys() & fed.keys():
            content = np.ascontiguousarray(fed[name], self._dtypes[name])
            source = self._pinned[name][: content.nbytes]
            source[:] = content.reshape(-1).view(np.uint8)
            session.cuda.send(self._buffers[name], source)
        profile.enqueue()
        return profile

    def _bind(self, phase: str, batch: int, sequence: int, row: int) -> None:
        """Tells the profile shapes and addresses, where they are not those of its last run.

        In place they follow from these numbers alone; what grows has new ones at each step.
        """
        length = self._length if self.plan.room is None else None
        run = batch, sequence, row, length
        if self._bound.get(phase) == run:
            return
        offsets = self.plan.offsets(row, sequence)
        addresses = {**self._buffers, **self._cache.bindings(offsets)}
        if MASK in addresses:
            addresses[MASK] += offsets.get(MASK, 0)
        profile = self._profiles[phase]
        profile.set_shapes(self.plan.shapes(batch, sequence, self._length))
        for name, address in addresses.items():
            profile.bind(name, address)
        self._bound[phase] = run

    def _last_logits(self, session: Session, profile: ReadyProfile) -> NDArray[Any]:
        batch, length, vocabulary = profile.output_shape(LOGITS)
        dtype = self._dtypes[LOGITS]
        width = vocabulary * dtype.itemsize
        rows = self._pinned[LOGITS][: batch * width].reshape(batch, width)
        if length == 1:
            session.cuda.fetch(rows, self._buffers[LOGITS])
        else:  # the last row of each sequence
            for number, row in enumerate(rows):
                last = (number + 1) * length - 1
                session.cuda.fetch(row, self._buffers[LOGITS] + last * width)
        session.cuda.wait()
        array: NDArray[Any] = rows.view(dtype).astype(np.float32)
        return array

    def _take_memory(self, session: Session) -> None:
        plan, cuda = self.plan, session.cuda
        slots = [profile.slot for profile in session.profiles]
        for slot in (plan.prefill, plan.decode):
            self._profiles[slot.profile.phase] = session.profiles[slots.index(slot)]
        self._cache = self._new_cache(session)
        rows = max(plan.batch.high, plan.prefill_batch.high)
        for name in plan.tokens:
            shape = (rows, plan.longest if name == MASK else plan.prompt.high)
            size = byte_count(self._dtypes[name], shape)
            self._buffers[name] = cuda.allocate(size, name)
            if name in _FED:
                self._pinned[name] = cuda.pinned(size)
            elif plan.room is None:  # the mask: all ones, however long, so it never changes
                cuda.upload(self._buffers[name], np.ones(shape, self._dtypes[name]))
        self._take_logits(session)

    def _new_cache(self, session: Session) -> DeviceCache:
        plan, cuda = self.plan, session.cuda
        banks = [
            {name: cuda.allocate(size, f"the cache {name}") for name, size in bank.items()}
            for bank in [plan.cache_bytes] * (2 if plan.room is None else 1)
        ]
        if plan.room is not None:  # what is not filled is multiplied by 0: no NaN there
            for name, address in banks[0].items():
                cuda.clear(address, plan.cache_bytes[name])
        return DeviceCache(plan.pairs, *banks)

    def _take_logits(self, session: Session) -> None:
        sizes, rows = [], []
        for profile in self._profiles.values():
            profile.set_shapes(session.engines.shapes(profile.slot, "high"))
            batch, length, vocabulary = profile.output_shape(LOGITS)
            rows.append(byte_count(self._dtypes[LOGITS], (batch, vocabulary)))
            sizes.append(length * rows[-1])
        self._buffers[LOGITS] = session.cuda.allocate(max(sizes), "the logits")
        self._pinned[LOGITS] = session.cuda.pinned(max(rows))
