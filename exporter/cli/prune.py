"""`depthcut prune`, `quantize` and `inspect`: what works on an ONNX file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.artifacts import PlannedDeletion, PruneReport
from exporter.cli.command import command
from exporter.cli.console import ConsoleProgress
from exporter.cli.results import print_result, table_lines
from exporter.compare.timing.subjects import no_garbage_collection
from exporter.cut.options import CutOptions
from exporter.option_types import Engine, InputFile, OnnxFile, OutputFile, OutputPath
from exporter.options import Options, Rule, argument, dataclass, option, part, required
from exporter.printable import counted
from exporter.quantize.settings import QuantizeSettings
from graph_passes.types import Refusal, ResidualSite

if TYPE_CHECKING:
    from exporter.artifacts.loaded_plan import LoadedPlan
    from exporter.quantize.quantize import QuantizationResult


@dataclass(frozen=True)
class DropOptions(Options):
    """A plan's file, or a list."""

    plan: InputFile | None = option(None, "Drop what this plan.json lists.")
    drop: tuple[str, ...] = option(
        (),
        "Drop these, such as attention:25,26 or mlp:3 or block:10-12. Repeatable.",
        metavar="KIND:LAYERS",
    )
    rules = (
        Rule(
            ("plan", "drop"),
            lambda told: (told.plan is None) == (not told.drop),
            "Say what to drop:",
            "Give either {0} FILE or {1} KIND:LAYERS.",
        ),
    )

    def read(self) -> LoadedPlan:
        """The plan with its numbers."""
        from exporter.artifacts.loaded_plan import LoadedPlan
        from exporter.artifacts.plans import parse_drops

        return (
            LoadedPlan(parse_drops(self.drop)) if self.plan is None else LoadedPlan.read(self.plan)
        )


@dataclass(frozen=True)
class PruneCall(Options):
    """What `depthcut prune` is asked to do."""

    model: OnnxFile = argument("MODEL")
    output: OutputFile = required("The pruned ONNX file.", "-o", "--output")
    what: DropOptions = part()
    cut: CutOptions = part(CutOptions())
    check_engine: Engine | None = option(
        None,
        "Fail if an engine's parser accepts the original but not the result.",
        metavar="[ENGINE]",
        bare="tensorrt-rtx",
        usual="without ENGINE: tensorrt-rtx",
    )


@command(PruneCall)
@no_garbage_collection()  # a graph is a million objects, of which hardly any is garbage
def prune(call: PruneCall, progress: ConsoleProgress) -> None:
    """Cut sublayers out of MODEL, an ONNX file or a folder with one. Needs no PyTorch.

    Also writes a report, prune.json, next to the result. Sublayers that were cut out of MODEL
    earlier are skipped and listed; the exit code is still 0.
    """
    from exporter import prune_file

    plan, engine_check = call.what.read(), None
    if call.check_engine is not None:
        from exporter.engines.build.check import engine_gate

        engine_check = engine_gate(call.check_engine, progress)
    report = prune_file(
        call.model,
        call.output,
        plan,
        call.cut,
        engine_check=engine_check,
        progress=progress,
    )
    for name in _gone_before(plan.plan.deletions, report):
        progress.say(f"prune: {name} was cut out of {call.model} earlier")
    print_result(report, progress.as_json, _told(report, call.cut.verify), call.output)


def _gone_before(deletions: Sequence[PlannedDeletion], report: PruneReport) -> list[str]:
    """What was asked for and is in the graph no more; anything else would have been refused."""
    deleted = {(entry.layer, entry.kind) for entry in report.deleted}
    layers = {layer for layer, _ in deleted}
    return [
        f"{deletion.kind} {deletion.layer}"
        for deletion in deletions
        if (deletion.layer, deletion.kind) not in deleted
        and not (deletion.kind == "block" and deletion.layer in layers)
    ]


def _told(report: PruneReport, verify: str) -> str:
    done, engine = report.verification, report.engine
    replaced = sum(entry.replacement != "none" for entry in report.deleted)
    place = f", {replaced} of them replaced" if replaced else ""
    check = "none"
    if done.max_abs_error is not None:
        check = verify + " at the cheaper setting" * ("cheaper setting" in done.method)
        check += f", max error {done.max_abs_error:.1e}"
        check += "" if done.passed else ", undecided, since the deleted branches change nothing"
    if engine is not None:
        verb = "parses it" if engine.parsed else "does not parse it"
        check += f"; {engine.backend} {engine.version} {verb}"
    return (
        f"{counted(len(report.deleted), 'sublayer')} deleted{place}: "
        f"{report.before.nodes} -> {report.after.nodes}"
        f" nodes, {report.before.bytes / 1e6:.1f} -> {report.after.bytes / 1e6:.1f} MB of weights,"
        f" verification: {check}"
    )


@dataclass(frozen=True)
class InspectCall(Options):
    """What `depthcut inspect` is asked to do."""

    model: OnnxFile = argument("MODEL")


@command(InspectCall)
def inspect(call: InspectCall, progress: ConsoleProgress) -> None:
    """List the sublayers of MODEL: what can be cut, what can't, and why.

    MODEL is an ONNX file, a folder with one, or a GGUF file.
    """
    from exporter import inspect_file
    from exporter.models.gguf_model_files import GGUF_SUFFIX

    if call.model.suffix == GGUF_SUFFIX:
        sublayers = _in_gguf(call.model)
        rows = [
            (str(one["layer"]), one["kind"], f"{one['parameters']:,}", f"{one['bytes']:,}")
            for one in sublayers
        ]
        table = table_lines(("layer", "kind", "parameters", "bytes"), rows)
        print_result({"sublayers": sublayers}, progress.as_json, *table)
        return
    result = inspect_file(call.model)
    sites = [item for item in result if isinstance(item, ResidualSite)]
    refusals = [item for item in result if isinstance(item, Refusal)]
    cells = [
        (str(s.layer), s.kind, f"{s.parameters:,}", s.residual_add, ", ".join(s.kv_inputs) or "-")
        for s in sites
    ]
    lines = table_lines(("layer", "kind", "parameters", "residual add", "KV inputs"), cells)
    lines.append(f"{len(sites)} sites can be cut.")
    for item in refusals:
        layer = "" if item.layer is None else f" {item.layer}"
        lines.append(f"refused: {item.kind or 'graph'}{layer} at {item.node}: {item.reason}")
    print_result({"sites": sites, "refusals": refusals}, progress.as_json, *lines)


def _in_gguf(model: Path) -> list[dict[str, Any]]:
    from exporter.cut.gguf_layers import sublayers_of
    from exporter.models.gguf_model_files import read_model

    return [
        {
            "layer": ref.layer,
            "kind": ref.kind,
            "parameters": sum(math.prod(tensor.shape) for tensor in tensors),
            "bytes": sum(tensor.nbytes for tensor in tensors),
        }
        for ref, tensors in sublayers_of(read_model(model)).items()
    ]


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
            "{0} has no effect here: it is for the scheme int8-qdq.",
            "Leave it out.",
        ),
    )

    def check(self) -> None:
        """Refuses a scheme without the text that it needs."""
        self.settings.refuse()


@command(QuantizeCall)
@no_garbage_collection()  # a graph is a million objects, of which hardly any is garbage
def quantize(call: QuantizeCall, progress: ConsoleProgress) -> None:
    """Quantise the weights of MODEL, an ONNX file or a folder with one.

    MODEL may be cut already: cut first, then quantise. Tokenizer and configs are copied into the
    output's folder if they are missing there. Needs ONNX Runtime.
    """
    from exporter import quantize_file

    result = quantize_file(call.model, call.output, call.settings, progress=progress)
    print_result(result, progress.as_json, *_lines(result), call.output)


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
