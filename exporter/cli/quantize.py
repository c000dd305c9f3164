"""`depthcut quantize`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exporter.cli.console import ConsoleProgress, echo, echo_json
from exporter.cli.options import (
    ANY_PATH,
    ONNX_FILE,
    collecting_rarely,
    json_option,
    verbosity_options,
)
from exporter.cli.quantize_options import SCHEMES, quantize_options, quantize_settings
from exporter.cli.sections import SectionedCommand
from exporter.errors import UsageError

if TYPE_CHECKING:
    from exporter.quantize.quantize import QuantizationResult
    from exporter.quantize.settings import Scheme

_MOST_REASONS = 8


@click.command(cls=SectionedCommand, short_help="Put an ONNX file's weights into fewer bits.")
@click.argument("model", type=ONNX_FILE)
@click.option("-o", "--output", type=ANY_PATH, required=True, help="The quantised ONNX file.")
@click.option(
    "--scheme", type=SCHEMES,
    default="int4", show_default=True,
    help="int4, int8: weights alone; mixed: 8 bits where 4 cost most; int8-*: computes in int8. "
    "fp8, int4-awq, and int8-qdq for TensorRT: with --modelopt-python.",
)  # fmt: skip
@quantize_options()
@click.option(
    "--calibration", metavar="SOURCE",
    help="Text for gptq, mixed, int8-qdq and ModelOpt: a text or JSONL file, hf:DATASET or pydoc.",
)  # fmt: skip
@json_option
@verbosity_options
@click.pass_obj
@collecting_rarely
def quantize(
    progress: ConsoleProgress,
    /,
    model: Path,
    output: Path,
    *,
    scheme: Scheme,
    calibration: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Put the weights of MODEL, an ONNX file or a folder with one, into fewer bits.

    MODEL may be cut already: cut first, then quantise. Tokenizer and configs are copied into the
    output's folder where they aren't there yet. Needs ONNX Runtime.
    """
    from exporter.quantize.quantize import quantize_file

    settings = quantize_settings(scheme, options, calibration=calibration)
    if calibration and not settings.needs_calibration:
        raise UsageError(
            "Nothing here looks at a calibration text.",
            "It is for --method gptq, and the schemes mixed, int8-qdq, fp8 and int4-awq.",
        )
    result = quantize_file(model, output, settings, with_companions=True, progress=progress)
    if as_json:
        content = asdict(result) | {"record": result.record.model_dump(mode="json")}
        echo_json(json.dumps(content, indent=2))
        return
    for line in (*_lines(result), str(output)):
        echo(line)


def _lines(result: QuantizationResult) -> list[str]:
    record, gap = result.record, result.difference
    counted = ", ".join(f"{count} in {bits} bits" for bits, count in record.bits.items())
    table = f"the embedding in {record.embedding_bits}" if record.embedding_bits else ""
    kl = "" if gap.kl_divergence is None else f", KL divergence {gap.kl_divergence:.2g}"
    lines = [
        f"products: {', '.join(filter(None, [counted, table]))};"
        f" {result.bytes_before / 1e6:.1f} -> {result.bytes_after / 1e6:.1f} MB",
        f"against the float graph, on random tokens: largest error {gap.max_abs_error:.2g}"
        f" beside {gap.largest:.2g}{kl}",
    ]
    if gap.is_far:
        lines.append("these answers have little to do with the float model's: see --scheme int8")
    if result.mixed is not None:
        lines.append(
            f"perplexity of the calibration text: {result.mixed.growth - 1:+.1%}, "
            f"with all in 4 bits {result.mixed.four_bit_growth - 1:+.1%}"
        )
    if record.kept_blocks:
        kept = ", ".join(f"{count} {kind}" for kind, count in record.kept_blocks.items())
        lines.append(f"blocks kept as they are: {kept}")
    reasons = [f"in float: {name}: {why}" for name, why in result.in_float.items()]
    reasons += [f"rounded anew: {name}: {why}" for name, why in result.rounded_anew.items()]
    more = len(reasons) - _MOST_REASONS
    lines += reasons[:_MOST_REASONS]
    return [*lines, f"{more} more (--json lists them)"] if more > 0 else lines
