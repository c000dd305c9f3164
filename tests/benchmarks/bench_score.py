"""What scoring costs above a bare forward pass over the same tokens; LLM-Drop's own function.

Run it alone with ``python -m tests.benchmarks.bench_score [MODEL] [--llm-drop FOLDER]``; MODEL is
what `depthcut score` takes, by default the SmolLM2 of the wheel. It prints figures and asserts
nothing. The targets: all metrics of the stream in at most 1.15 times a bare pass, `kl` over all 60
sublayers in at most 32 passes, and the order of LLM-Drop's own function.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.frame import default_model, in_turns, print_head, print_machine, print_row

LENGTH = 512

# Seconds of the clock, and of the processors: the latter hold on a busy machine, too.
Times = tuple[float, float]


def print_costs(model: Any) -> None:
    """Bare and scored passes in turns; medians over the rounds, and times a bare pass."""
    from exporter.models.architectures import layer_modules
    from exporter.models.texts.calibration import CalibrationText
    from exporter.score.passes import ScoredModel, answer_scores
    from exporter.score.registry import METRICS

    ids = np.random.default_rng(0).integers(3, model.config.vocab_size, (4, LENGTH))
    few = CalibrationText.unpadded(ids[:2], "random tokens", "")
    scored = ScoredModel(model, layer_modules(model), few, batch_size=2)
    answers: list[Any] = [METRICS["kl"], METRICS["perplexity"]]
    stream = {
        "bare, without head": _pass(model.base_model, model, ids, 0),
        "cosine": _pass(model.base_model, model, ids, 1),
        "all of the stream": _pass(model.base_model, model, ids, None),
    }
    full = {
        "bare": _pass(model, model, ids[:2], 0),
        f"kl and perplexity, {2 * len(scored.layers)} sublayers": _timed(
            lambda: answer_scores(scored, answers)
        ),
    }
    print_head("passes", "rounds", "seconds", "times bare", "the same of processor time")
    for arms, rounds, name in ((stream, 7, "score-stream"), (full, 3, "score-answers")):
        for arm in list(arms.values())[: len(arms) if arms is stream else 1]:
            arm()
        times = {
            arm: np.median(taken, axis=0) for arm, taken in in_turns(arms, rounds, name).items()
        }
        bare = next(iter(times.values()))
        for arm, (wall, cpu) in times.items():
            print_row(arm, rounds, f"{wall:.3f}", f"{wall / bare[0]:.3f}", f"{cpu / bare[1]:.3f}")


def _timed(call: Callable[[], Any]) -> Callable[[], Times]:
    def run() -> Times:
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        return time.perf_counter() - wall, time.process_time() - cpu

    return run


def _pass(callee: Any, model: Any, rows: Any, count: int | None) -> Callable[[], Times]:
    """A pass over the same tokens, scored by the first metrics of the stream, or by all."""
    import torch

    from exporter.models.architectures import layer_modules
    from exporter.models.residual_stream import tapped
    from exporter.score.metric import StreamMetric
    from exporter.score.passes import ScoredStack, StreamBatch, StreamSums
    from exporter.score.registry import METRICS

    layers, ids = layer_modules(model), torch.from_numpy(rows)
    metrics = [metric for metric in METRICS.values() if isinstance(metric, StreamMetric)][:count]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}

    def bare() -> None:
        with torch.inference_mode():
            callee(**inputs)

    def scored() -> None:
        stack = ScoredStack(range(len(layers)))
        sums = StreamSums(stack, metrics)
        batch = StreamBatch(stack, metrics, inputs["attention_mask"].bool())
        with torch.inference_mode(), tapped(layers, batch):
            callee(**inputs)
        sums.add(batch.sums, batch.counts)

    return _timed(scored if metrics else bare)


def against_llm_drop(loaded: Any, checkout: Path, text: str) -> None:
    """The reference's own function on the same activations: largest difference, and the order."""
    import torch

    from exporter.models.texts.calibration import calibration_text
    from exporter.score.scoring import score_on
    from tests.benchmarks.peer_llm_drop import similarities

    calibration = calibration_text(loaded, text, samples=6, sequence_length=256)
    ours, ids = score_on(loaded, calibration), torch.from_numpy(calibration.input_ids)
    for target, kind in (("attn", "attention"), ("mlp", "mlp")):
        theirs = 1 - np.array(similarities(checkout, loaded.model, ids, target))
        scores = np.array([score.score for score in ours.scores if score.kind == kind])
        same = np.array_equal(theirs.argsort(kind="stable"), scores.argsort(kind="stable"))
        print(f"LLM-Drop's function, {kind}: largest difference {abs(theirs - scores).max():.1e}, "
              f"order {'the same' if same else 'ANOTHER'}", flush=True)  # fmt: skip


def main() -> None:
    """Prints all figures."""
    from exporter.models.loading.model_source import load_model

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--text", default="pydoc", help="for LLM-Drop's function")
    parser.add_argument("--llm-drop", type=Path, help="a checkout of CASE-Lab-UMD/LLM-Drop")
    options = parser.parse_args()
    print_machine("torch", "transformers")
    loaded = load_model(options.model or default_model())
    print_costs(loaded.model)
    if options.llm_drop is not None:
        against_llm_drop(loaded, options.llm_drop, options.text)


if __name__ == "__main__":
    main()
