"""What scoring costs above a bare forward pass over the same tokens, and how far metrics agree.

Run it alone with ``python -m tests.benchmarks.bench_score [MODEL] [--text FILE] [--llm-drop
FOLDER]``; MODEL is what `depthcut score` takes, by default the SmolLM2 of the wheel. It prints
figures and asserts nothing. The targets: all metrics of the stream in at most 1.15 times a bare
pass, memory above it that doesn't grow with the tokens, `kl` over all 60 sublayers in at most 32
passes, and the order of LLM-Drop's own function.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.benchmarks.small_model import default_model

ROUNDS = 7
BATCH, MEMORY_BATCH, LENGTH = 4, 1, 512
ANSWER_ROUNDS, ANSWER_SAMPLES = 3, 2
PARTS = ("ratio", "answers", "ranks", "memory")

# Seconds of the clock, and of the processors: the latter hold on a busy machine, too.
Times = tuple[float, float]


def time_ratio(model: Any, *, with_head: bool) -> None:
    """Bare and scored passes in turns, called in the same way; medians over the rounds."""
    arms = _arms(model, _ids(model, BATCH), with_head)
    for arm in arms.values():
        arm()
    times = _in_turns(arms, ROUNDS)
    bare = _medians(times["bare"])
    where = "whole model" if with_head else "without head"
    print(f"{where}, {BATCH} x {LENGTH} tokens: bare {bare[0]:.3f} s (medians of {ROUNDS})")
    for name in ("cosine", "all of the stream"):
        wall, cpu = _medians(times[name])
        print(
            f"  scored by {name}: {wall:.3f} s, ratio {wall / bare[0]:.3f}; "
            f"of processor time {cpu / bare[1]:.3f}",
            flush=True,
        )


def scoring_as_users_call_it(model: Any) -> None:
    """`score` runs no head: against a bare pass with logits, as most would write it."""
    ids = _ids(model, BATCH)
    arms = {
        "logits": _arms(model, ids, with_head=True)["bare"],
        "scored": _arms(model, ids, with_head=False)["all of the stream"],
    }
    for arm in arms.values():
        arm()
    times = _in_turns(arms, ROUNDS)
    first, second = (_medians(times[name])[0] for name in ("logits", "scored"))
    print(f"`score` by all metrics of the stream against a pass with logits: {first:.3f} s, "
          f"{second:.3f} s, ratio {second / first:.3f}", flush=True)  # fmt: skip


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


def rank_correlations(loaded: Any, text: str, tokens: int) -> None:
    """How far the metrics agree on a text, and the cosine with itself on another."""
    from exporter.score import METRICS, calibration_text, score_on
    from exporter.score.comparison import compare_reports

    def scored(spec: str, metrics: list[str]) -> Any:
        samples = max(2, tokens // LENGTH)
        calibration = calibration_text(loaded, spec, samples=samples, sequence_length=LENGTH)
        return score_on(loaded, calibration, metrics=metrics)

    other = "pydoc" if text != "pydoc" else "self"
    reports = {"here": scored(text, list(METRICS)), "there": scored(other, ["cosine"])}
    print(f"rank correlations, {reports['here'].calibration.tokens} tokens of {text}:")
    print("  kind       metric              Spearman: kl  perplexity  of kl's first 8")
    found = {(a.kind, a.first.metric, a.second.metric): a for a in compare_reports(reports)
             if a.second.file == "here"}  # fmt: skip
    for kind in ("attention", "mlp"):
        for metric in METRICS:
            told = [found.get((kind, *pair)) or found.get((kind, *pair[::-1]))
                    for pair in ((metric, "kl"), (metric, "perplexity"))]  # fmt: skip
            figures = ["1" if one is None else f"{one.spearman:.2f}" for one in told]
            shared = "8" if told[0] is None else told[0].shared_first.get(8, "-")
            print(f"  {kind:9}  {metric:18}  {figures[0]:>12}  {figures[1]:>10}  {shared:>15}")
    for one in compare_reports(reports):
        if (one.first.metric, one.second.file) == ("cosine", "there"):
            print(f"  cosine on {text} and on {other}, {one.kind}: Spearman {one.spearman:.2f}, "
                  f"of the first 8 {one.shared_first.get(8, '-')}", flush=True)  # fmt: skip


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


def peak_memory(checkpoint: str) -> None:
    """What scoring adds to the peak of processes that have run bare passes before."""
    context = multiprocessing.get_context("spawn")
    for batches in (2, 16):
        with context.Pool(1) as pool:
            bare, scored = pool.apply(_peaks, (checkpoint, batches))
        print(
            f"peak memory, {batches * MEMORY_BATCH * LENGTH} tokens: bare {bare / 1e6:.0f} MB, "
            f"scored {(scored - bare) / 1e6:+.1f} MB",
            flush=True,
        )


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


def _peaks(checkpoint: str, batches: int) -> tuple[int, int]:
    """Peak bytes after bare passes, enough for the allocator to settle, and after scored ones."""
    from exporter.models.loading.model_source import load_model

    model = load_model(checkpoint).model
    ids = _ids(model, MEMORY_BATCH)
    settle = _arms(model, ids * 16, with_head=False)["bare"]
    scored = _arms(model, ids * batches, with_head=False)["all of the stream"]
    peaks = []
    for run in (settle, scored):
        run()
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    return peaks[0], peaks[1]


def main() -> None:
    """Prints all figures."""
    from exporter.models.loading.model_files import save_checkpoint
    from exporter.models.loading.model_source import load_model

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--text", default="pydoc", help="Text for the rank correlations.")
    parser.add_argument("--tokens", type=int, default=4096, help="How much of it.")
    parser.add_argument("--llm-drop", type=Path, help="A checkout of CASE-Lab-UMD/LLM-Drop.")
    parser.add_argument("--only", choices=PARTS, action="append", help="Leave out the other parts.")
    asked = parser.parse_args()
    loaded, parts = load_model(asked.model or default_model()), asked.only or PARTS
    if "ratio" in parts:
        for with_head in (True, False):
            time_ratio(loaded.model, with_head=with_head)
        scoring_as_users_call_it(loaded.model)
    if "answers" in parts:
        answers_in_passes(loaded.model)
    if asked.llm_drop is not None:
        against_llm_drop(loaded, asked.llm_drop, asked.text)
    if "ranks" in parts:
        rank_correlations(loaded, asked.text, asked.tokens)
    if "memory" in parts:
        with tempfile.TemporaryDirectory() as folder:
            save_checkpoint(loaded, Path(folder))
            peak_memory(folder)


if __name__ == "__main__":
    main()
