"""`depthcut prune`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from exporter.artifacts import EngineParse, PlannedDeletion, PruneReport, Verification
from exporter.cli.command import collecting_rarely, command
from exporter.cli.console import ConsoleProgress
from exporter.cli.dropping import DropOptions
from exporter.cli.results import print_artifact
from exporter.cut.options import CutOptions
from exporter.option_types import Engine, OnnxFile, OutputFile
from exporter.options import Options, argument, dataclass, option, part, required
from exporter.printable import counted

if TYPE_CHECKING:
    from exporter.engines.build.check import ParserCheck


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
@collecting_rarely
def prune(call: PruneCall, progress: ConsoleProgress) -> None:
    """Cut sublayers out of MODEL, an ONNX file or a folder with one. Needs no PyTorch.

    Also writes a report, prune.json, next to the result, or to the file of --report. Sublayers that
    were cut out of MODEL earlier are skipped and listed; the exit code is still 0.
    """
    from exporter.cut.surgery import prune_file

    plan = call.what.read()
    report = prune_file(
        call.model,
        call.output,
        plan,
        call.cut,
        engine_check=_engine_check(call.check_engine, progress),
        progress=progress,
    )
    for name in _gone_before(plan.plan.deletions, report):
        progress.say(f"prune: {name} was cut out of {call.model} earlier")
    print_artifact(report, call.output, progress.as_json, _told(report, call.cut.verify))


def _gone_before(asked: Sequence[PlannedDeletion], report: PruneReport) -> list[str]:
    """What was asked for and is in the graph no more; anything else would have been refused."""
    deleted = {(entry.layer, entry.kind) for entry in report.deleted}
    layers = {layer for layer, _ in deleted}
    return [
        f"{each.kind} {each.layer}"
        for each in asked
        if (each.layer, each.kind) not in deleted
        and not (each.kind == "block" and each.layer in layers)
    ]


def _engine_check(backend: Engine | None, progress: ConsoleProgress) -> ParserCheck | None:
    if backend is None:
        return None
    from exporter.engines.build.check import engine_gate

    return engine_gate(backend, progress)


def _told(report: PruneReport, verify: str) -> str:
    replaced = sum(entry.replacement != "none" for entry in report.deleted)
    place = f", {replaced} of them replaced" if replaced else ""
    return (
        f"{counted(len(report.deleted), 'sublayer')} deleted{place}: "
        f"{report.before.nodes} -> {report.after.nodes}"
        f" nodes, {report.before.bytes / 1e6:.1f} -> {report.after.bytes / 1e6:.1f} MB of weights,"
        f" verification: {_verification(report.verification, verify)}{_parse(report.engine)}"
    )


def _parse(done: EngineParse | None) -> str:
    if done is None:
        return ""
    return f"; {done.backend} {done.version} {'parses it' if done.parsed else 'does not parse it'}"


def _verification(done: Verification, asked: str) -> str:
    if done.max_abs_error is None:
        return "none"
    asked += " at the cheaper setting" if "cheaper setting" in done.method else ""
    undecided = "" if done.passed else ", undecided, since the deleted branches change nothing"
    return f"{asked}, max error {done.max_abs_error:.1e}{undecided}"
