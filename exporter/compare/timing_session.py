"""A session of timing: rows are measured, and the machine is looked at in between."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Self

from exporter.artifacts import LatencyRow, MachineState
from exporter.artifacts.store import Store
from exporter.compare.options import CompareOptions
from exporter.compare.timing.measuring import TimingBudget, measure_rows
from exporter.compare.timing.subjects import TimedArm, TimedCell
from exporter.engines.environment import GpuWatch, ThrottleCounts, machine_state
from exporter.engines.machine_watch import MachineWatch, doubt
from exporter.errors import DisturbedMachineError
from exporter.processes import cpu_times, other_cpu_share
from exporter.progress import QUIET, Progress
from exporter.report.sections.machine import machine_remarks


@dataclass
class Timed:
    """All rows, the machine while they were taken, and what their rounds' order was drawn from."""

    rows: list[LatencyRow] = field(default_factory=list)
    states: list[MachineState] = field(default_factory=list)
    order_seed: int = field(default_factory=lambda: secrets.randbits(32))
    other_cpu_share: float | None = None


class TimingSession:
    """Measures between ``__enter__`` and ``__exit__``, and looks at the machine meanwhile.

    Args:
        options: How long, and what a disturbed machine does to it.
        threads: CPU threads of the arms.
        on_gpu: Whether they run on one.
        paired: So many of the first arms are held against each other.
        store: What a run that was cut short had timed, and where this one keeps its times.
        progress: Hears what goes on.
    """

    def __init__(
        self,
        options: CompareOptions,
        threads: int,
        *,
        on_gpu: bool = False,
        paired: int = 2,
        store: Store | None = None,
        progress: Progress = QUIET,
    ) -> None:
        self.timed = Timed()
        self._options, self._threads, self._paired = options, threads, paired
        self._store, self._progress = store, progress
        self._watch = GpuWatch() if on_gpu else None
        self._entered = ExitStack()
        self._warned = False

    def __enter__(self) -> Self:
        """Takes a first look at the machine."""
        self._before = cpu_times()
        if self._watch is not None:
            self._entered.enter_context(self._watch)
        self._begin = time.monotonic()
        self._throttle, self._machine = ThrottleCounts(), MachineWatch(self._threads)
        self._look()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc_info: object) -> None:
        """Says what of the machine makes times doubtful."""
        self._entered.close()
        if kind is not None:
            return
        self.timed.other_cpu_share = other_cpu_share(self._before, cpu_times())
        for remark in machine_remarks(self.timed.states, self._threads):
            self._progress.say(f"time: {remark}")

    def measure(
        self,
        arms: Mapping[str, TimedArm],
        cells: Sequence[TimedCell],
        *,
        together: bool = True,
    ) -> None:
        """Adds the rows of all arms at all cells; see :func:`measure_rows`.

        Raises:
            DisturbedMachineError: The machine is disturbed, and that is to stop it.
            ComparisonError: The clock jumps.
            BackendError: A run fails.
        """
        timing = self._options.timing
        budget = TimingBudget(
            seconds=timing.time_budget_s,
            rounds=self._options.rounds,
            threshold=timing.threshold,
            reload=timing.reload,
            seed=self.timed.order_seed,
            power=timing.goal,
        )
        self.timed.rows += measure_rows(
            arms,
            cells,
            budget,
            store=self._store,
            paired=self._paired,
            together=together,
            after_chunk=self._look,
            progress=self._progress,
        )

    def _look(self) -> None:
        seconds = time.monotonic() - self._begin
        state = machine_state(seconds, self._throttle, self._watch, self._machine)
        self.timed.states.append(state)
        reason = doubt(self.timed.states)
        if reason and self._options.timing.on_disturbance == "stop":
            raise DisturbedMachineError(
                f"The measurement is disturbed: {reason}.",
                "Measure on a quieter machine, or with --on-disturbance warn to go on; what was "
                "timed is kept in the output folder.",
                code="disturbed-machine",
            )
        if reason and not self._warned:
            self._progress.say(f"time: the measurement is disturbed: {reason}")
            self._warned = True
