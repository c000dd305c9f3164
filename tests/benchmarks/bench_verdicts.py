"""How often a verdict is wrong, and how often a slowdown of 3 % is found.

Run it with ``python -m tests.benchmarks.bench_verdicts [--trials 200]``; ``--power N`` tries
``compare --power 95%`` on the same noises, ``--history N`` the search for steps in N histories of
each kind, ``--alone N`` how often it errs in N series of each kind of noise. The trials run in
virtual time, each with a budget of 60 s, on replayed decode steps of SmolLM2 that were recorded on
a busy machine of 2 cores (``decode_steps.npz``). The statistics were chosen with these in view,
except for the rows called "held out", whose steps were recorded after that, for 5 minutes each:
``MODEL.onnx --record decode_steps_held_out.npz --name 1_thread_a --threads 1`` adds one.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from exporter.artifacts import LatencyRow
from exporter.artifacts.latency import Shape
from exporter.compare.timing.measuring import TimingBudget, measure_rows
from exporter.compare.timing.statistics import PowerGoal
from exporter.compare.timing.subjects import RunnerArm
from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
from exporter.gate.curves import SHARE_OF_ALL, steps
from tests.virtual_time import HELD_OUT, RECORDED, Noise, Replayed, VirtualCell, virtual_pair

SLOWDOWN = 1.03
BUDGET_S = 60.0
_STRETCHES = 5
"""Parts of a recording, of ten to sixty seconds, that are played in an order that is drawn."""


def recorded_steps(path: Path) -> dict[str, np.ndarray]:
    """Decode steps in milliseconds, by how they were taken."""
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name].astype(np.float64) for name in file.files}


def noises() -> dict[str, tuple[Callable[[int], Noise], float]]:
    """Makers of noise by name, and the milliseconds of a quiet step."""
    results: dict[str, tuple[Callable[[int], Noise], float]] = {
        f"{what}, {name.replace('_', ' ')}": (
            lambda seed, own=own: Replayed(own, seed, stretch=len(own) / _STRETCHES),
            29.0,
        )
        for what, path in (("recorded", RECORDED), ("held out", HELD_OUT))
        for name, own in recorded_steps(path).items()
    }
    return results


def trial(
    make: Callable[[int], Noise], seed: int, *, slowdown: float, call_ms: float, lottery: float = 0
) -> LatencyRow:
    """One comparison in virtual time."""
    clock, arms = virtual_pair(
        make(seed), slowdown=slowdown, call_ms=call_ms, seed=seed, lottery=lottery, later=lottery
    )
    (row,) = measure_rows(
        arms, [VirtualCell()], TimingBudget(seconds=BUDGET_S), clocks=clock.clocks
    )
    return row


def table(trials: int, only: str = "") -> None:
    """Verdicts on equal arms, and on one that takes 3 % longer."""
    print(
        f"{trials} trials each, {BUDGET_S:.0f} s of virtual measuring time at most, threshold 1 %"
    )
    print(f"{'noise':28} {'median/min':>10} {'equal: false':>12} {'3 %: slower':>12} "
          f"{'seconds':>8} {'covered':>14}  verdicts")  # fmt: skip
    for name, (make, call_ms) in noises().items():
        if only not in name:
            continue
        equal, slower = (
            [trial(make, seed, slowdown=factor, call_ms=call_ms) for seed in range(trials)]
            for factor in (1.0, SLOWDOWN)
        )
        _print_row(name, equal, slower)


def power_table(trials: int, only: str = "", limit_s: float = 600.0) -> None:
    """How often 3 % are found where 95 % were asked for."""
    goal = PowerGoal(power=0.95, smallest=SLOWDOWN - 1, threshold=0.01)
    print(f"{trials} trials each, power 95 % at 3 %, {limit_s:.0f} s at most")
    print(f"{'noise':28} {'reached':>8} {'slower':>8} {'equal: false':>12} {'seconds':>8}")
    for name, (make, call_ms) in noises().items():
        if only not in name:
            continue
        slower, equal = (
            [_powered(make, seed, factor, call_ms, goal, limit_s) for seed in range(trials)]
            for factor in (SLOWDOWN, 1.0)
        )
        reached = [row for row in slower if row.power is not None and row.power.is_reached]
        total = sum(row.verdict == "slower" for row in reached)
        false = sum(row.verdict in ("slower", "faster") for row in equal)
        print(f"{name:28} {len(reached):8} {total:8} {false:12} "
              f"{np.median([row.seconds or 0 for row in slower]):8.0f}",
              flush=True)  # fmt: skip


def _powered(
    make: Callable[[int], Noise],
    seed: int,
    slowdown: float,
    call_ms: float,
    goal: PowerGoal,
    limit_s: float,
) -> LatencyRow:
    clock, arms = virtual_pair(make(seed), slowdown=slowdown, call_ms=call_ms, seed=seed)
    budget = TimingBudget(seconds=limit_s, power=goal)
    (row,) = measure_rows(arms, [VirtualCell()], budget, clocks=clock.clocks)
    return row


def history_table(trials: int, *, noise: float = 0.02, runs: int = 60, after: int = 5) -> None:
    """Steps of 3 % in histories: how soon they are found, where, and how often there is none."""
    rng = np.random.default_rng(24)
    print(f"{trials} histories each, {runs} runs, noise {noise:.0%} a run, step {SLOWDOWN - 1:.0%}")
    for shapes in (1, 2, 4):
        spread = noise / math.sqrt(shapes)  # of the mean of shapes, whose noise is independent
        late = spread * rng.standard_normal((trials, runs))
        late[:, -after:] += math.log(SLOWDOWN)
        middle = spread * rng.standard_normal((trials, runs))
        middle[:, runs // 2 :] += math.log(SLOWDOWN)
        soon = _found_by_run(late, after, 1.0)
        beside = soon if shapes == 1 else _found_by_run(late, after, SHARE_OF_ALL)
        whole = [[one.at for one in steps(values)] for values in middle]
        named = np.mean([any(abs(at - runs // 2) <= 2 for at in item) for item in whole])
        bound = _bound(spread, after, rng)
        print(f"mean of {shapes} shapes: found within {after} runs {soon.any(axis=1).mean():.0%} "
              f"(by the last alone {soon[:, -1].mean():.0%}, beside the shapes' own curves "
              f"{beside.any(axis=1).mean():.0%}, the bound {bound:.0%}); in the middle found "
              f"{_share(whole):.0%}, its run named within 2 {named:.0%}", flush=True)  # fmt: skip
    _false_points("normal", trials, noise, runs, rng)


def _normal(rng: np.random.Generator, runs: int) -> np.ndarray:
    return rng.standard_normal(runs)


def _heavy(rng: np.random.Generator, runs: int) -> np.ndarray:
    """Student's t with 5 degrees of freedom, of variance 1."""
    return rng.standard_t(5, runs) / math.sqrt(5 / 3)


def _kept(rng: np.random.Generator, runs: int) -> np.ndarray:
    """Each run keeps 0.3 of the one before; of variance 1."""
    fresh, values = rng.standard_normal(runs), np.empty(runs)
    values[0] = fresh[0]
    for run in range(1, runs):
        values[run] = 0.3 * values[run - 1] + math.sqrt(1 - 0.09) * fresh[run]
    return values


ALONE = {"normal": _normal, "heavy tails": _heavy, "0.3 kept": _kept}


def _found_by_run(histories: np.ndarray, after: int, share: float) -> np.ndarray:
    """Whether a check after each of the last runs tells a step, ``[histories, after]``."""
    ends = range(histories.shape[1] - after + 1, histories.shape[1] + 1)
    return np.array(
        [[bool(steps(values[:end], share=share)) for end in ends] for values in histories]
    )


def _false_points(
    kind: str, trials: int, noise: float, runs: int, rng: np.random.Generator
) -> None:
    """How many points a series of checks tells where there is noise alone, each point once."""
    new, looked = 0, 0
    for _ in range(trials):
        values = noise * ALONE[kind](rng, runs + 140)
        known: set[int] = set()
        for end in range(runs, len(values)):
            ends = {end - runs + one.at for one in steps(values[end - runs : end])}
            new += sum(all(abs(at - other) > 3 for other in known) for at in ends)
            known |= ends
            looked += 1
    print(f"noise alone, {kind}: {new} points in {looked} runs, {1000 * new / looked:.2f} in 1,000")


def _share(numbers: list[list[int]]) -> float:
    return float(np.mean([bool(number) for number in numbers]))


def _bound(noise: float, after: int, rng: np.random.Generator, error: float = 0.001) -> float:
    """What a sum control chart finds that is told level, noise and size (Page, Biometrika 1954)."""
    half = math.log(SLOWDOWN) / noise / 2

    def alarms(limit: float, shift: float, runs: int, count: int) -> np.ndarray:
        score, rung = np.zeros(count), np.zeros((runs, count), bool)
        for run in range(runs):
            score = np.maximum(0, score + rng.standard_normal(count) + shift - half)
            rung[run] = score > limit
            score[rung[run]] = 0
        return rung

    low, high = 0.5, 12.0
    for _ in range(14):
        middle = (low + high) / 2
        rate = alarms(middle, 0.0, 500, 400).mean()
        low, high = (middle, high) if rate > error else (low, middle)
    return float(alarms(high, 2 * half, after, 20_000).any(axis=0).mean())


def _print_row(name: str, equal: list[LatencyRow], slower: list[LatencyRow]) -> None:
    times = [np.array(row.baseline.samples_ms) for row in equal]
    ratio = np.median([np.median(own) / own.min() for own in times])
    words, result = Counter(r.verdict for r in equal), Counter(r.verdict for r in slower)
    false = words["faster"] + words["slower"]
    seconds = np.median([row.seconds or 0 for row in slower])
    covered = [_covered(equal, 1.0), _covered(slower, 1 / SLOWDOWN)]
    print(f"{name:28} {ratio:10.2f} {false:6} ({100 * false / len(equal):3.1f} %)"
          f" {result['slower']:4} ({100 * result['slower'] / len(slower):3.0f} %) {seconds:8.0f}"
          f" {covered[0]:6.1f} {covered[1]:6.1f} %"
          f"  {dict(words)} / {dict(result)}", flush=True)  # fmt: skip


def _covered(rows: list[LatencyRow], truth: float) -> float:
    """In how many of a hundred the reported 95 % interval holds the true ratio."""
    bounds = [row.speedup.ci95 for row in rows]
    return 100 * float(np.mean([low <= truth <= high for low, high in bounds]))


def record(model: Path, path: Path, name: str, seconds: float, threads: int, past: int) -> None:
    """Adds a recording of decode steps, as they come, to a file."""
    shape = Shape("decode", 1, 1, past)
    before, began = _processor_seconds(), time.monotonic()
    with OnnxRuntimeRunner(model, threads=threads) as runner:
        probe = RunnerArm([runner], 32).probe(shape)
        steps_ms: list[float] = []
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            steps_ms += probe.sample(time.perf_counter_ns)
    others = (_processor_seconds() - before) / (time.monotonic() - began)
    kept = {**recorded_steps(path)} if path.is_file() else {}
    kept[name] = np.array(steps_ms)
    # Half precision keeps three digits, more than steps repeat.
    halves: dict[str, Any] = {key: steps.astype(np.float16) for key, steps in kept.items()}
    np.savez_compressed(path, **halves)
    print(f"{time.strftime('%F %T')} {name}: {len(steps_ms)} steps, median "
          f"{np.median(steps_ms):.1f} ms, least {min(steps_ms):.1f} ms, "
          f"others {others:.2f} cores", flush=True)  # fmt: skip


def _processor_seconds() -> float:
    """What other processes have computed on this machine since it began."""
    user, nice, system = (
        int(n) for n in Path("/proc/stat").read_text("ascii").split(maxsplit=4)[1:4]
    )
    return (user + nice + system) / os.sysconf("SC_CLK_TCK") - sum(os.times()[:2])


def main(arguments: list[str] | None = None) -> int:
    """Prints all figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, nargs="?", help="to record")
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--power", type=int, default=0, metavar="N", help="trials with a power")
    parser.add_argument("--only", default="", metavar="TEXT", help="noises by name")
    parser.add_argument("--history", type=int, default=0, metavar="N", help="histories with steps")
    parser.add_argument("--alone", type=int, default=0, metavar="N", help="series without steps")
    parser.add_argument("--record", type=Path, metavar="FILE.npz", help="record MODEL's steps")
    parser.add_argument("--name", default="", help="of the recording")
    parser.add_argument("--seconds", type=float, default=300, help="of the recording")
    parser.add_argument("--threads", type=int, default=1, help="of the recording")
    parser.add_argument("--past", type=int, default=128, help="cache length of the recording")
    options = parser.parse_args(arguments)
    importlib.import_module("scipy.stats")  # what is there before isn't collected in each trial
    gc.collect()
    gc.freeze()
    if options.record:
        record(options.model, options.record, options.name, options.seconds, options.threads,
               options.past)  # fmt: skip
        return 0
    if options.trials:
        table(options.trials, options.only)
    if options.power:
        power_table(options.power, options.only)
    if options.history:
        history_table(options.history)
    for kind in ALONE if options.alone else ():
        _false_points(kind, options.alone, 0.02, 60, np.random.default_rng(25))
    return 0


if __name__ == "__main__":
    sys.exit(main())
