"""Times requests, and brings a plan's measured speedup to the target: cut, measure, correct."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from exporter.artifacts import PruningPlan, Speedup
from exporter.artifacts.loaded_plan import LoadedPlan
from exporter.choose.budgets.budget import Budget
from exporter.choose.budgets.options import PlanCandidate, on_graph
from exporter.choose.costs.measuring import (
    CostRunner,
    CostSettings,
    Effort,
    RequestEstimate,
    graph_runner,
    measure_on,
    of_rows,
    time_request,
)
from exporter.choose.costs.table import CostTable, RequestShape
from exporter.choose.costs.weighing import GraphSizes, sizes
from exporter.engines.environment import default_threads
from exporter.errors import PlanError, UnmetGoalError
from exporter.heal.plan_file import write_healed_plan
from exporter.printable import counted
from exporter.progress import QUIET, Progress
from graph_passes.files.placing import SCRATCH

ROUNDS = 4
"""Candidates that are measured at most."""
TOLERANCE = 0.03
"""How far the measured speedup may be from the target, as a share of it."""
_MOST_CHANGE = 2.0
"""A single measurement changes the goal at most by this factor: it may have been disturbed."""


@dataclass(frozen=True, eq=False)
class TimedCandidate:
    """A candidate that was cut and measured."""

    candidate: PlanCandidate
    speedup: Speedup

    def miss(self, target: float) -> float:
        """How far from the target, as a share of it."""
        return abs(self.speedup.ratio / target - 1)


def reach_speedup(
    target: float,
    goal_ms: float,  # what has to go from a request's time, in the costs' milliseconds
    solve: Callable[[float], PlanCandidate],  # chooses a candidate that saves so many ms
    measure: Callable[[PlanCandidate], Speedup],
    *,
    rounds: int = ROUNDS,
    progress: Progress = QUIET,
) -> TimedCandidate:
    """Chooses, measures and corrects until the measured speedup is near the target.

    What costs foretell is wrong by some factor: a candidate shows by which, and the next goal is
    larger or smaller by it.
    """
    tried: list[TimedCandidate] = []
    while len(tried) < rounds:
        try:
            candidate = solve(goal_ms)
        except PlanError as error:
            if not tried:
                raise
            nearest = _best(tried, target).speedup.ratio
            if nearest >= target * (1 - TOLERANCE):
                break
            raise UnmetGoalError(
                f"A speedup of {target:g} is out of reach: the nearest candidate measured "
                f"{nearest:.3f} times as fast, and no more can be dropped. {error}",
                f"Ask for at most {nearest:.3f}, allow more damage, or let more be dropped.",
                code="out-of-reach",
            ) from error
        if any(candidate.choices == item.candidate.choices for item in tried):
            break  # one sublayer more or less is all there is between
        speedup = measure(candidate)
        tried.append(TimedCandidate(candidate, speedup))
        low, high = speedup.ci95
        progress.say(
            f"plan: a candidate without {counted(len(candidate.choices), 'sublayer')} measures "
            f"{speedup.ratio:.3f} [{low:.3f}, {high:.3f}]; the target is {target:g}"
        )
        if tried[-1].miss(target) <= TOLERANCE:
            break
        saved, wanted = 1 - 1 / speedup.ratio, 1 - 1 / target
        factor = wanted / saved if saved > 0 else math.inf
        goal_ms *= min(max(factor, 1 / _MOST_CHANGE), _MOST_CHANGE)
    best = _best(tried, target)
    low, high = best.speedup.ci95
    if best.miss(target) > TOLERANCE:
        progress.say(
            f"plan: warning: the chosen candidate is not within {TOLERANCE:.0%} of a speedup of "
            f"{target:g}: it measures {best.speedup.ratio:.3f}"
        )
    elif any(abs(end / target - 1) > TOLERANCE for end in best.speedup.ci95):
        progress.say(
            f"plan: warning: a speedup within {TOLERANCE:.0%} of {target:g} is not proven: the "
            f"interval reaches from {low:.3f} to {high:.3f}; use a quieter machine or more time"
        )
    return best


def _best(tried: list[TimedCandidate], target: float) -> TimedCandidate:
    """The slowest that reaches the target; where none does, the nearest.

    Faster than that costs answers for nothing. Those come first whose whole interval reaches it.
    """
    least = target * (1 - TOLERANCE)
    surely = [item for item in tried if item.speedup.ci95[0] >= least]
    reaching = surely or [item for item in tried if item.speedup.ratio >= least]
    if reaching:
        return min(reaching, key=lambda item: item.speedup.ratio)
    return min(tried, key=lambda item: item.miss(target))


_WIDTH = 0.01
"""Of an interval to either side, as a share, with which a candidate is known well enough."""


@dataclass
class Stopwatch:
    """Times a graph on ONNX Runtime."""

    onnx: Path
    at: RequestShape
    work: Path  # keeps the costs, and takes candidates for a while
    provider: str = "cpu"
    threads: int | None = None  # None takes all physical cores
    candidates: Effort = field(default_factory=lambda: Effort(seconds=120.0))
    progress: Progress = QUIET

    @cached_property
    def _runner(self) -> CostRunner:
        return graph_runner(self.onnx, self.work / SCRATCH, self.provider)

    def costs(self) -> CostTable:
        """What each sublayer's removal saves, for every replacement."""
        kept, clock = self.work / "costs.jsonl", self.candidates.clock
        settings = CostSettings(self.at, self.threads, kept=kept, clock=clock)
        return measure_on(self._runner, settings, self.progress)

    def speedup(self, candidate: PlanCandidate) -> Speedup:
        """How much faster the finished candidate answers."""
        runner, cells = self._runner, self.at.cells(cached=self._runner.sizes.has_cache)
        runner.threads = self.threads or default_threads()

        def is_narrow(estimate: RequestEstimate) -> bool:
            ratio, (low, high) = estimate.speedup.ratio, estimate.speedup.ci95
            return max(high / ratio, ratio / low) <= 1 + _WIDTH

        assert runner.cut is not None  # graphs are
        with ExitStack() as stack:
            place = stack.enter_context(tempfile.TemporaryDirectory(prefix=".plan.", dir=self.work))
            path = Path(place) / "plan.json"
            write_healed_plan(path, PruningPlan(deletions=candidate.deletions), candidate.cut)
            cut = stack.enter_context(runner.cut(LoadedPlan.read(path)))
            arms = stack.enter_context(runner.beside({"candidate": cut}))
            rows = time_request(arms, cells, self.candidates, is_narrow, self.progress)
        return of_rows(rows, [count for _, count in cells]).speedup


def timed_on(
    graph: Path,
    budget: Budget,
    work: Path,
    run: tuple[str, int | None],  # provider and threads
    effort: Effort,
    progress: Progress = QUIET,
) -> tuple[Budget, GraphSizes, Stopwatch | None]:
    """A budget as an exported graph allows it, the graph's sizes, and what times its request."""
    weighed = sizes(graph)
    budget, watch = on_graph(budget, weighed, progress), None
    if budget.at is not None:
        watch = Stopwatch(graph, budget.at, work, *run, effort, progress)
    return budget, weighed, watch
