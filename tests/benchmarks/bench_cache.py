"""A decode step with the cache in one buffer, beside onnxruntime-genai's, at 512 and 2048.

Run it with ``python -m tests.benchmarks cache``. It has onnxruntime-genai's builder write SmolLM2
in fp32, once, and steps through the same graph with both runtimes, in turns whose order is drawn.
Each turn goes on where the last one ended, so both are equally far at the end of a round; both take
the likeliest token. Which of two equal sessions was loaded first alone made 6 % (where its weights
lie in memory), so both are loaded anew several times, each time in the other order, and a ratio is
the mean over both orders. The aim is at most 1.02 of the runtime's time. It prints figures and
asserts nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from exporter.compare.timing.statistics import estimate
from exporter.compare.timing.subjects import no_garbage_collection
from exporter.engines.decoding.runner_decoder import OnnxRuntimeDecoder
from exporter.engines.environment import default_threads
from tests.benchmarks.machine import print_machine

AIM = 1.02
LENGTHS = (512, 2048)
STEPS, ROUNDS = 8, 6


def built(source: str, folder: Path) -> Path:
    """The folder that the builder writes: made once."""
    if not (folder / "model.onnx").is_file():
        from onnxruntime_genai.models import builder

        from exporter.files import staged_directory
        from exporter.models.loading.model_source import load_model

        folder.parent.mkdir(parents=True, exist_ok=True)
        print("Building SmolLM2's graph with onnxruntime-genai's builder ...", flush=True)
        loaded = load_model(source)
        with (
            tempfile.TemporaryDirectory(dir=folder.parent) as name,
            staged_directory(folder) as out,
        ):
            checkpoint, cache = f"{name}/checkpoint", f"{name}/cache"
            loaded.model.save_pretrained(checkpoint)
            if loaded.tokenizer is not None:
                loaded.tokenizer.save_pretrained(checkpoint)
            place = [checkpoint, "", str(out), "fp32", "cpu", cache]
            builder.create_model(*place, **builder.parse_extra_options(*place, []))
    return folder


def side_by_side(folder: Path, past: int, threads: int, pairs: int) -> None:
    """Prints one row."""
    prompt = np.random.default_rng(0).integers(3, 40000, (1, past))
    rng = np.random.default_rng(1)
    taken = np.array(
        [
            [_loaded(folder, prompt, threads, rng, ours_first=first) for first in (True, False)]
            for _ in range(pairs)
        ]
    )
    found = estimate(np.log(taken[..., 0] / taken[..., 1]).mean(axis=1))
    low, high = found.interval()
    ours, theirs = np.median(taken, axis=(0, 1)) / (2 * STEPS) * 1e3
    print(
        f"decode after {past}, {threads} threads: depthcut {ours:.2f} ms, onnxruntime-genai "
        f"{theirs:.2f} ms; {np.exp(found.log_ratio):.3f} [{low:.3f}, {high:.3f}] of its time over "
        f"{pairs} loads in each order; aim {AIM}",
        flush=True,
    )


def _loaded(
    folder: Path,
    prompt: np.ndarray[Any, Any],
    threads: int,
    rng: np.random.Generator,
    *,
    ours_first: bool,
) -> list[float]:
    """Loads both and gives each one's median seconds of a round."""
    room = prompt.shape[1] + 2 * (ROUNDS + 1) * STEPS + 1
    with ExitStack() as stack, no_garbage_collection():
        theirs = None if ours_first else _theirs(folder, prompt, room, threads)
        decoder = OnnxRuntimeDecoder(folder / "model.onnx", threads=threads, context=room)
        ours = _ours(stack.enter_context(decoder), prompt)
        arms = (ours, theirs or _theirs(folder, prompt, room, threads))
        _round(arms, (0, 1))  # the first steps warm up
        taken = [_round(arms, rng.permutation(2).tolist()) for _ in range(ROUNDS)]
    found: list[float] = np.median(taken, axis=0).tolist()
    return found


def _round(arms: Sequence[Callable[[], None]], order: Sequence[int]) -> list[float]:
    """Seconds of each arm: a turn of both, then one in the other order."""
    times = [0.0, 0.0]
    for arm in (*order, *reversed(order)):
        begin = time.perf_counter()
        for _ in range(STEPS):
            arms[arm]()
        times[arm] += time.perf_counter() - begin
    return times


def _ours(decoder: OnnxRuntimeDecoder, prompt: np.ndarray[Any, Any]) -> Callable[[], None]:
    token = decoder.prefill(prompt).argmax(-1)

    def step() -> None:
        nonlocal token
        token = decoder.step(token[:, None]).argmax(-1)

    return step


def _theirs(
    folder: Path, prompt: np.ndarray[Any, Any], room: int, threads: int
) -> Callable[[], None]:
    import onnxruntime_genai as runtime

    config: Any = runtime.Config(str(folder))
    overlay = {"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}
    config.overlay(json.dumps(overlay))
    model = runtime.Model(config)
    parameters = runtime.GeneratorParams(model)
    parameters.set_search_options(max_length=room, min_length=room, do_sample=False)
    generator: Any = runtime.Generator(model, parameters)
    generator.append_tokens(prompt.astype(np.int32))
    generator.generate_next_token()
    step: Callable[[], None] = generator.generate_next_token
    return step


def main(arguments: list[str] | None = None) -> int:
    """Prints a row for each length."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", help="SmolLM2 as GGUF or Hugging Face folder")
    parser.add_argument("folder", type=Path, help="where the builder's graph is, or goes")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--pairs", type=int, default=4, help="loads in each order, for a row")
    options = parser.parse_args(arguments)
    try:
        import onnxruntime_genai  # noqa: F401
    except ImportError:
        print("onnxruntime-genai isn't installed: pip install 'depthcut[genai]'")
        return 0
    print_machine("onnxruntime-genai")
    folder = built(options.source, options.folder)
    for past in LENGTHS:
        side_by_side(folder, past, options.threads, options.pairs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
