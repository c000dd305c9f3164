"""A decoder on engines; the cache stays on the device.

A cache that grows lies in two sets of buffers that change places. One that is updated in place lies
in one: nothing is copied, and each step has the same shapes and addresses as the one before.

Written without a GPU at hand: the tests in ``tests/gpu`` run it where there is one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.engines.build.cuda import Bytes
from exporter.engines.build.engine_set import EngineSet
from exporter.engines.build.ready import ReadyProfile
from exporter.engines.build.session import Session
from exporter.engines.decoding.cache_plan import DeviceCache, plan_cache
from exporter.engines.decoding.decoder import IDS, LOGITS, MASK, POSITIONS, Decoder
from exporter.engines.runners.on_engines import OnEngines
from exporter.engines.tensors import byte_count, numpy_dtype
from exporter.errors import BackendError

_FED = (IDS, POSITIONS)


class TensorRtDecoder(OnEngines, Decoder):
    """Keeps the cache in one or two sets of buffers on the device.

    A step reads one set and writes the other, whose part is the next step's past; or it writes
    behind what it reads, see :mod:`graph_passes.fusing.cache_in_place`. Only tokens and positions
    go to the device, only the last position's logits come back. Prompts run in groups where the
    prefill profile takes fewer sequences than the decode profile.

    Args:
        engines: One engine with a prefill and a decode profile, or one for each.
        trial: Whether the engines are run in a process of their own first.
        on: A runner of these engines that is entered: it is used, and nothing is loaded twice.
        batch: Sequences that there is to be room for; None for as many as the engines hold.
        begins: Whether it begins texts; else it only continues them, for timing, and an engine for
            decode alone will do.

    Raises:
        BackendError: They can't generate.
    """

    def __init__(
        self,
        engines: EngineSet,
        *,
        trial: bool = True,
        on: OnEngines | None = None,
        batch: int | None = None,
        begins: bool = True,
    ) -> None:
        super().__init__(engines, trial=trial and on is None, on=on)
        self.plan = plan_cache(engines, batch=batch, begins=begins)
        self._dtypes = {
            each.name: numpy_dtype(each.dtype) for each in (*engines.inputs, *engines.outputs)
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
        found = [
            self._run("prefill", token_ids[rows], rows.start) for rows in self.plan.groups(batch)
        ]
        self._advance(prompt)
        return np.concatenate(found)

    def step(self, token_ids: NDArray[np.int64]) -> NDArray[Any]:
        """Runs one more token of each sequence."""
        self._refuse_step(token_ids)
        self._tell_next()
        logits = self._run("decode", token_ids)
        self._advance(1)
        return logits

    def begin_at(self, batch: int, length: int) -> None:
        """Takes so many positions of the caches for filled, whatever lies there: for timing.

        Args:
            batch: Sequences.
            length: Positions of each.

        Raises:
            BackendError: The engines don't hold so much.
        """
        self.plan.refuse_batch(batch)
        self.plan.refuse_context(length)
        self._batch, self._length = batch, 0
        self._tell_filled(length)
        self._length = length

    def advance(self, token_ids: NDArray[np.int64]) -> None:
        """A step that leaves its logits on the device, for timing; ``[batch, 1]``."""
        self._refuse_step(token_ids)
        self._tell_next()
        self._start("decode", token_ids)
        self._loaded().cuda.wait()
        self._advance(1)

    def _advance(self, tokens: int) -> None:
        self._cache.swap()
        self._length += tokens

    def _refuse_step(self, token_ids: NDArray[np.int64]) -> None:
        if token_ids.shape != (self._batch, 1):
            raise BackendError(f"A step takes {self._batch} sequences of one token each.")
        self.plan.refuse_context(self._length)

    def _tell_filled(self, prompt: int) -> None:
        """Says in a mask of fixed length what a prompt fills."""
        room = self.plan.room
        if room is not None:
            mask = np.zeros((self._batch, room), self._dtypes[MASK])
            mask[:, :prompt] = 1
            self._loaded().cuda.upload(self._buffers[MASK], mask)

    def _tell_next(self) -> None:
        """Says there that one more position is filled; a 1 is its lowest byte."""
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
        found: NDArray[Any] = rows.view(dtype).astype(np.float32)
        return found

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
