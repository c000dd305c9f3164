"""How often a verdict is wrong, and how often a slowdown of 3 % is found.

Run it with ``python -m tests.benchmarks.bench_verdicts [--trials 200]``. The trials run in virtual
time, each with a budget of 60 s, on replayed decode steps of SmolLM2 that were recorded on
a busy machine of 2 cores (``decode_steps.npz``). The statistics were chosen with these in view,
except for the rows called "held out", whose steps were recorded after that, for 5 minutes each:
``MODEL.onnx --record decode_steps_held_out.npz --name 1_thread_a --threads 1`` adds one.
"""

from __future__ import annotations

import argparse
import gc
import importlib
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
from exporter.compare.timing.subjects import RunnerArm
from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
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
    (row,) = measure_rows(arms, [VirtualCell()], TimingBudget(seconds=BUDGET_S), clock=clock)
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
    parser.add_argument("--only", default="", metavar="TEXT", help="noises by name")
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
    return 0


if __name__ == "__main__":
    sys.exit(main())
