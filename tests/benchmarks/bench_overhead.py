"""What the harness adds to a bare loop, and decode steps beside other libraries'.

Run it with ``python -m tests.benchmarks.bench_overhead MODEL_DIR [--seconds 30] [--threads N]
[--optimum-python PYTHON] [--genai-python PYTHON] [--genai-dir DIR]``. MODEL_DIR holds
``model.onnx`` and ``config.json``. optimum lives in an environment of its own: its python is given
by the option or ``DEPTHCUT_OPTIMUM_PYTHON``. onnxruntime-genai runs the same ONNX file and, as a
row of its own, the folder that its model builder wrote of the same weights (``--genai-dir``). What
isn't there is skipped, in words. It prints figures and asserts nothing.

The harness is held against a bare loop of ``run_with_iobinding`` over the same session and the same
binding, in turns that are drawn; the figure is the median of the differences of neighbouring turns,
by timed call. *in its times*: what the reported times hold too much. *in the whole*: what a round
takes longer than as many bare calls, those that the harness doesn't time included.
"""

from __future__ import annotations

import argparse
import inspect
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from exporter.artifacts.latency import Shape
from exporter.compare.timing.row import Rounds, calls_of_round
from exporter.compare.timing.statistics import estimate
from exporter.compare.timing.subjects import (
    CallProbe,
    Clocks,
    calls_per_visit,
    no_garbage_collection,
    warm_up,
)
from exporter.engines.decoding.runner_decoder import OnnxRuntimeDecoder
from exporter.engines.environment import default_threads
from exporter.engines.inputs import make_inputs, random_tokens
from exporter.engines.runners.base import BoundCall
from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
from tests.benchmarks.decoding_peers import (
    NEW,
    PROMPT,
    Peer,
    genai,
    genai_built,
    optimum,
)
from tests.benchmarks.machine import print_machine
from tests.benchmarks.small_model import small_model

LOADS = 8
"""Of both arms of a comparison: which was loaded last alone makes percents."""

_MIDDLE = 0.95
Turns = NDArray[np.float64]
"""Milliseconds, ``[rounds, arms, turns]``."""


@dataclass(frozen=True)
class Turn:
    """Milliseconds of one round by timed call."""

    whole: float
    told: float


def overhead(model: Path, shape: Shape, threads: int, seconds: float) -> None:
    """Prints what the harness adds to calls of one shape."""
    with OnnxRuntimeRunner(model, threads=threads) as runner:
        call = runner.prepare(make_inputs(runner.inputs, shape, random_tokens(shape, 32)))
        probes = [CallProbe(call)]
        calls = calls_per_visit(warm_up(probes, seconds=5, clock=time.perf_counter_ns).call_ms)
        rounds = Rounds(probes, calls, np.random.default_rng(0), Clocks())
        bare = _bare(call, calls_of_round(1, calls))
        pairs = _pairs(bare, lambda: _taken(rounds, 2 * calls), seconds)
    quiet = statistics.median(bare_ms for bare_ms, _ in pairs)
    print(f"{model.parent.name}, {shape}, {calls} calls in a turn, {threads} threads: "
          f"{1e3 * quiet:.1f} us a bare call")  # fmt: skip
    made = calls_of_round(1, calls) / (2 * calls)
    _print("in its times", [turn.told - bare_ms for bare_ms, turn in pairs], quiet)
    _print("in the whole", [turn.whole - made * bare_ms for bare_ms, turn in pairs], quiet)


def _print(what: str, added_ms: list[float], bare_ms: float) -> None:
    middle, low, high = _median(added_ms)
    print(f"  adds {what}: {1e3 * middle:+.2f} us [{1e3 * low:+.2f}, {1e3 * high:+.2f}], "
          f"{100 * middle / bare_ms:+.2f} % [{100 * low / bare_ms:+.2f}, "
          f"{100 * high / bare_ms:+.2f}] ({len(added_ms)} pairs)", flush=True)  # fmt: skip


def _median(values: list[float]) -> tuple[float, float, float]:
    """With the 95 % interval that order statistics give, whatever the distribution."""
    from scipy import stats

    ordered = np.sort(values)
    below = int(stats.binom.ppf((1 - _MIDDLE) / 2, len(ordered), 0.5))
    return float(np.median(ordered)), float(ordered[below]), float(ordered[-1 - below])


def _bare(call: BoundCall, calls: int) -> Callable[[], float]:
    """A loop over the session's own function; it gives milliseconds by call."""
    own = inspect.getclosurevars(call.run).nonlocals
    run, binding = own["run"], own["bounds"][0].binding

    def loop() -> float:
        begin = time.perf_counter()
        for _ in range(calls):
            run(binding)
        return (time.perf_counter() - begin) / calls * 1e3

    return loop


def _taken(rounds: Rounds, timed: int) -> Turn | None:
    begin = time.perf_counter()
    times = rounds.take()
    whole = (time.perf_counter() - begin) / timed * 1e3
    return None if times is None else Turn(whole, float(times.mean()))


def _pairs(
    bare: Callable[[], float], harness: Callable[[], Turn | None], seconds: float
) -> list[tuple[float, Turn]]:
    rng = np.random.default_rng(0)
    found: list[tuple[float, Turn]] = []
    deadline = time.monotonic() + seconds
    with no_garbage_collection():
        while time.monotonic() < deadline or len(found) < 20:
            if rng.integers(2):
                turn, bare_ms = harness(), bare()
            else:
                bare_ms, turn = bare(), harness()
            if turn is not None:
                found.append((bare_ms, turn))
    return found


def side_by_side(options: argparse.Namespace) -> None:
    """Mean time of a later token, ours and theirs, in turns that are drawn."""
    folder, threads = options.folder, options.threads
    print(f"greedy decoding of {NEW} tokens after {PROMPT}, batch 1, {threads} threads; the time "
          f"of a later token; both arms loaded, {LOADS} times, in turns the other way round; the "
          "other library in its own process")  # fmt: skip
    for peer in (
        lambda: optimum(folder, threads, options.optimum_python),
        lambda: genai(folder, threads, options.genai_python),
        lambda: genai_built(options.genai_dir, threads, options.genai_python),
    ):
        _compare(folder / "model.onnx", peer, threads, options.seconds)


def _compare(
    model: Path, peer: Callable[[], AbstractContextManager[Peer | None]], threads: int,
    seconds: float,
) -> None:  # fmt: skip
    """Prints how long a step takes beside a peer's, over several loads of both."""
    loads, told = [], ""
    for number in range(LOADS):
        with ExitStack() as stack:
            decoder = OnnxRuntimeDecoder(model, threads=threads)
            if number % 2:
                stack.enter_context(decoder)
            arm = stack.enter_context(peer())
            if arm is None:
                return
            if not number % 2:
                stack.enter_context(decoder)
            alike = "the same tokens" if arm.tokens == _own_steps(decoder)[1] else "OTHER TOKENS"
            loads.append(_paired([partial(_own_ms, decoder), arm.step_ms], seconds / LOADS))
            versions = ", ".join(f"{name} {version}" for name, version in arm.versions.items())
            told = f"{arm.name} ({versions}): {arm.same}; {alike}"
    _print_peer(told, loads)


def _print_peer(told: str, loads: list[Turns]) -> None:
    rounds = min(map(len, loads))
    turns = np.concatenate([load[:rounds] for load in loads])
    found = estimate(np.log(turns[:, 0] / turns[:, 1]), groups=len(loads), alternating=True)
    (low, high), ratio = found.interval(), np.exp(found.log_ratio)
    ours, theirs = np.median(turns, axis=(0, 2))
    print(f"{told}\n  depthcut {ours:.2f} ms, it {theirs:.2f} ms; depthcut takes {ratio:.3f} "
          f"[{low:.3f}, {high:.3f}] of its time", flush=True)  # fmt: skip
    each = " ".join(f"{np.exp(np.log(load[:, 0] / load[:, 1]).mean()):.3f}" for load in loads)
    print(f"  by load, depthcut last and first in turns: {each}", flush=True)


def _paired(arms: list[Callable[[], float]], seconds: float) -> Turns:
    """The times of turns that are drawn."""
    rng = np.random.default_rng()
    times = []
    deadline = time.monotonic() + seconds
    with no_garbage_collection():
        while time.monotonic() < deadline or len(times) < 2:
            order = [int(arm) for arm in rng.permutation(2)]
            turns: list[list[float]] = [[], []]
            for arm in (*order, *reversed(order)):
                turns[arm].append(arms[arm]())
            times.append(turns)
    return np.array(times)


def _own_ms(decoder: OnnxRuntimeDecoder) -> float:
    return _own_steps(decoder)[0]


def _own_steps(decoder: OnnxRuntimeDecoder) -> tuple[float, list[int]]:
    ids = np.arange(3, 3 + PROMPT)[None]
    token = decoder.prefill(ids, context=PROMPT + NEW).argmax(-1)
    tokens, begin = [int(token[0])], time.perf_counter()
    for _ in range(NEW - 1):
        token = decoder.step(token[:, None]).argmax(-1)
        tokens.append(int(token[0]))
    return (time.perf_counter() - begin) / (NEW - 1) * 1e3, tokens


def main(arguments: list[str] | None = None) -> int:
    """Prints all figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--optimum-python", default=os.environ.get("DEPTHCUT_OPTIMUM_PYTHON"))
    parser.add_argument("--genai-python", default=sys.executable)
    parser.add_argument("--genai-dir", type=Path)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--seconds", type=float, default=30.0, help="for each figure")
    options = parser.parse_args(arguments)
    print_machine("scipy")
    model = options.folder / "model.onnx"
    with tempfile.TemporaryDirectory() as folder:
        tiny = small_model(Path(folder) / "tiny")
        overhead(tiny, Shape("decode", 1, 1, 16), 1, options.seconds / 4)
    overhead(model, Shape("decode", 1, 1, 128), options.threads, options.seconds)
    side_by_side(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
