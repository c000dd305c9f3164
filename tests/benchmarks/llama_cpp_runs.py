"""Runs GGUF files in llama.cpp: answers or times, as JSON. Needs llama-cpp-python and numpy."""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any

import llama_cpp
import numpy as np

CONTEXT = 2304
PROMPTS = (512, 2048)
STEPS = 32


def opened(path: str, *, logits: bool) -> Any:
    return llama_cpp.Llama(
        path, n_ctx=512 if logits else CONTEXT, n_batch=512, n_threads=1, n_threads_batch=1,
        logits_all=logits, flash_attn=True, verbose=False,
    )  # fmt: skip


def answers(path: str, ids: str, out: str) -> None:
    model = opened(path, logits=True)
    tokens = np.load(ids).tolist()
    model.eval(tokens)
    np.save(out, np.array(model.scores[: len(tokens)], np.float32))
    print(json.dumps({"version": llama_cpp.__version__}))


def seconds(model: Any, prompt: int) -> tuple[float, float]:
    """Of a prompt, and of one of the steps behind it."""
    tokens = [token % 40_000 + 10 for token in range(prompt)]
    model.reset()
    start = time.perf_counter()
    model.eval(tokens)
    read = time.perf_counter()
    for step in range(STEPS):
        model.eval([step + 10])
    return read - start, (time.perf_counter() - read) / STEPS


def times(rounds: int, paths: list[str]) -> None:
    models = [opened(path, logits=False) for path in paths]
    for model in models:
        seconds(model, PROMPTS[0])
    results: dict[str, list[list[float]]] = {}
    for number in range(rounds):
        for prompt in PROMPTS:
            turn = models if number % 2 == 0 else models[::-1]
            took = [seconds(model, prompt) for model in turn][:: 1 if number % 2 == 0 else -1]
            for name, place in ((f"prompt {prompt}", 0), (f"step at {prompt}", 1)):
                results.setdefault(name, []).append([item[place] for item in took])
    medians = {
        name: [statistics.median(pair[arm] for pair in pairs) for arm in range(len(paths))]
        for name, pairs in results.items()
    }
    ratios = {
        name: statistics.median(pair[0] / pair[1] for pair in pairs)
        for name, pairs in results.items()
    }
    print(json.dumps({"seconds": medians, "ratios": ratios}))


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "answers":
        answers(*rest)
    else:
        times(int(rest[0]), rest[1:])
