"""`depthcut quantize`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from exporter.cli.command import collecting_rarely, command
from exporter.cli.console import ConsoleProgress, echo, echo_json
from exporter.option_types import OnnxFile, OutputPath
from exporter.options import Options, Rule, argument, dataclass, part, required
from exporter.quantize.settings import QuantizeSettings

if TYPE_CHECKING:
    from exporter.quantize.quantize import QuantizationResult

_MOST_REASONS = 8


@dataclass(frozen=True, kw_only=True)
class QuantizeCall(Options):
    """What `depthcut quantize` is asked to do."""

    model: OnnxFile = argument("MODEL")
    output: OutputPath = required("The quantised ONNX file.", "-o", "--output")
    settings: QuantizeSettings = part(QuantizeSettings())
    rules = (
        Rule(
            ("settings.calibration",),
            lambda told: bool(told.settings.calibration) and not told.settings.needs_calibration,
            "{0} has no effect here: it is for the schemes int8-qdq, fp8 and int4-awq.",
            "Leave it out.",
        ),
    )


@command(QuantizeCall, check=lambda call: call.settings.refuse_missing_text())
@collecting_rarely
def quantize(call: QuantizeCall, progress: ConsoleProgress) -> None:
    """Quantise the weights of MODEL, an ONNX file or a folder with one.

    MODEL may be cut already: cut first, then quantise. Tokenizer and configs are copied into the
    output's folder if they are missing there. Needs ONNX Runtime.
    """
    from exporter.quantize.quantize import quantize_file

    result = quantize_file(
        call.model, call.output, call.settings, with_companions=True, progress=progress
    )
    if progress.as_json:
        content = asdict(result) | {"record": result.record.model_dump(mode="json")}
        echo_json(json.dumps(content, indent=2))
    else:
        echo(*_lines(result), call.output)


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
        lines.append("these answers differ widely from the float model's: try --quantize int8")
    if record.kept_blocks:
        kept = ", ".join(f"{count} {kind}" for kind, count in record.kept_blocks.items())
        lines.append(f"blocks kept as they are: {kept}")
    reasons = [f"in float: {name}: {why}" for name, why in result.in_float.items()]
    reasons += [f"rounded anew: {name}: {why}" for name, why in result.rounded_anew.items()]
    more = len(reasons) - _MOST_REASONS
    lines += reasons[:_MOST_REASONS]
    return [*lines, f"{more} more (--json lists them)"] if more > 0 else lines
