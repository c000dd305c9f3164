"""What the harness adds to a bare loop, and decode steps beside other libraries'.

Run it with ``python -m tests.benchmarks.bench_overhead MODEL_DIR [--optimum-python PYTHON]
[--genai-dir DIR] [--threads N]``. MODEL_DIR holds ``model.onnx`` and ``config.json``. optimum lives
in an environment of its own: its python is given by the option or ``DEPTHCUT_OPTIMUM_PYTHON``.
onnxruntime-genai needs a folder that its own model builder wrote: the same weights, but a graph of
its own with fused attention, so that row compares whole products. What isn't there is skipped, in
words. It prints figures and asserts nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np

from exporter.backends.onnxruntime import OnnxRuntimeRunner
from exporter.generation.onnxruntime_decoder import OnnxRuntimeDecoder
from exporter.measure.environment import default_threads
from exporter.measure.inputs import Shape, make_inputs, random_tokens
from exporter.measure.statistics import Estimate, estimate
from exporter.measure.timing.clock import Clocks, no_garbage_collection
from exporter.measure.timing.probe import CallProbe
from exporter.measure.timing.rounds import Rounds
from tests.benchmarks.machine import print_machine

PROMPT, NEW = 64, 32
BLOCK = 8

# Reads a line, generates, writes the mean milliseconds of a later token.
OPTIMUM = """
import sys, time, json, torch
from optimum.onnxruntime import ORTModelForCausalLM
import onnxruntime
folder, threads, prompt, new = sys.argv[1], *map(int, sys.argv[2:])
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = threads
model = ORTModelForCausalLM.from_pretrained(folder, session_options=options, use_io_binding=True)
torch.set_num_threads(threads)
ids = torch.arange(3, 3 + prompt)[None]
def steps():
    found = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)
    token, past, begin = found.logits[:, -1:].argmax(-1), found.past_key_values, time.perf_counter()
    for number in range(new - 1):
        mask = torch.ones((1, prompt + number + 1), dtype=torch.int64)
        found = model(input_ids=token, attention_mask=mask, past_key_values=past, use_cache=True)
        token, past = found.logits[:, -1:].argmax(-1), found.past_key_values
    return (time.perf_counter() - begin) / (new - 1) * 1e3
steps()
print("ready", flush=True)
for line in sys.stdin:
    print(json.dumps(steps()), flush=True)
"""


def overhead(model: Path, threads: int, seconds: float) -> None:
    """The harness's calls and a bare loop's over the same binding, in turns that are drawn."""
    rng = np.random.default_rng(0)
    with OnnxRuntimeRunner(model, threads=threads) as runner:
        for shape in (Shape("decode", 1, 1, 128), Shape("prefill", 1, 64)):
            call = runner.prepare(make_inputs(runner.inputs, shape, random_tokens(shape, 32)))
            rounds = Rounds([CallProbe(call)], BLOCK // 2, rng, Clocks())
            arms: list[Callable[[], float]] = [lambda c=call: _bare(c), lambda r=rounds: _taken(r)]
            found = _paired(arms, seconds, rng)
            low, high = found.interval()
            more = [100 * (1 / ratio - 1) for ratio in (np.exp(found.log_ratio), high, low)]
            print(f"harness over bare loop, {shape}: {more[0]:+.2f} % "
                  f"[{more[1]:+.2f}, {more[2]:+.2f}] of the whole time")  # fmt: skip


def _bare(call: Callable[[], None]) -> float:
    """A call of as many as a round of the harness makes, those that it doesn't time included."""
    begin = time.perf_counter()
    for _ in range(BLOCK + 2):
        call()
    return time.perf_counter() - begin


def _taken(rounds: Rounds) -> float:
    begin = time.perf_counter()
    rounds.take()
    return time.perf_counter() - begin


def _paired(arms: list[Callable[[], float]], seconds: float, rng: np.random.Generator) -> Estimate:
    """The log of the first arm's time over the second's is below 0 where the first is faster."""
    ratios = []
    deadline = time.monotonic() + seconds
    with no_garbage_collection():
        while time.monotonic() < deadline or len(ratios) < 6:
            order = [int(arm) for arm in rng.permutation(2)]
            times = [0.0, 0.0]
            for arm in (*order, *reversed(order)):
                times[arm] += arms[arm]()
            ratios.append(np.log(times[0] / times[1]))
    return estimate(np.array(ratios))


def side_by_side(folder: Path, threads: int, seconds: float, options: argparse.Namespace) -> None:
    """Mean time of a later token, ours and theirs, in turns that are drawn."""
    rng = np.random.default_rng(0)
    with OnnxRuntimeDecoder(folder / "model.onnx", threads=threads) as decoder:
        peers = {"optimum": _optimum(folder, threads, options.optimum_python),
                 "onnxruntime-genai": _genai(options.genai_dir, threads)}  # fmt: skip
        for name, peer in peers.items():
            if peer is None:
                continue
            found = _paired([lambda: _own_steps(decoder), peer], seconds, rng)
            low, high = found.interval()
            ratio = np.exp(found.log_ratio)
            print(f"decode step after {PROMPT}, {threads} threads: depthcut takes {ratio:.3f} "
                  f"[{low:.3f}, {high:.3f}] of the time of {name}")  # fmt: skip


def _own_steps(decoder: OnnxRuntimeDecoder) -> float:
    ids = np.arange(3, 3 + PROMPT)[None]
    token = decoder.prefill(ids, context=PROMPT + NEW).argmax(-1)
    begin = time.perf_counter()
    for _ in range(NEW - 1):
        token = decoder.step(token[:, None]).argmax(-1)
    return (time.perf_counter() - begin) / (NEW - 1) * 1e3


def _optimum(folder: Path, threads: int, python: str | None) -> Callable[[], float] | None:
    if not python:
        print("optimum: skipped, no python of its environment is given (--optimum-python)")
        return None
    command = [python, "-c", OPTIMUM, str(folder), str(threads), str(PROMPT), str(NEW)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    if process.stdout.readline().strip() != "ready":
        print("optimum: skipped, it failed to load the model (see above)")
        return None
    return lambda: _asked(process.stdin, process.stdout)


def _asked(to: IO[str] | None, back: IO[str] | None) -> float:
    assert to is not None
    assert back is not None
    to.write("go\n")
    to.flush()
    return float(json.loads(back.readline()))


def _genai(folder: Path | None, threads: int) -> Callable[[], float] | None:
    if folder is None:
        print("onnxruntime-genai: skipped, no folder of its model builder is given (--genai-dir)")
        return None
    try:
        import onnxruntime_genai as genai
    except ImportError:
        print("onnxruntime-genai: skipped, it isn't installed")
        return None
    config: Any = genai.Config(str(folder))
    overlay = {"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}
    config.overlay(json.dumps(overlay))
    model = genai.Model(config)

    def steps() -> float:
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=PROMPT + NEW, min_length=PROMPT + NEW)
        generator = genai.Generator(model, parameters)
        generator.append_tokens(np.arange(3, 3 + PROMPT, dtype=np.int32)[None])
        generator.generate_next_token()
        begin = time.perf_counter()
        for _ in range(NEW - 1):
            generator.generate_next_token()
        return (time.perf_counter() - begin) / (NEW - 1) * 1e3

    return steps


def main(arguments: list[str] | None = None) -> int:
    """Prints all figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--optimum-python", default=os.environ.get("DEPTHCUT_OPTIMUM_PYTHON"))
    parser.add_argument("--genai-dir", type=Path)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--seconds", type=float, default=60.0, help="for each figure")
    options = parser.parse_args(arguments)
    print_machine("scipy", "onnxruntime-genai")
    overhead(options.folder / "model.onnx", options.threads, options.seconds)
    side_by_side(options.folder, options.threads, options.seconds, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
