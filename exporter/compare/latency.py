"""The rows of latency: all arms timed at each cell."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from exporter.artifacts import LatencyRow, MachineState
from exporter.compare import cells
from exporter.compare.arms import Pair
from exporter.errors import ComparisonError

if TYPE_CHECKING:
    from exporter.artifacts.store import Store
    from exporter.compare.generating import GenerationCell
    from exporter.compare.timing.measuring import Sampling
    from exporter.compare.timing.probe import Cell, Subject


@dataclass
class Timed:
    """All rows, the machine while they were taken, and what their rounds' order was drawn from."""

    rows: list[LatencyRow] = field(default_factory=list)
    states: list[MachineState] = field(default_factory=list)
    order_seed: int = field(default_factory=lambda: secrets.randbits(32))


def time_all(pair: Pair, store: Store | None = None) -> Timed:
    """Times all arms at every cell of the options that the model reaches.

    Args:
        pair: Running arms.
        store: What a run that was cut short had timed, and where this one keeps its times.

    Raises:
        ComparisonError: No cell is left to time, or the clock jumps.
        BackendError: A run fails.
    """
    from exporter.compare.timing.subjects import RunnerSubject

    shapes, generations = cells.shapes(pair), cells.generations(pair)
    vocabulary = pair.vocabulary()
    arms = {name: RunnerSubject(arm.builds, vocabulary) for name, arm in pair.arms.items()}
    watch = _Watch(pair, store)
    if shapes:
        watch.measure(arms, shapes)
    if generations:
        # One kind of arms at a time: each holds the weights.
        for arm in arms.values():
            arm.unload()
        try:
            watch.generate(pair, vocabulary, generations)
        finally:
            for arm in arms.values():
                arm.load()
    return watch.timed


class _Watch:
    """Measures, and looks at the machine in between."""

    def __init__(self, pair: Pair, store: Store | None) -> None:
        from exporter.engines.environment import ThrottleCounts

        self.timed = Timed()
        self._pair = pair
        self._begin = time.monotonic()
        self._store = store
        self._gpu = pair.on_gpu
        self._throttle = ThrottleCounts()
        self._look()

    def measure(self, arms: Mapping[str, Subject], cells: Sequence[Cell]) -> None:
        from exporter.compare.timing.measuring import measure_rows

        self.timed.rows += measure_rows(
            arms,
            cells,
            replace(_sampling(self._pair), seed=self.timed.order_seed),
            store=self._store,
            paired=len(self._pair.judged),
            after_chunk=self._look,
            progress=self._pair.progress,
        )

    def generate(self, pair: Pair, vocabulary: int, cells: Sequence[GenerationCell]) -> None:
        arms = _decoders(pair, vocabulary)
        for arm in arms.values():
            arm.load()
        try:
            self.measure(arms, cells)
        finally:
            for arm in arms.values():
                arm.unload()

    def _look(self) -> None:
        from exporter.engines.environment import machine_state

        seconds = time.monotonic() - self._begin
        self.timed.states.append(machine_state(seconds, self._throttle, gpu=self._gpu))


def _sampling(pair: Pair) -> Sampling:
    from exporter.compare.timing.measuring import Sampling

    timing = pair.options.timing
    return Sampling(
        seconds=timing.time_budget_s,
        rounds=pair.options.rounds,
        threshold=timing.threshold,
        reload=timing.reload,
    )


def _decoders(pair: Pair, vocabulary: int) -> dict[str, Subject]:
    from exporter.compare.generating import DecoderSubject
    from exporter.engines.decoding.open_decoder import own_decoder

    found: dict[str, Subject] = {}
    for name, arm in pair.arms.items():
        decoders = [own_decoder(runner) for runner in arm.builds]
        own = [decoder for decoder in decoders if decoder is not None]
        if own:
            found[name] = DecoderSubject(own, vocabulary)
        elif name in pair.references:
            pair.progress.say(f"generate: left out for {name}, which {arm.runner.backend} runs")
        else:
            raise ComparisonError(
                f"Whole generations by {arm.runner.backend} aren't timed.", "Leave --generate out."
            )
    return found
