"""What runs on engines: their trial, their session and its end, and several in turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Self

from exporter.engines.build.engine_set import EngineSet
from exporter.engines.build.session import Session, try_engines
from exporter.engines.build.sidecar import other_card
from exporter.engines.runners.base import Capabilities
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

    Args:
        load: Enters all of them, or leaves none entered.
        engines: Runners or decoders.

    Raises:
        DepthcutError: As ``load``; that memory ran out only where there is nobody to take turns.
    """
    try:
        load()
    except DepthcutError as error:
        if error.code != OUT_OF_MEMORY or len(engines) < _FEWEST:
            raise
    else:
        return True
    turns = Turns()
    for each in engines:
        each.turns = turns
    return False


class OnEngines:
    """What a runner and a decoder on engines share: the trial, the session and its end.

    Attributes:
        backend: The library that runs them.
        capabilities: See :class:`exporter.engines.runners.base.Capabilities`.
        turns: Whom it takes turns with in the card's memory; None where it stays loaded as long as
            it is entered.
    """

    def __init__(self, engines: EngineSet, *, trial: bool, on: OnEngines | None = None) -> None:
        self.engines = engines
        self.name = engines.name
        self.backend: str = engines.library.backend
        self.capabilities = Capabilities("gpu", "profiles", gpu_memory_bytes=0)
        self.turns: Turns | None = None
        self._trial = trial
        self._on = on
        self._session: Session | None = None
        self._before: frozenset[tuple[str, int]] = frozenset()

    def __enter__(self) -> Self:
        """Loads the engines and takes all device memory that any run will need.

        Where engines take turns, that is done when they are used.

        Raises:
            BackendError: There is no driver, no GPU, or too little memory.
            EngineError: The engines are not for this machine, or can't be loaded and run.
            MissingDependencyError: The library or cuda-bindings is not installed.
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
        notes = (other_card(record, session.card) for record in self.engines.records)
        self.capabilities = replace(
            self.capabilities,
            gpu_memory_bytes=session.used_bytes,
            notes=(*filter(None, notes), *session.notes),
        )

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
