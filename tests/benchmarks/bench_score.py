"""What scoring costs above a bare forward pass over the same tokens; LLM-Drop's own function.

Run it alone with ``python -m tests.benchmarks.bench_score [MODEL] [--llm-drop FOLDER]``; MODEL is
what `depthcut score` takes, by default the SmolLM2 of the wheel. It prints figures and asserts
nothing. The targets: all metrics of the stream in at most 1.15 times a bare pass, `kl` over all 60
sublayers in at most 32 passes, and the order of LLM-Drop's own function.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.benchmarks.frame import default_model, print_machine

ROUNDS = 7
BATCH, LENGTH = 4, 512
ANSWER_ROUNDS, ANSWER_SAMPLES = 3, 2

# Seconds of the clock, and of the processors: the latter hold on a busy machine, too.
Times = tuple[float, float]


def time_ratio(model: Any) -> None:
    """Bare and scored passes in turns, called in the same way; medians over the rounds."""
    arms = _arms(model, _ids(model, BATCH), with_head=False)
    for arm in arms.values():
        arm()
    times = _in_turns(arms, ROUNDS)
    bare = _medians(times["bare"])
    print(f"without head, {BATCH} x {LENGTH} tokens: bare {bare[0]:.3f} s (medians of {ROUNDS})")
    for name in ("cosine", "all of the stream"):
        wall, cpu = _medians(times[name])
        print(
            f"  scored by {name}: {wall:.3f} s, ratio {wall / bare[0]:.3f}; "
            f"of processor time {cpu / bare[1]:.3f}",
            flush=True,
        )


def answers_in_passes(model: Any) -> None:
    """What `kl` over all sublayers costs, in bare passes with logits over the same tokens."""
    from exporter.models.architectures import layer_modules
    from exporter.score import METRICS
    from exporter.score.passes import ScoredModel, answer_scores

    text = _random_text(model, ANSWER_SAMPLES)
    scored = ScoredModel(model, layer_modules(model), text, batch_size=ANSWER_SAMPLES)
    metrics: list[Any] = [METRICS["kl"], METRICS["perplexity"]]
    arms = {
        "bare": _arms(model, [torch_ids(text.input_ids)], with_head=True)["bare"],
        "kl": lambda: answer_scores(scored, metrics),
    }
    arms["bare"]()
    times = _in_turns(arms, ANSWER_ROUNDS)
    bare, kl = _medians(times["bare"]), _medians(times["kl"])
    sublayers = 2 * len(scored.layers)
    print(
        f"kl and perplexity over {sublayers} sublayers, {ANSWER_SAMPLES} x {LENGTH} tokens: "
        f"{kl[0]:.1f} s, {kl[0] / bare[0]:.1f} bare passes of {bare[0]:.3f} s; of processor time "
        f"{kl[1] / bare[1]:.1f} (medians of {ANSWER_ROUNDS}; {sublayers} without reuse)",
        flush=True,
    )


def against_llm_drop(loaded: Any, checkout: Path, text: str) -> None:
    """The reference's own function on the same activations: largest difference, and the order."""
    import numpy as np

    from exporter.score import calibration_text, score_on
    from tests.benchmarks.peer_llm_drop import similarities

    calibration = calibration_text(loaded, text, samples=6, sequence_length=256)
    ours = score_on(loaded, calibration)
    for target, kind in (("attn", "attention"), ("mlp", "mlp")):
        theirs = 1 - np.array(
            similarities(checkout, loaded.model, torch_ids(calibration.input_ids), target)
        )
        scores = np.array([score.score for score in ours.scores if score.kind == kind])
        same = np.array_equal(theirs.argsort(kind="stable"), scores.argsort(kind="stable"))
        print(f"LLM-Drop's function, {kind}: largest difference {abs(theirs - scores).max():.1e}, "
              f"order {'the same' if same else 'ANOTHER'}", flush=True)  # fmt: skip


def _arms(model: Any, batches: list[Any], with_head: bool) -> dict[str, Callable[[], Any]]:
    """Passes over the same tokens: bare, and scored by one and by all metrics of the stream."""
    import torch

    from exporter.models.architectures import layer_modules
    from exporter.models.residual_stream import tapped
    from exporter.score import METRICS
    from exporter.score.metric import StreamMetric
    from exporter.score.passes import StreamBatch, StreamSums

    layers = layer_modules(model)
    callee = model if with_head else model.base_model
    metrics = [metric for metric in METRICS.values() if isinstance(metric, StreamMetric)]

    def bare() -> None:
        with torch.inference_mode():
            for ids in batches:
                callee(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)

    def scored(count: int) -> Callable[[], None]:
        def run() -> None:
            sums = StreamSums(len(layers), metrics[:count])
            for ids in batches:
                mask = torch.ones_like(ids)
                batch = StreamBatch(len(layers), metrics[:count], mask.bool())
                with torch.inference_mode(), tapped(layers, batch):
                    callee(input_ids=ids, attention_mask=mask, use_cache=False)
                sums.add(batch.sums, batch.counts)

        return run

    return {"bare": bare, "cosine": scored(1), "all of the stream": scored(len(metrics))}


def _in_turns(arms: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[Times]]:
    """Times of each arm, one after the other in every round."""
    times: dict[str, list[Times]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, arm in arms.items():
            times[name].append(_timed(arm))
    return times


def _medians(times: list[Times]) -> Times:
    wall, cpu = (statistics.median(column) for column in zip(*times, strict=True))
    return wall, cpu


def torch_ids(ids: Any) -> Any:
    """Token ids as PyTorch has them."""
    import torch

    return torch.from_numpy(ids)


def _random_text(model: Any, samples: int) -> Any:
    from exporter.score import CalibrationText

    return CalibrationText.unpadded(_ids(model, samples)[0].numpy(), "random tokens", "")


def _ids(model: Any, samples: int) -> list[Any]:
    import torch

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (samples, LENGTH), generator=generator)
    return [ids]


def _timed(call: Callable[[], Any]) -> Times:
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


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
    time_ratio(loaded.model)
    answers_in_passes(loaded.model)
    if options.llm_drop is not None:
        against_llm_drop(loaded, options.llm_drop, options.text)


if __name__ == "__main__":
    main()
