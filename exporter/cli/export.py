"""`depthcut export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from exporter.cli.budget_options import budget_options
from exporter.cli.console import ConsoleProgress
from exporter.cli.engine_options import export_engine_options
from exporter.cli.heal_options import KINDS, heal_options, healing
from exporter.cli.metric_options import metric_options
from exporter.cli.options import (
    ANY_PATH,
    EXISTING_FILE,
    drop_options,
    dropping,
    json_option,
    measuring_options,
    model_options,
    scoring_options,
    verbosity_options,
)
from exporter.cli.quality_options import quality_options
from exporter.cli.quantize_options import SCHEMES, quantization, quantize_options
from exporter.cli.required_speedup import end_by_speedup
from exporter.cli.search_options import search_options
from exporter.cli.sections import Count, SectionedCommand
from exporter.cli.stream_options import layer_options
from exporter.cli.timing_options import timing_options

# As exporter.artifacts.Target, which --help must not load.
_TARGETS = ("portable", "onnxruntime-cpu", "onnxruntime-cuda", "tensorrt", "tensorrt-rtx")


@click.command(
    cls=SectionedCommand, short_help="Score, cut, export to ONNX and compare, in one go."
)
@click.argument("model")
@click.option("-o", "--output", type=ANY_PATH, required=True, help="Folder for all results.")
@drop_options
@budget_options
@search_options
@dropping("--plan", type=EXISTING_FILE, help="Drop what this plan.json says.")
@click.option(
    "--target", type=click.Choice(_TARGETS), default="portable", show_default=True,
    help="The runtime that both graphs are written for, in the fastest form that there is for it. "
    "onnxruntime-*: decoders want the extra genai.",
)  # fmt: skip
@click.option(
    "--exporter", type=click.Choice(["torch", "optimum"]),
    help="Of --target portable: PyTorch's own ONNX exporter, or optimum's (extra: optimum). "
    "[torch]",
)  # fmt: skip
@click.option(
    "--opset", type=click.IntRange(18, 23), metavar="N",
    help="Of --target portable: the ONNX opset. [20]",
)  # fmt: skip
@click.option(
    "--cache-length", type=Count(0),
    help="Of --target tensorrt and tensorrt-rtx: positions of the caches, which are updated in "
    "place; 0 lets them grow. [4096, or all that the model knows]",
)  # fmt: skip
@click.option(
    "--dtype", type=click.Choice(["float32", "float16", "bfloat16"]),
    default="float32", show_default=True,
    help="Of both models, and so of engines built from them. ONNX Runtime's CPU runs bfloat16 in "
    "float32; the report says so.",
)  # fmt: skip
@healing(
    "--heal", type=click.Choice(["none", *KINDS.choices]),
    help="Fit what takes the dropped branches' places, without training: the mean of their output, "
    "a linear map, or for each what helps most. [none; best for a budget that is more than "
    "numbers]",
)  # fmt: skip
@healing(
    "--heal-calibration", metavar="SOURCE", multiple=True,
    help="Text to fit on, as --calibration takes it; several make a mixture. [--calibration]",
)  # fmt: skip
@heal_options("heal-")
@click.option(
    "--checkpoint/--no-checkpoint",
    help="Also write the pruned model as a Hugging Face checkpoint, candidate/hf/: its safetensors "
    "lack what was dropped. [no]",
)
@click.option(
    "--compare/--no-compare", "compared", default=True, show_default=True,
    help="Run both models at the end and write the report; without it, for a machine that can "
    "write them but not run them.",
)  # fmt: skip
@click.option(
    "--force", is_flag=True,
    help="Redo stages whose results are still valid, and drop what is asked for even if that "
    "leaves no attention and no MLP at all.",
)  # fmt: skip
@quantization(
    "--quantize",
    type=SCHEMES,
    help="Quantise both models after the cut, and compare all four: whole and cut, in float and "
    "quantised.",
)
@quantize_options("quantize-")
@export_engine_options
@metric_options
@scoring_options
@measuring_options
@timing_options
@quality_options
@model_options
@layer_options
@json_option
@verbosity_options
@click.pass_obj
def export(
    progress: ConsoleProgress,
    /,
    model: str,
    output: Path,
    *,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Score MODEL, drop its most redundant sublayers, export both to ONNX and compare them.

    MODEL is a Hugging Face folder, a hub id or a GGUF file. The output folder then holds
    importance.json, plan.json, baseline/, candidate/, prune.json, report.json, report.md and
    report.html; with --checkpoint also candidate/hf/, with --heal healing/, with --quantize
    baseline-quantized/ and candidate-quantized/, with --engine engines/baseline/ and
    engines/candidate/. With --stream weights are read, checked and written a layer at a time, for
    models larger than memory. What is still valid from an earlier run is reused.
    """
    from exporter.artifacts import PruningPlan
    from exporter.cli.requests import export_request
    from exporter.cli.results import print_comparison, print_models
    from exporter.pipeline import export_model, write_models

    request = export_request(model, output, force, options)
    if request.compared:
        print_comparison(export_model(request, progress), output, as_json)
    else:
        print_models(write_models(request, progress), output, as_json)
    if options["require_speedup"]:
        end_by_speedup(PruningPlan.read(output / "plan.json"))
