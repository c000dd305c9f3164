"""TensorRT and TensorRT-RTX engines on an NVIDIA GPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np

from exporter.artifacts.latency import Phase
from exporter.engines.build.cuda import Cuda
from exporter.engines.build.engine_set import (
    EngineRecord,
    EngineSet,
    choose_profile,
    find_engines,
    refuse_wrong,
)
from exporter.engines.build.session import ReadyProfile, Session, try_engines
from exporter.engines.runners.base import Array, BoundCall, Capabilities, Runner
from exporter.engines.runners.cache_form import (
    IDS,
    MASK,
    CacheForm,
    has_fixed_length,
    padded_before,
    run_packed,
)
from exporter.engines.tensors import TensorSpec, written_shape
from exporter.errors import OUT_OF_MEMORY, BackendError, DepthcutError

_FEWEST = 2

IN_TURNS = (
    "compare: the arms don't fit into the GPU's memory together: they are loaded in turns, which "
    "takes longer"
)


class Turns:
    """Engines that don't fit into the card's memory together: the one that is used is loaded."""

    def __init__(self) -> None:
        self._loaded: OnEngines | None = None

    def take(self, one: OnEngines) -> None:
        """Loads one in the place of the one that is loaded."""
        if self._loaded is not None:
            self._loaded.unload()
            self._loaded = None
        one.load()
        self._loaded = one

    def leave(self, one: OnEngines) -> None:
        """It isn't loaded any more."""
        if self._loaded is one:
            self._loaded = None


def fit_together(load: Callable[[], object], engines: Sequence[OnEngines]) -> bool:
    """Loads engines; whether all of them fit into the card's memory together.

    Where they don't, they take turns from now on: enter them again.
    """
    try:
        load()
    except DepthcutError as error:
        if error.code != OUT_OF_MEMORY or len(engines) < _FEWEST:
            raise
    else:
        return True
    turns = Turns()
    for item in engines:
        item.turns = turns
    return False


class OnEngines:
    """What a runner and a decoder on engines share: the trial, the session and its end."""

    def __init__(self, engines: EngineSet, *, trial: bool, on: OnEngines | None = None) -> None:
        self.engines = engines
        self.name = engines.name
        self.backend: str = engines.library.backend
        self.capabilities = Capabilities("gpu", "profiles", gpu_memory_bytes=0)
        self.turns: Turns | None = None  # None where it stays loaded as long as it is entered
        self._trial = trial
        self._on = on
        self._session: Session | None = None
        self._before: frozenset[tuple[str, int]] = frozenset()

    def __enter__(self) -> Self:
        """Loads the engines and takes all device memory that any run will need.

        Where engines take turns, that is done when they are used.
        """
        if self.turns is None:
            self.load()
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Frees everything on the device."""
        self.unload()
        if self.turns is not None:
            self.turns.leave(self)

    def load(self) -> None:
        """See :meth:`__enter__`."""
        refuse_wrong(self.engines.records)
        if self._trial:
            try_engines(self.engines)
            self._trial = False  # once is enough: a comparison loads it again and again
        session = Session(self.engines) if self._on is None else self._on.shared_session()
        if self._on is None:
            session.__enter__()
        self._session, self._before = session, session.cuda.held()
        try:
            self._take_memory(session)
        except BaseException:
            self.unload()
            raise
        self.capabilities = replace(self.capabilities, gpu_memory_bytes=session.used_bytes)
        self._add_notes(session.notes)

    def _add_notes(self, notes: Iterable[str]) -> None:
        notes = tuple(dict.fromkeys([*self.capabilities.notes, *notes]))
        self.capabilities = replace(self.capabilities, notes=notes)

    def unload(self) -> None:
        """See :meth:`__exit__`."""
        self._forget()
        if self._session is not None:
            session, self._session = self._session, None
            if self._on is None:
                session.__exit__()
            else:
                session.back_to(self._before)

    def shared_session(self) -> Session:
        """The session of a model that is loaded, for another use of it, which leaves it as it was.

        The memory for own runs is given back; it is taken again with the next one.
        """
        session = self._loaded()
        self._forget()
        session.back_to(self._before)
        return session

    @property
    def tried(self) -> bool:
        """Whether the engines have run in a process of their own."""
        return not self._trial

    def _take_memory(self, session: Session) -> None:
        """Allocates what runs need."""
        raise NotImplementedError

    def _forget(self) -> None:
        """Drops what lies in that memory."""
        raise NotImplementedError

    def _loaded(self) -> Session:
        if self._session is None and self.turns is not None:
            self.turns.take(self)
        if self._session is None:
            raise BackendError(f"{self.name} is used outside its with block.", code="not-entered")
        return self._session


_WARM_RUNS = 2  # kernels and lazy memory; then a graph is captured, where there is one
_AHEAD_MS, _TIMED_MS = 0.5, 1.0  # what is queued before the time begins, and within it, at least
_MOST_RUNS = 16


def open_engine(path: Path | Sequence[Path], *, trial: bool = True) -> Runner:
    """A runner for an engine, or for a folder with an engine for each phase.

    Nothing of CUDA is touched before the runner is entered.
    """
    return TensorRtRunner(find_engines(path), trial=trial)


class TensorRtRunner(OnEngines, Runner):
    """Engines that serve one model.

    There is one device buffer for each input and output, as large as the largest profile needs.
    So what :meth:`prepare` has bound holds until the next ``run`` or ``prepare``; an older call
    is refused after that.
    """

    has_device_clock = True

    def __init__(self, engines: EngineSet, *, trial: bool = True) -> None:
        super().__init__(engines, trial=trial)
        self._buffers: dict[str, int] = {}
        self._bound = 0
        self.provider = f"{self.backend} {engines.records[0].backend_version}"
        self.threads = 1
        self._inputs = tuple(tensor.spec for tensor in engines.inputs)
        self._outputs = tuple(output.spec for output in engines.outputs)
        sums = any(record.attention == "new" for record in engines.records)
        self._form = _cache_form(self._inputs, self._outputs, sums_mask=sums)

    def _take_memory(self, session: Session) -> None:
        self._buffers = session.allocate("high")
        self._events = session.cuda.event(), session.cuda.event()

    def _forget(self) -> None:
        self._bound += 1
        self._buffers = {}

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What the engines take."""
        return self._inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What they give."""
        return self._outputs

    def refuse_shapes(
        self, shapes: Mapping[str, tuple[int, ...]], *, phase: Phase | None = None
    ) -> None:
        """Refuses what no profile holds."""
        profiles = [slot.profile for slot in self.engines.slots]
        choose_profile(self.engines.name, profiles, self._form.fixed_shapes(shapes), phase)

    def run(
        self,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None = None,
        *,
        phase: Phase | None = None,
    ) -> dict[str, Array]:
        """Runs once and returns the named outputs, or all of them, on the host.

        Caches may be as long as what is in them, also where the engine fixes their length.
        """
        if self._form.sums_mask and padded_before(inputs):
            names = [spec.name for spec in self.outputs] if outputs is None else list(outputs)
            alone = partial(self._run, phase=phase)
            return run_packed(alone, inputs, names, self._form.shared)
        return self._run(inputs, outputs, phase)

    def _run(
        self, inputs: Mapping[str, Array], outputs: Sequence[str] | None, phase: Phase | None
    ) -> dict[str, Array]:
        profile = self._fill(inputs, phase)
        cuda = self._loaded().cuda
        profile.enqueue()
        cuda.wait()
        dtypes = {spec.name: spec.dtype for spec in self.outputs}
        arrays = {}
        for name in dtypes if outputs is None else outputs:
            arrays[name] = np.empty(profile.output_shape(name), dtypes[name])
            cuda.download(arrays[name], self._buffers[name])
        return arrays if self._form.mask is None else self._form.filled_part(arrays, inputs)

    def prepare(self, inputs: Mapping[str, Array], *, phase: Phase | None = None) -> BoundCall:
        """Fills the inputs on the device; each call runs the engine on them, and waits.

        It runs as in a text that a decoder continues: as a CUDA graph where each step is like the
        one before, else kernel by kernel.
        """
        profile = self._fill(inputs, phase)
        shapes = self._form.fixed_shapes({name: array.shape for name, array in inputs.items()})
        if far := profile.slot.profile.far_from_usual(shapes):
            note = f"{self.engines.paths[profile.slot.engine].name}: {far}: build one for it"
            self._add_notes([note])
        cuda = self._loaded().cuda
        for _ in range(_WARM_RUNS):
            profile.enqueue()
            cuda.wait()
        queue = _Queue(cuda, self._events, self._still(profile))
        return BoundCall(queue.run, queue.timed, lambda: profile.launches)

    def _still(self, profile: ReadyProfile) -> Callable[[], None]:
        """Runs what is bound now, as long as nothing else is."""
        bound = self._bound

        def launch() -> None:
            if bound != self._bound:
                raise BackendError(
                    f"{self.engines.name}: other inputs have been bound since this call was "
                    "prepared.",
                    code="not-entered",
                )
            profile.enqueue()

        return launch

    def _fill(self, inputs: Mapping[str, Array], phase: Phase | None) -> ReadyProfile:
        session = self._loaded()
        if not self._buffers:  # another use of the session has them given back
            self._take_memory(session)
        self.refuse_missing(inputs)
        fixed = self._form.mask is not None
        given = {**inputs, **(self._form.with_room(inputs) if fixed else {})}
        arrays = {s.name: checked_input(self.name, s, given[s.name]) for s in self.inputs}
        shapes = {name: array.shape for name, array in arrays.items()}
        entries = [profile.slot.profile for profile in session.profiles]
        profile = session.profiles[choose_profile(self.engines.name, entries, shapes, phase)]
        refuse_untold(self.engines.records[profile.slot.engine], inputs)
        self._bound += 1
        profile.set_shapes(shapes)
        for name, address in self._buffers.items():
            profile.bind(name, address)
        for name, array in arrays.items():
            session.cuda.upload(self._buffers[name], array)
        return profile


def refuse_untold(record: EngineRecord, inputs: Mapping[str, Array]) -> None:
    """Refuses a call that an engine would take for another."""
    if record.attention != "new":
        return
    filled = np.any(inputs[MASK].sum(axis=1) > inputs[IDS].shape[1])
    if filled or padded_before(inputs):
        raise BackendError(
            f"{record.engine} runs a prompt on empty caches, with no padding before its tokens.",
            "Put padding behind the tokens, or build with --logits all.",
            code="no-padding",
        )


class _Queue:
    """Launches of one run, and their time on the device.

    An event on an idle stream passes at once, and what the host takes to launch would count. So
    some runs go ahead, the events and the runs between them are put behind these, and the device
    comes to them when they are all there.
    """

    def __init__(self, cuda: Cuda, events: tuple[Any, Any], launch: Callable[[], None]) -> None:
        self._cuda, self._launch = cuda, launch
        self._begin, self._end = events
        self._ahead = self._timed = 1

    def run(self) -> None:
        """Runs once and waits."""
        self._launch()
        self._cuda.wait()

    def timed(self) -> float:
        """Milliseconds of one run; see :class:`BoundCall`."""
        for _ in range(self._ahead):
            self._launch()
        self._cuda.record(self._begin)
        for _ in range(self._timed):
            self._launch()
        self._cuda.record(self._end)
        self._cuda.wait()
        run_ms = self._cuda.elapsed_ms(self._begin, self._end) / self._timed
        self._ahead, self._timed = (
            max(1, min(_MOST_RUNS, math.ceil(span_ms / max(run_ms, 1e-3))))
            for span_ms in (_AHEAD_MS, _TIMED_MS)
        )
        return run_ms


def checked_input(engine: str, spec: TensorSpec, array: Array) -> Array:
    """An input as the engine takes it."""
    alike = len(array.shape) == len(spec.shape) and all(
        want is None or want == size for want, size in zip(spec.shape, array.shape, strict=True)
    )
    if not alike:
        wanted = "x".join("?" if size is None else str(size) for size in spec.shape)
        raise BackendError(
            f"{engine}: {spec.name} is {written_shape(array.shape)}, "
            f"and the engine takes {wanted}.",
            code="wrong-shape",
        )
    return np.ascontiguousarray(array, spec.dtype)


def _cache_form(
    inputs: Iterable[TensorSpec], outputs: Iterable[TensorSpec], *, sums_mask: bool
) -> CacheForm:
    """What is known of caches whose length the engine fixes."""
    pasts, presents = ([end for end in ends if has_fixed_length(end)] for ends in (inputs, outputs))
    rooms = [past.shape[2] for past in pasts]
    if not rooms or not isinstance(rooms[0], int):
        return CacheForm()
    names = [[end.name for end in ends] for ends in (pasts, presents)]
    shared = dict(zip(*names, strict=False))
    return CacheForm(shared=shared, buffer=rooms[0], mask=rooms[0], sums_mask=sums_mask)
