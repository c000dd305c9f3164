"""How many threads make a model's step fastest: tried on the machine, with the model itself.

More threads than that share memory's bandwidth and wait for each other; a runtime's own default
can take twice as long. So each number is tried in turns, on a loading of its own: threads of one
that is still loaded would go on spinning beside another's.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Protocol

from pydantic import ValidationError

from exporter.artifacts import ThreadProbe, ThreadTrial
from exporter.artifacts.latency import Shape
from exporter.artifacts.store import Store
from exporter.compare.arms import Pair
from exporter.compare.latency import generations_of, shapes_of
from exporter.compare.timing.clock import Clock, no_garbage_collection
from exporter.compare.timing.subjects import Loadable, Probe, RunnerArm
from exporter.engines.environment import default_threads
from exporter.engines.inputs import has_cache
from exporter.engines.runners.base import Runner
from exporter.progress import QUIET, Progress

_NAME = "threads"
_TIE = 0.02  # a gain of less doesn't pay for another thread
_HOPELESS = 1.5  # times the fastest: such a number has no second visit
_VISITS = 4
_FEWEST_VISITS = 2
_VISIT_MS = 120.0
_CALLS = (2, 50)
_SECONDS = 4.0  # no visits beyond the second are begun after that
_CONTEXT = 128


def candidates(most: int) -> list[int]:
    """The numbers that are tried: one to four, then in steps of about a third, and the most."""
    steps = [1, 2, 3]
    while steps[-1] < most:
        half = steps[-2] * 2
        steps.append(half)
    return [number for number in steps if number < most] + [most]


def choose_threads(
    runner: Runner,
    step: Callable[[], Shape] | None = None,
    *,
    most: int | None = None,
    vocabulary: int = 1,
    longest: int | None = None,
    clock: Clock = time.perf_counter_ns,
    progress: Progress = QUIET,
) -> ThreadProbe | None:
    """Sets a runner's threads to the number that makes its step fastest; on a tie, to the fewest.

    Each number is visited in turns, up and down, for a few seconds together. What counts for it is
    the median of its calls in its quietest visit.

    Args:
        runner: Not entered; its threads are what is chosen.
        step: What is timed, asked for once the runner is entered; by default a token after 128, or
            128 tokens where there is no cache.
        most: Threads to try at most; None for all physical cores.
        vocabulary: Tokens are drawn below it.
        longest: Positions that the model reaches; None for no limit.
        clock: In nanoseconds.
        progress: Hears what was chosen.

    Returns:
        What was tried; None where there is nothing to try: one core, a GPU, or a model that would
        have to be compiled again and again. The runner is then as it was.

    Raises:
        BackendError: The model can't be loaded or run.
        ComparisonError: An input's meaning isn't known, or there is no step to time.
    """
    # What is compiled would be compiled again for each number.
    if (runner.capabilities.device, runner.capabilities.shapes) != ("cpu", "any"):
        return None
    asked = step or partial(_default_step, runner, longest)

    def bind() -> tuple[Shape, Probe]:
        shape = asked()
        return shape, RunnerArm([runner], vocabulary).probe(shape)

    return try_threads(runner, bind, most=most, clock=clock, progress=progress)


class Threaded(Loadable, Protocol):
    """What is loaded anew with each number of threads."""

    threads: int


def try_threads(
    tried: Threaded,
    bind: Callable[[], tuple[Shape, Probe]],
    *,
    most: int | None = None,
    clock: Clock = time.perf_counter_ns,
    progress: Progress = QUIET,
) -> ThreadProbe | None:
    """The same of anything that has threads.

    Args:
        tried: Not entered.
        bind: What is timed, asked for once it is entered, and a call of it that has run once.
        most: As for :func:`choose_threads`.
        clock: In nanoseconds.
        progress: Hears what was chosen.

    Raises:
        BackendError: It can't be loaded or run.
    """
    most = default_threads() if most is None else most
    if most == 1:
        return None
    probe = _probe(tried, partial(_visit, tried, bind, clock), most, clock)
    tried.threads = fastest(probe)
    progress.say(f"threads: {tried.threads} of {most}, the fastest in a trial of {probe.step}")
    return probe


def _probe(
    runner: Threaded, visit: Callable[[], tuple[str, list[float]]], most: int, clock: Clock
) -> ThreadProbe:
    trials = {number: ThreadTrial(threads=number, visits_ms=[]) for number in candidates(most)}
    begin, named = clock(), ""
    for turn in range(_VISITS):
        late = (clock() - begin) / 1e9 > _SECONDS
        hopeful = _hopeful(trials, downwards=turn % 2 == 0)
        if turn and (len(hopeful) == 1 or (turn >= _FEWEST_VISITS and late)):
            break
        for number in hopeful:
            runner.threads = number
            named, times = visit()
            trials[number].visits_ms.append(times)
    return ThreadProbe(step=named, trials=list(trials.values()))


def fastest(probe: ThreadProbe) -> int:
    """The number whose quietest visit took least; of those that take no more, the fewest."""
    best = min(map(_quietest, probe.trials))
    return min(t.threads for t in probe.trials if _quietest(t) <= (1 + _TIE) * best)


def _default_step(runner: Runner, longest: int | None) -> Shape:
    length = _CONTEXT if longest is None else max(1, min(_CONTEXT, longest - 1))
    if has_cache(runner.inputs):
        return Shape("decode", 1, 1, length)
    return Shape("encode", 1, length)


def _hopeful(trials: dict[int, ThreadTrial], *, downwards: bool) -> list[int]:
    tried = [trial for trial in trials.values() if trial.visits_ms]
    best = min(map(_quietest, tried), default=0.0)
    found = [
        number
        for number, trial in trials.items()
        if not trial.visits_ms or _quietest(trial) <= _HOPELESS * best
    ]
    return found[::-1] if downwards else found


def _quietest(trial: ThreadTrial) -> float:
    return min(map(statistics.median, trial.visits_ms))


def _visit(
    tried: Threaded, bind: Callable[[], tuple[Shape, Probe]], clock: Clock
) -> tuple[str, list[float]]:
    """The step's name, and milliseconds of its calls."""
    with tried:
        shape, probe = bind()
        (first_ms,) = probe.sample(clock)
        fewest, most = _CALLS
        calls = max(fewest, min(most, round(_VISIT_MS / max(first_ms, 1e-3))))
        times = [first_ms] if first_ms > _VISIT_MS else []  # of a long call the first is as good
        with no_garbage_collection():
            return str(shape), times + [probe.sample(clock)[0] for _ in range(calls - len(times))]


def settle_threads(pair: Pair, store: Store) -> ThreadProbe | None:
    """Gives all arms the number of threads that makes the baseline's step fastest.

    That is its first decode step that is asked for, or its shortest prompt, but no more than 128
    tokens of it. It is not looked for where a number was asked for, and a comparison that goes on
    keeps the number it began with.

    Args:
        pair: Arms that are not running yet.
        store: What an earlier run of this comparison left, and where this one leaves it.

    Raises:
        BackendError: The baseline can't be loaded or run.
        ComparisonError: There is no step to time.
    """
    if pair.options.threads is not None or pair.on_gpu:
        return None

    def find() -> ThreadProbe | None:
        return choose_threads(
            pair.baseline.runner,
            lambda: _step(pair),
            vocabulary=pair.vocabulary(),
            progress=pair.progress,
        )

    probe = kept_threads(store, find)
    if probe is not None:
        for arm in pair.arms.values():
            _set(arm.builds, fastest(probe))
    return probe


def kept_threads(store: Store, find: Callable[[], ThreadProbe | None]) -> ThreadProbe | None:
    """What an earlier run of a comparison found, or what is found now: that is kept."""
    probe = _known(store)
    if probe is None:
        probe = find()
        if probe is not None:
            value = probe.model_dump(mode="json")
            store.keep(_NAME, value, key=_NAME, at_once=False)
    return probe


def _known(store: Store) -> ThreadProbe | None:
    kept = store.find(_NAME, key=_NAME)
    with contextlib.suppress(ValidationError):
        return None if kept is None else ThreadProbe.model_validate(kept)
    return None


def _set(runners: tuple[Runner, ...], threads: int) -> None:
    for runner in runners:
        if runner.capabilities.device == "cpu":  # one thread feeds a GPU
            runner.threads = threads


def _step(pair: Pair) -> Shape:
    quiet = replace(pair, progress=QUIET)  # what is left out is told when the others are timed
    asked = shapes_of(quiet)
    if not asked:
        cell = generations_of(quiet)[0]
        return Shape("decode", cell.batch, 1, cell.sequence_length)
    decoding = [shape for shape in asked if shape.phase == "decode"]
    if decoding:
        return decoding[0]
    shortest = min(asked, key=lambda shape: shape.batch * shape.sequence_length)
    return replace(shortest, sequence_length=min(shortest.sequence_length, _CONTEXT))
