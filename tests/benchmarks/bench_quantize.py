"""What each way to quantise costs in accuracy and gains in time: where the defaults come from."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from exporter.compare.agreement import prefill_logits
from exporter.compare.timing.subjects import no_garbage_collection
from exporter.engines.decoding.runner_decoder import OnnxRuntimeDecoder
from exporter.engines.decoding.text_model import TextModel
from exporter.engines.environment import default_threads
from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
from exporter.errors import DepthcutError
from exporter.models.texts.passages import pack_tokens
from exporter.models.texts.sources import read_texts
from exporter.quantize.quantize import quantize_file
from exporter.quantize.settings import QuantizeSettings
from tests.benchmarks.machine import print_machine

STEPS = 8

WAYS = {
    "int4 symmetric, head 4": QuantizeSettings(symmetric=True, head_bits=4, embedding_bits=4),
    "int4 symmetric": QuantizeSettings(symmetric=True),
    "int4": QuantizeSettings(),
    "int4, head 4": QuantizeSettings(head_bits=4, embedding_bits=4),
    "int4, blocks of 16": QuantizeSettings(block_size=16),
    "int4, blocks of 64": QuantizeSettings(block_size=64),
    "int4, blocks of 128": QuantizeSettings(block_size=128),
    "int4, level 1": QuantizeSettings(accuracy_level=1),
    "int4 hqq": QuantizeSettings(method="hqq"),
    "int8": QuantizeSettings(scheme="int8"),
    "int8, zero points": QuantizeSettings(scheme="int8", symmetric=False),
    "int8, blocks of 64": QuantizeSettings(scheme="int8", block_size=64),
    "int8, blocks of 128": QuantizeSettings(scheme="int8", block_size=128, embedding_bits=None),
    "int8, level 1": QuantizeSettings(scheme="int8", accuracy_level=1),
    "int8-dynamic": QuantizeSettings(scheme="int8-dynamic"),
    "int8-qdq": QuantizeSettings(scheme="int8-qdq", calibration=("pydoc",)),
}  # fmt: skip


def main() -> int:
    """Prints a row for the float model and one for each way."""
    options = _options()
    print_machine()
    source = options.folder / "model.onnx"
    tokens = evaluation_tokens(source, options.text, options.length, options.samples)
    threads = options.threads or default_threads()
    print(f"{tokens.size} tokens of {options.text}, {threads} threads, cache of {options.past}")
    print("| weights | MB | perplexity | more | decode ms | float's | ratio | quantised in s |")
    print("|---|---|---|---|---|---|---|---|")
    float_perplexity = perplexity(source, tokens, threads)
    print(f"| float | {megabytes(source):.1f} | {float_perplexity:.3f} | | | | | |", flush=True)
    for name, settings in WAYS.items():
        if options.only and name not in options.only:
            continue
        with tempfile.TemporaryDirectory(dir=options.folder.parent) as scratch:
            try:
                row = _row(source, Path(scratch), settings, tokens, options.past, threads)
            except DepthcutError as error:
                print(f"| {name} | {error} | | | | | | |", flush=True)
                continue
        size, found, taken, ours, theirs = row
        print(
            f"| {name} | {size:.1f} | {found:.3f} | {found / float_perplexity - 1:+.1%} |"
            f" {ours:.2f} | {theirs:.2f} | {theirs / ours:.2f} | {taken:.0f} |",
            flush=True,
        )
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", default=default_text())
    parser.add_argument("--samples", type=int, default=12)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--past", type=int, default=512, help="0 leaves times out.")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--only", action="append", choices=WAYS, help="Can be repeated.")
    return parser.parse_args()


def default_text() -> str:
    data = os.environ.get("DEPTHCUT_DATA")
    files = [Path(data) / f"wikitext2.{kind}" for kind in ("txt", "jsonl")] if data else []
    return next((str(file) for file in files if file.is_file()), "pydoc")


def evaluation_tokens(source: Path, text: str, length: int, samples: int) -> NDArray[np.int64]:
    units = read_texts(text, part="evaluation").units(length)
    encode = TextModel.of(source).encode
    found, _ = pack_tokens(encode, units, sequence_length=length, max_samples=samples, by_size=True)
    if not len(found):
        sys.exit(f"{text} gives no {length} tokens.")
    return found


def perplexity(model: Path, tokens: NDArray[np.int64], threads: int) -> float:
    """Of each sample by itself, over all its tokens but the first."""
    losses = []
    with OnnxRuntimeRunner(model, threads=threads) as runner:
        for sample in tokens:
            logits = prefill_logits(runner, sample)[:-1].astype(np.float64)
            logits -= logits.max(axis=1, keepdims=True)
            chosen = logits[np.arange(len(logits)), sample[1:]]
            losses.append(np.log(np.exp(logits).sum(axis=1)) - chosen)
    return float(np.exp(np.concatenate(losses).mean()))


def _row(
    source: Path,
    scratch: Path,
    settings: QuantizeSettings,
    tokens: NDArray[np.int64],
    past: int,
    threads: int,
) -> tuple[float, float, float, float, float]:
    """Megabytes, perplexity, seconds to quantise, its and the float model's decode step in ms."""
    output = scratch / "model.onnx"
    begin = time.perf_counter()
    quantize_file(source, output, settings, with_companions=True)
    taken = time.perf_counter() - begin
    found = perplexity(output, tokens, threads)
    ours, theirs = decode_ms([output, source], past, threads) if past else (np.nan, np.nan)
    return megabytes(output), found, taken, ours, theirs


def decode_ms(models: list[Path], past: int, threads: int) -> list[float]:
    """Medians over rounds in which each model takes the same number of steps, in turns."""
    prompt = np.random.default_rng(0).integers(3, 40000, (1, past))
    times: list[list[float]] = [[] for _ in models]
    with ExitStack() as stack, no_garbage_collection():
        arms = [
            _steps(
                stack.enter_context(
                    OnnxRuntimeDecoder(model, threads=threads, context=past + 12 * STEPS + 1)
                ),
                prompt,
            )
            for model in models
        ]
        for round_number in range(6):
            for number in (0, 1) if round_number % 2 else (1, 0):
                begin = time.perf_counter()
                for _ in range(STEPS):
                    next(arms[number])
                if round_number:  # the first one warms up
                    times[number].append((time.perf_counter() - begin) / STEPS * 1e3)
    return [float(np.median(each)) for each in times]


def _steps(decoder: OnnxRuntimeDecoder, prompt: NDArray[np.int64]) -> Iterator[None]:
    token = decoder.prefill(prompt).argmax(-1)
    while True:
        yield
        token = decoder.step(token[:, None]).argmax(-1)


def megabytes(model: Path) -> float:
    data = model.with_name(f"{model.name}.data")
    return sum(path.stat().st_size for path in (model, data) if path.is_file()) / 1e6


if __name__ == "__main__":
    sys.exit(main())
