"""A decode step with the cache in one buffer, beside onnxruntime-genai's, at 512 and 2048.

Run it with ``python -m tests.benchmarks cache``. It has onnxruntime-genai's builder write SmolLM2
in fp32, once, and steps through the same graph with both runtimes, in turns whose order is drawn.
Each turn goes on where the last one ended, so both are equally far at the end of a round; both take
the likeliest token. The aim is at most 1.02 of the runtime's time. It prints figures and asserts
nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from exporter.generation.onnxruntime_decoder import OnnxRuntimeDecoder
from exporter.measure.environment import default_threads
from exporter.measure.statistics import estimate
from exporter.measure.timing.clock import no_garbage_collection
from tests.benchmarks.machine import print_machine

AIM = 1.02
LENGTHS = (512, 2048)
STEPS = 8


def built(source: str, folder: Path) -> Path:
    """The folder that the builder writes: made once."""
    if not (folder / "model.onnx").is_file():
        from onnxruntime_genai.models import builder

        from exporter.files import staged_directory
        from exporter.model_source import load_model

        print("Building SmolLM2's graph with onnxruntime-genai's builder ...", flush=True)
        loaded = load_model(source)
        with staged_directory(folder.with_name(f"{folder.name}-hf")) as checkpoint:
            loaded.model.save_pretrained(checkpoint)
            if loaded.tokenizer is not None:
                loaded.tokenizer.save_pretrained(checkpoint)
        place = [str(folder.with_name(f"{folder.name}-hf")), "", str(folder), "fp32", "cpu", ""]
        builder.create_model(*place, **builder.parse_extra_options(*place, []))
    return folder


def side_by_side(folder: Path, past: int, threads: int, rounds: int) -> None:
    """Prints one row."""
    prompt = np.random.default_rng(0).integers(3, 40000, (1, past))
    room = past + 2 * (rounds + 1) * STEPS + 1
    with OnnxRuntimeDecoder(folder / "model.onnx", threads=threads, context=room) as decoder:
        arms = (_ours(decoder, prompt), _theirs(folder, prompt, room, threads))
        _round(arms, (0, 1))  # the first steps warm up
        rng = np.random.default_rng(1)
        with no_garbage_collection():
            taken = np.array([_round(arms, rng.permutation(2).tolist()) for _ in range(rounds)])
    found = estimate(np.log(taken[:, 0] / taken[:, 1]))
    low, high = found.interval()
    ours, theirs = np.median(taken, axis=0) / (2 * STEPS) * 1e3
    print(
        f"decode after {past}, {threads} threads: depthcut {ours:.2f} ms, onnxruntime-genai "
        f"{theirs:.2f} ms; {np.exp(found.log_ratio):.3f} [{low:.3f}, {high:.3f}] of its time in "
        f"{rounds} rounds; aim {AIM}",
        flush=True,
    )


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
    parser.add_argument("--rounds", type=int, default=16, help="for each row")
    options = parser.parse_args(arguments)
    try:
        import onnxruntime_genai  # noqa: F401
    except ImportError:
        print("onnxruntime-genai isn't installed: pip install 'depthcut[genai]'")
        return 0
    print_machine("onnxruntime-genai")
    folder = built(options.source, options.folder)
    for past in LENGTHS:
        side_by_side(folder, past, options.threads, options.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
