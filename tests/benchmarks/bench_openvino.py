"""ONNX files in OpenVINO: their logits held against ONNX Runtime's, in a prompt and in steps."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import openvino

from exporter.artifacts.latency import Shape
from exporter.engines.decoding.decoder import runner_caches
from exporter.engines.inputs import make_inputs
from exporter.engines.runners.base import Array, Runner
from exporter.engines.runners.registry import open_runner
from exporter.models.graph_facts import read_facts
from exporter.models.model_folder import find_model
from tests.benchmarks.machine import print_machine

PROMPT, STEPS = 256, 8
MOST_ERROR = 1e-3


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench_openvino")
    parser.add_argument("models", nargs="+", type=Path)
    options = parser.parse_args()
    print_machine("openvino", "onnxruntime")
    print(f"| model | error, prompt of {PROMPT} | error, {STEPS} steps | OpenVINO |")
    worst = max(_row(find_model(model).onnx) for model in options.models)
    return int(worst > MOST_ERROR)


def _row(onnx: Path) -> float:
    tokens = np.random.default_rng(0).integers(0, read_facts(onnx).vocabulary, (1, PROMPT + STEPS))
    found = []
    for name in ("onnx", "openvino"):
        with open_runner(name, onnx, threads=1) as runner:
            found.append(_logits(runner, tokens))
    ours, theirs = found
    errors = [
        float(np.abs(a - b).max() / np.abs(a).max())
        for a, b in ((ours[:PROMPT], theirs[:PROMPT]), (ours[PROMPT:], theirs[PROMPT:]))
    ]
    version = openvino.__version__.split("-")[0]
    print(f"| {onnx} | {errors[0]:.1e} | {errors[1]:.1e} | {version} |", flush=True)
    return max(errors)


def _logits(runner: Runner, tokens: Array) -> Array:
    """Those of the prompt, and of each step on the caches that the call before gave."""
    caches, found = runner_caches(runner), []
    cache: dict[str, Array] | None = None
    for begin, end in ((0, PROMPT), *((n, n + 1) for n in range(PROMPT, PROMPT + STEPS))):
        shape = Shape("decode" if begin else "prefill", 1, end - begin, begin)
        inputs = make_inputs(runner.inputs, shape, tokens[:, begin:end], cache=cache)
        given = runner.run(inputs, ["logits", *caches.values()], phase=shape.phase)
        found.append(given["logits"][0])
        cache = {past: given[present] for past, present in caches.items()}
    return np.concatenate(found)


if __name__ == "__main__":
    sys.exit(main())
