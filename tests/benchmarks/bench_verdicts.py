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
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from exporter.artifacts import LatencyRow
from exporter.artifacts.latency import Shape
from exporter.compare.timing.measuring import TimingBudget, measure_rows
from exporter.compare.timing.subjects import RunnerArm
from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
from tests.benchmarks.frame import print_head, print_row
from tests.virtual_time import HELD_OUT, RECORDED, Replayed, VirtualCell, virtual_pair

SLOWDOWN = 1.03
BUDGET = TimingBudget(seconds=60.0)
CALL_MS = 29.0  # of a step on a quiet machine
_STRETCHES = 5
"""Parts of a recording, of ten to sixty seconds, that are played in an order that is drawn."""

Floats = NDArray[np.float64]


def recorded_steps(path: Path) -> dict[str, Floats]:
    """Decode steps in milliseconds, by how they were taken."""
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name].astype(np.float64) for name in file.files}


def table(trials: int, only: str) -> None:
    """Verdicts on equal arms, and on one that takes 3 % longer."""
    print(f"{trials} trials each, {BUDGET.seconds:.0f} s of virtual measuring time at most")
    print_head("noise", "median/min", "equal: false", "3 %: slower", "seconds", "covered of 100",
               "verdicts")  # fmt: skip
    for what, path in (("recorded", RECORDED), ("held out", HELD_OUT)):
        for kind, own in recorded_steps(path).items():
            if only in (name := f"{what}, {kind.replace('_', ' ')}"):
                _print_trials(name, own, trials)


def _print_trials(name: str, own: Floats, trials: int) -> None:
    def trial(seed: int, slowdown: float) -> LatencyRow:
        noise = Replayed(own, seed, stretch=len(own) / _STRETCHES)
        clock, arms = virtual_pair(noise, slowdown=slowdown, call_ms=CALL_MS, seed=seed)
        (row,) = measure_rows(arms, [VirtualCell()], BUDGET, clock=clock)
        return row

    def covered(rows: list[LatencyRow], truth: float) -> float:
        bounds = [row.speedup.ci95 for row in rows]
        return 100 * float(np.mean([low <= truth <= high for low, high in bounds]))

    equal, slower = ([trial(seed, by) for seed in range(trials)] for by in (1.0, SLOWDOWN))
    samples = [np.array(row.baseline.samples_ms) for row in equal]
    words, others = (Counter(row.verdict for row in rows) for rows in (equal, slower))
    print_row(
        name, f"{np.median([np.median(ms) / ms.min() for ms in samples]):.2f}",
        words["faster"] + words["slower"], others["slower"],
        f"{np.median([row.seconds or 0 for row in slower]):.0f}",
        f"{covered(equal, 1.0):.1f} and {covered(slower, 1 / SLOWDOWN):.1f}",
        f"{dict(words)} / {dict(others)}",
    )  # fmt: skip


def record(model: Path, path: Path, name: str, threads: int) -> None:
    """Adds a recording of decode steps, as they come in 5 minutes, to a file."""
    steps_ms: list[float] = []
    with OnnxRuntimeRunner(model, threads=threads) as runner:
        probe, end = (
            RunnerArm([runner], 32).probe(Shape("decode", 1, 1, 128)),
            time.monotonic() + 300,
        )
        while time.monotonic() < end:
            steps_ms += probe.sample(time.perf_counter_ns)
    kept = {**(recorded_steps(path) if path.is_file() else {}), name: np.array(steps_ms)}
    # Half precision keeps three digits, more than steps repeat.
    np.savez_compressed(path, **{key: own.astype(np.float16) for key, own in kept.items()})  # type: ignore[arg-type]
    print(f"{time.strftime('%F %T')} {name}: {len(steps_ms)} steps, {np.median(steps_ms):.1f} ms")


def main() -> int:
    """Prints all figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, nargs="?", help="to record")
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--only", default="", metavar="TEXT", help="noises by name")
    parser.add_argument("--record", type=Path, metavar="FILE.npz", help="record MODEL's steps")
    parser.add_argument("--name", default="", help="of the recording")
    parser.add_argument("--threads", type=int, default=1, help="of the recording")
    options = parser.parse_args()
    importlib.import_module("scipy.stats")  # what is there before isn't collected in each trial
    gc.collect()
    gc.freeze()
    if options.record:
        record(options.model, options.record, options.name, options.threads)
        return 0
    table(options.trials, options.only)
    return 0


if __name__ == "__main__":
    sys.exit(main())
