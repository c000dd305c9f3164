"""The forms of SmolLM2, whole and cut, in float and quantised, beside other libraries.

Run it with ``python -m tests.benchmarks.bench_forms GGUF WORK --table fp32`` (``int4``, ``1b``).
WORK takes the models, which are made once. Every arm is a process of its own with the same number
of threads and the same tokens; arms take turns in an order that is drawn, and all are loaded anew
several times, since where weights lie in memory alone makes some percent. All get huge pages from
malloc, as depthcut's runner asks for them itself. The table ``1b`` is of a Llama of 1.2 billion
parameters with random weights, in int4. Logits are of the last position alone where the library can
do that; the graph of our own passes gives all here. ``--only`` leaves arms out: compiling for
``torch.compile`` alone takes minutes a load.

Aims: at most 1.02 of onnxruntime-genai's time; ahead of optimum and PyTorch; decode at 512 in fp32
at least 85 % as fast as the bytes can be read; 15 of 30 attentions cut: decode at 2048 at least
1.25 times as fast in fp32, 1.6 in int4, the prompt of 2048 in fp32 1.45. It prints figures and
asserts nothing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from exporter.engines.environment import default_threads
from tests.benchmarks.bench_quantize import (
    default_text,
    evaluation_tokens,
    megabytes,
    perplexity,
)
from tests.benchmarks.forms_models import Models, llama_1b
from tests.benchmarks.forms_table import Arm, Measured, measure, print_table
from tests.benchmarks.machine import print_machine

OURS, GENAI = "depthcut", "onnxruntime-genai"


def fp32(models: Models, options: argparse.Namespace) -> dict[str, Arm]:
    """The whole model in every library, and ours without 8 and 15 attentions."""
    whole, portable = models.whole(), models.whole("portable")
    return {
        "reading the bytes once": Arm("reading", whole, steps_alone=True),
        "depthcut": Arm(OURS, whole, beside="onnxruntime-genai"),
        "depthcut, 8 cut": Arm(OURS, models.cut(8), beside="depthcut"),
        "depthcut, 15 cut": Arm(OURS, models.cut(15), beside="depthcut"),
        "depthcut, 15 linear": Arm(OURS, models.cut(15, linear=True), beside="depthcut"),
        "depthcut, own passes": Arm(OURS, models.own_passes(), beside="depthcut"),
        "portable": Arm(OURS, portable, beside="depthcut"),
        "portable, 15 cut": Arm(OURS, models.cut(15, "portable"), beside="portable"),
        "onnxruntime-genai": Arm(GENAI, whole, options.genai_python),
        "optimum, portable file": Arm("optimum", portable, options.optimum_python, "depthcut"),
        "PyTorch eager": Arm("torch", models.checkpoint(), beside="depthcut"),
        "torch.compile": Arm("torch.compile", models.checkpoint(), beside="depthcut"),
    }


def int4(models: Models, options: argparse.Namespace) -> dict[str, Arm]:
    """Quantised forms, whole and cut."""
    arms = {
        "fp32": Arm(OURS, models.whole()),
        "int8": Arm(OURS, models.quantized("int8"), beside="fp32"),
        "int8, 15 cut": Arm(OURS, models.quantized("int8", 15), beside="int8"),
        "int4 plain": Arm(OURS, models.quantized("int4 plain"), beside="in genai"),
    }
    for form in ("int4 kept", "int4 hqq"):
        arms[form] = Arm(OURS, models.quantized(form), beside="int4 plain")
    for count in (8, 15):
        cut = models.quantized("int4 kept", count)
        arms[f"int4 kept, {count} cut"] = Arm(OURS, cut, beside="int4 kept")
    arms["in genai"] = Arm(GENAI, models.quantized("int4 plain"), options.genai_python)
    arms["llama.cpp"] = Arm("llama.cpp", models.source, options.llama_python, "int4 kept")
    return arms


def one_billion(models: Models, options: argparse.Namespace) -> dict[str, Arm]:
    """A wider model in int4."""
    whole, cut = (models.quantized("int4 plain", count) for count in (0, models.half))
    return {
        "int4 plain": Arm(OURS, whole, beside="in genai"),
        "int4 plain, half cut": Arm(OURS, cut, beside="int4 plain"),
        "in genai": Arm(GENAI, whole, options.genai_python),
    }


TABLES = {"fp32": fp32, "int4": int4, "1b": one_billion}


def main(arguments: list[str] | None = None) -> int:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="SmolLM2 as GGUF")
    parser.add_argument("work", type=Path, help="where the models are, or go")
    parser.add_argument("--table", choices=TABLES, default="fp32")
    parser.add_argument("--loads", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--genai-python", default=sys.executable)
    parser.add_argument("--optimum-python", default=sys.executable)
    parser.add_argument("--llama-python", default=sys.executable)
    parser.add_argument("--text", default=default_text(), help="for the perplexity")
    parser.add_argument("--only", action="append", help="this arm alone, and others so named")
    options = parser.parse_args(arguments)
    print_machine()
    if options.table == "1b":
        models = Models(llama_1b(options.work), options.work / "1b", half=8)
        what = Measured(prompts=(512,), loads=options.loads, rounds=options.rounds)
    else:
        models = Models(options.source, options.work)
        what = Measured(loads=options.loads, rounds=options.rounds)
    arms = TABLES[options.table](models, options)
    if options.only:
        arms = {name: arm for name, arm in arms.items() if name in options.only}
    print_table(arms, what, measure(arms, what))
    if options.table == "int4":
        print_sizes(arms, options.text)
    return 0


def print_sizes(arms: dict[str, Arm], text: str) -> None:
    """Bytes and perplexity of our own arms, 12 samples of 512 tokens."""
    ours = {name: arm.model / "model.onnx" for name, arm in arms.items() if arm.library == OURS}
    tokens = evaluation_tokens(next(iter(ours.values())), text, 512, 12)
    print(f"perplexity on {tokens.size} tokens of {Path(text).name}:")
    for name, model in ours.items():
        found = perplexity(model, tokens, default_threads())
        print(f"{name}: {megabytes(model):.1f} MB, {found:.2f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
