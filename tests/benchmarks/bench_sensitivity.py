"""4-bit weights that lose little: which products need 8 bits, and a GGUF file's own blocks."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from exporter.engines.environment import default_threads
from exporter.errors import DepthcutError
from exporter.quantize.quantize import quantize_file
from exporter.quantize.sensitivity import MixedBits
from exporter.quantize.settings import QuantizeSettings
from tests.benchmarks.bench_quantize import (
    decode_ms,
    default_text,
    evaluation_tokens,
    megabytes,
    perplexity,
)
from tests.benchmarks.machine import print_machine

PLAIN = QuantizeSettings(symmetric=True)
MOST_SENSITIVE = 20


def main() -> int:
    """Prints the table of forms, then what the search found."""
    options = _options()
    print_machine()
    source = options.folder / "model.onnx"
    tokens = evaluation_tokens(source, options.text, 512, options.samples)
    threads = options.threads or default_threads()
    print(f"{tokens.size} tokens of {options.text}, {threads} threads, cache of {options.past}")
    print("| weights | MB | perplexity | more | decode ms | plain int4's | of it | made in s |")
    print("|---|---|---|---|---|---|---|---|")
    before = perplexity(source, tokens, threads)
    print(f"| float | {megabytes(source):.1f} | {before:.3f} | | | | | |", flush=True)
    searched: list[MixedBits] = []
    with tempfile.TemporaryDirectory(dir=options.folder.parent) as scratch:
        plain = Path(scratch, "plain", "model.onnx")
        quantize_file(source, plain, PLAIN, with_companions=True)
        for number, (name, settings) in enumerate(_forms(options).items()):
            output = Path(scratch, str(number), "model.onnx")
            begin = time.perf_counter()
            try:
                result = quantize_file(source, output, settings, with_companions=True)
            except DepthcutError as error:
                print(f"| {name} | {error} | | | | | | |", flush=True)
                continue
            taken = time.perf_counter() - begin
            found = perplexity(output, tokens, threads)
            ours, theirs = decode_ms([output, plain], options.past, threads)
            print(
                f"| {name} | {megabytes(output):.1f} | {found:.3f} | {found / before - 1:+.1%} |"
                f" {ours:.2f} | {theirs:.2f} | {ours / theirs:.3f} | {taken:.0f} |",
                flush=True,
            )
            searched += [result.mixed] if result.mixed is not None else []
    for mixed in searched:
        _print_search(mixed)
    return 0


def _forms(options: argparse.Namespace) -> dict[str, QuantizeSettings]:
    text = options.calibration
    forms = {
        "int4, symmetric": PLAIN,
        "int4, zero points": QuantizeSettings(symmetric=False),
        "int4 hqq": QuantizeSettings(method="hqq"),
        "int4 gptq": QuantizeSettings(method="gptq", calibration=(text,)),
        "mixed, symmetric": QuantizeSettings(scheme="mixed", symmetric=True, calibration=(text,)),
        "mixed": QuantizeSettings(scheme="mixed", calibration=(text,)),
        "mixed gptq": QuantizeSettings(scheme="mixed", method="gptq", calibration=(text,)),
        "int8": QuantizeSettings(scheme="int8"),
    }
    if options.gguf is not None:
        forms["int4, the GGUF file's blocks"] = QuantizeSettings(method="gguf", gguf=options.gguf)
    return forms


def _print_search(mixed: MixedBits) -> None:
    eight = [name for name, bits in mixed.bits_by_node.items() if bits == 8]
    kinds = Counter(name.rsplit("/", 2)[-2] for name in eight if "/" in name)
    print(
        f"\n{len(eight)} of {len(mixed.bits_by_node)} products in 8 bits: {dict(kinds)}."
        f" On the calibration text {mixed.four_bit_growth - 1:+.1%} with all in 4 bits,"
        f" {mixed.growth - 1:+.1%} as chosen."
    )
    print("| product | KL divergence | nats a MB | bits |\n|---|---|---|---|")
    for one in mixed.sensitivities[:MOST_SENSITIVE]:
        each = one.kl_divergence / one.bytes_more * 1e6
        bits = mixed.bits_by_node[one.name]
        print(f"| {one.name} | {one.kl_divergence:.5f} | {each:.4f} | {bits} |")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gguf", type=Path, help="The file that the model comes from.")
    parser.add_argument("--text", default=default_text(), help="To judge by.")
    parser.add_argument("--calibration", default="pydoc", help="To choose by.")
    parser.add_argument("--samples", type=int, default=12)
    parser.add_argument("--past", type=int, default=512)
    parser.add_argument("--threads", type=int)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
