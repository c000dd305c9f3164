"""A decoder on engines; the cache stays on the device, in two sets of buffers that change places.

Written without a GPU at hand: the tests in ``tests/gpu`` run it where there is one.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from exporter.engine.cuda import Bytes
from exporter.engine.engine_set import EngineSet
from exporter.engine.session import Lane, Session
from exporter.engine.tensors import byte_count, numpy_dtype
from exporter.engine.trial import try_engines
from exporter.errors import BackendError
from exporter.generation.cache_names import LOGITS
from exporter.generation.cache_plan import IDS, MASK, POSITIONS, CacheBanks, plan_cache

_FED = (IDS, POSITIONS)


class TensorRtDecoder:
    """See :class:`exporter.generation.decoder.Decoder`.

    A step reads one set of cache buffers and writes the other, whose part is the next step's past.
    Only tokens and positions go to the device, only the last position's logits come back. Prompts
    run in groups where the prefill profile takes fewer sequences than the decode profile.

    Args:
        engines: One engine with a prefill and a decode profile, or one for each.
        trial: Whether the engines are run in a process of their own first.

    Raises:
        BackendError: They can't generate.
    """

    def __init__(self, engines: EngineSet, *, trial: bool = True) -> None:
        self._engines = engines
        self._trial = trial
        self.plan = plan_cache(engines)
        self.backend: str = engines.flavour.backend
        self.gpu_memory_bytes = 0
        self._dtypes = {
            each.name: numpy_dtype(each.dtype) for each in (*engines.inputs, *engines.outputs)
        }
        self._session: Session | None = None
        self._lanes: dict[str, Lane] = {}
        self._buffers: dict[str, int] = {}
        self._banks = CacheBanks({}, {}, {})
        self._pinned: dict[str, Bytes] = {}
        self._batch = self._length = 0

    def __enter__(self) -> Self:
        """Loads the engines and takes all memory.

        Raises:
            BackendError: There is no driver, no GPU, or too little memory.
            EngineError: The engines are not for this machine, or can't be loaded and run.
            MissingDependencyError: The library or cuda-bindings is not installed.
        """
        if self._trial:
            try_engines(self._engines)
            self._trial = False
        session = Session(self._engines, fixed_shapes=False)
        session.__enter__()
        try:
            self._take_memory(session)
        except BaseException:
            session.__exit__()
            raise
        self._session = session
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Frees the engines and the cache."""
        self._lanes, self._buffers, self._pinned = {}, {}, {}
        if self._session is not None:
            session, self._session = self._session, None
            session.__exit__()

    def refuse_unfit(self, batch: int, prompt: int, new_tokens: int) -> None:
        """Refuses what the profiles don't hold; see the protocol."""
        self.plan.refuse_unfit(batch, prompt, new_tokens)

    def prefill(self, token_ids: NDArray[np.int64], *, context: int | None = None) -> NDArray[Any]:
        """Empties the cache and runs a prompt; see the protocol."""
        batch, prompt = token_ids.shape
        self.plan.refuse_unfit(batch, prompt, new_tokens=1)
        self._batch, self._length = batch, 0
        found = [
            self._run("prefill", token_ids[rows], self.plan.offsets(rows.start, prompt))
            for rows in self.plan.groups(batch)
        ]
        self._advance(prompt)
        return np.concatenate(found)

    def step(self, token_ids: NDArray[np.int64]) -> NDArray[Any]:
        """Runs one more token of each sequence; see the protocol."""
        self._refuse_step(token_ids)
        logits = self._run("decode", token_ids, {})
        self._advance(1)
        return logits

    def advance(self, token_ids: NDArray[np.int64]) -> None:
        """A step that leaves its logits on the device, for timing; ``[batch, 1]``."""
        self._refuse_step(token_ids)
        self._start("decode", token_ids, {})
        self._loaded().cuda.wait()
        self._advance(1)

    def _advance(self, tokens: int) -> None:
        self._banks.swap()
        self._length += tokens

    def _refuse_step(self, token_ids: NDArray[np.int64]) -> None:
        if token_ids.shape != (self._batch, 1):
            raise BackendError(f"A step takes {self._batch} sequences of one token each.")
        self.plan.refuse_context(self._length)

    def _run(
        self, phase: str, token_ids: NDArray[np.int64], offsets: Mapping[str, int]
    ) -> NDArray[Any]:
        lane = self._start(phase, token_ids, offsets)
        return self._last_logits(self._loaded(), lane)

    def _start(self, phase: str, token_ids: NDArray[np.int64], offsets: Mapping[str, int]) -> Lane:
        session, lane = self._loaded(), self._lanes[phase]
        batch, sequence = token_ids.shape
        positions = np.arange(self._length, self._length + sequence)
        fed = {IDS: token_ids, POSITIONS: np.broadcast_to(positions, (batch, sequence))}
        lane.set_shapes(self.plan.shapes(batch, sequence, self._length))
        for name, address in {**self._buffers, **self._banks.bindings(offsets)}.items():
            lane.bind(name, address)
        for name in self._pinned.keys() & fed.keys():
            content = np.ascontiguousarray(fed[name], self._dtypes[name])
            source = self._pinned[name][: content.nbytes]
            source[:] = content.reshape(-1).view(np.uint8)
            session.cuda.send(self._buffers[name], source)
        lane.enqueue()
        return lane

    def _last_logits(self, session: Session, lane: Lane) -> NDArray[Any]:
        batch, length, vocabulary = lane.output_shape(LOGITS)
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
        lanes = {lane.slot.place: lane for lane in session.lanes}
        self._lanes = {
            "prefill": lanes[plan.prefill.place],
            "decode": lanes[plan.decode.place],
        }
        first, second = (
            {name: cuda.allocate(size, f"the cache {name}") for name, size in bank.items()}
            for bank in (plan.cache_bytes, plan.cache_bytes)
        )
        self._banks = CacheBanks(plan.pairs, first, second)
        rows = max(plan.batch.high, plan.prefill_batch.high)
        for name in plan.tokens:
            shape = (rows, plan.longest if name == MASK else plan.prompt.high)
            size = byte_count(self._dtypes[name], shape)
            self._buffers[name] = cuda.allocate(size, name)
            if name in _FED:
                self._pinned[name] = cuda.pinned(size)
            else:  # the mask: all ones, however long, so it never changes
                cuda.upload(self._buffers[name], np.ones(shape, self._dtypes[name]))
        self._take_logits(session)
        self.gpu_memory_bytes = session.used_bytes

    def _take_logits(self, session: Session) -> None:
        sizes, rows = [], []
        for lane in self._lanes.values():
            lane.set_shapes(session.engines.shapes(lane.slot, "high"))
            batch, length, vocabulary = lane.output_shape(LOGITS)
            rows.append(byte_count(self._dtypes[LOGITS], (batch, vocabulary)))
            sizes.append(length * rows[-1])
        self._buffers[LOGITS] = session.cuda.allocate(max(sizes), "the logits")
        self._pinned[LOGITS] = session.cuda.pinned(max(rows))

    def _loaded(self) -> Session:
        if self._session is None:
            raise BackendError(
                f"The decoder of {self._engines.name} is used outside its with block."
            )
        return self._session
