"""What the timing harness costs, and how often its verdicts are wrong or missing.

Run it alone with ``python tests/benchmarks/bench_latency.py [MODEL.onnx]``; without a model it
makes a small one. It prints figures and asserts nothing.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from exporter.artifacts import FEWEST_ROUNDS, Speedup
from exporter.backends.base import BoundCall
from exporter.backends.onnxruntime import OnnxRuntimeRunner
from exporter.measure.environment import default_threads
from exporter.measure.inputs import Shape, has_cache, make_inputs, random_tokens
from exporter.measure.latency import Sampling, measure_row, sample_pair, warm_up
from exporter.measure.statistics import Milliseconds, paired_speedup, verdict

TRIALS = 200
FEW_ROUNDS_TRIALS = 2000


def overhead(call: BoundCall, label: str) -> None:
    """The harness's median against that of a bare loop over the same bound call, in turns."""
    sampling = Sampling(rounds=2, row_seconds=0.0)
    warm = warm_up(call, call, sampling)
    bare: list[float] = []
    kept: list[float] = []
    deadline = time.monotonic() + 10.0
    while time.monotonic() < deadline:
        taken = sample_pair(call, call, sampling, call_ms=warm.call_ms)
        kept.extend(np.concatenate(taken).ravel())
        bare.extend(_bare_loop(call, len(kept) - len(bare)))
    ratio = np.median(kept) / np.median(bare)
    print(f"overhead, {label}: bare {np.median(bare):.4g} ms, harness {np.median(kept):.4g} ms "
          f"({100 * (ratio - 1):+.2f} %, {len(kept)} calls each)")  # fmt: skip


def _bare_loop(call: BoundCall, calls: int) -> list[float]:
    times = []
    for _ in range(calls):
        begin = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - begin) / 1e6)
    return times


def real_against_itself(model: Path, shape: Shape, trials: int) -> None:
    """Verdicts of two sessions of the same file: each ``faster`` or ``slower`` is a false one."""
    found: Counter[str] = Counter()
    threads = default_threads()
    first, second = (OnnxRuntimeRunner(model, threads=threads) for _ in range(2))
    sampling = Sampling(rounds=8, row_seconds=3.0, warmup_seconds=3.0)
    widths = []
    with first, second:
        for _ in range(trials):
            row = measure_row(first, second, shape, 32, sampling)
            found[row.verdict] += 1
            widths.append(row.speedup.ci95[1] - row.speedup.ci95[0])
    print(f"A/A on real sessions, {shape}: {dict(found)}, median width {np.median(widths):.3f}")


def synthetic_table() -> None:
    """False alarms and power on synthetic times, 200 trials a cell."""
    print(f"verdicts in {TRIALS} trials; noise: spread of a drift that both arms share")
    for noise in (0.02, 0.1, 0.3):
        for rounds, calls in ((6, 2), (24, 8), (60, 16)):
            for slowdown in (1.0, 1.03, 1 / 1.1):
                found = Counter(
                    _verdict(np.random.default_rng(trial), rounds, calls, slowdown, noise)
                    for trial in range(TRIALS)
                )
                print(f"  noise {noise:<4}  {rounds:>2} rounds x {calls:>2}  "
                      f"candidate takes x {slowdown:.3f}: {dict(found)}")  # fmt: skip


def _verdict(
    rng: np.random.Generator, rounds: int, calls: int, slowdown: float, noise: float
) -> str:
    shared = np.exp(noise * rng.standard_normal((rounds, 1)))

    def arm(median_ms: float) -> Milliseconds:
        own = np.exp(0.3 * noise * rng.standard_normal((rounds, 1)))
        jitter = np.exp(0.02 * rng.standard_normal((rounds, calls)))
        tail = noise * rng.exponential(1, (rounds, calls)) * (rng.random((rounds, calls)) < 0.3)
        return median_ms * shared * own * jitter * (1 + tail)

    return verdict(paired_speedup(arm(30.0), arm(30.0 * slowdown), seed=0), rounds=rounds)


def few_rounds_table() -> None:
    """How often the interval misses the truth of equal arms, and a word by it alone is false."""
    print(f"equal arms, 3 % own spread a round, {FEW_ROUNDS_TRIALS} trials")
    for rounds in range(2, 9):
        found = [_equal_arms(np.random.default_rng(t), rounds) for t in range(FEW_ROUNDS_TRIALS)]
        misses = np.mean([not s.ci95[0] <= 1 <= s.ci95[1] for s in found])
        # A verdict of its own would say nothing of few rounds: that is what is shown here.
        words = [verdict(speedup, rounds=FEWEST_ROUNDS) for speedup in found]
        false = np.mean([word in ("faster", "slower") for word in words])
        print(f"  {rounds} rounds: misses {100 * misses:.1f} %, false words {100 * false:.1f} %")


def _equal_arms(rng: np.random.Generator, rounds: int) -> Speedup:
    own = 10 * np.exp(0.03 * rng.standard_normal((2, rounds, 1)))
    times = own * np.exp(0.005 * rng.standard_normal((2, rounds, 2)))
    return paired_speedup(times[0], times[1], seed=0)


def main(arguments: list[str] | None = None) -> int:
    """Prints all figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--trials", type=int, default=5, help="A/A trials on real sessions")
    parser.add_argument("--no-table", action="store_true", help="leave the synthetic tables out")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or _small_model(Path(folder))
        _on_model(model, options.trials)
    if not options.no_table:
        synthetic_table()
        few_rounds_table()
    return 0


def _on_model(model: Path, trials: int) -> None:
    with OnnxRuntimeRunner(model, threads=default_threads()) as runner:
        cached = has_cache(runner.inputs)
        shapes = [Shape("prefill" if cached else "encode", 1, 16)]
        shapes += [Shape("decode", 1, 1, 512)] if cached else []
        for shape in shapes:
            inputs = make_inputs(runner.inputs, shape, random_tokens(shape, 32))
            overhead(runner.prepare(inputs), str(shape))
    real_against_itself(model, shapes[-1], trials)


def _small_model(folder: Path) -> Path:
    sys.path.insert(0, str(Path(__file__).parents[1] / "exporter"))
    write: Callable[[Path], Path]
    from tiny_lm import write_tiny_lm as write

    return write(folder) / "model.onnx"


if __name__ == "__main__":
    sys.exit(main())
