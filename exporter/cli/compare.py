"""`depthcut compare`."""

from __future__ import annotations

from pathlib import Path

from exporter.artifacts.store import locked
from exporter.cli.command import command
from exporter.cli.console import ConsoleProgress
from exporter.cli.results import print_comparison
from exporter.compare.options import CompareOptions
from exporter.errors import UsageError
from exporter.option_types import Arm, OutputFolder, OutputPath
from exporter.options import Options, argument, dataclass, option, part, required
from graph_passes.files.kinds import HTML, TEXT, refuse_foreign


@dataclass(frozen=True, kw_only=True)
class CompareCall(Options):
    """What `depthcut compare` is asked to do."""

    baseline: Arm = argument("BASELINE")
    candidate: Arm = argument("CANDIDATE")
    output: OutputFolder = required("Folder for the report.", "-o", "--output")
    references: tuple[Arm, ...] = option(
        (),
        "Another model of any kind, timed in the same rounds without a verdict.",
        "--reference",
        metavar="ARM",
    )
    also: tuple[Arm, ...] = option(
        (),
        "Another form of the model, such as another cut, whole or quantised: timed in the same "
        "rounds and on the same text, in one table with both. Repeatable.",
        metavar="ARM",
    )
    floats: tuple[Arm, Arm] | None = option(
        None,
        "The float versions of BASELINE and CANDIDATE, if these are quantised: all four are "
        "compared.",
        "--float",
        metavar="BASELINE CANDIDATE",
    )
    onnx: tuple[OutputPath, OutputPath] | None = option(
        None,
        "The ONNX files that the two engines were built from, if they are not next to the engines.",
        "--engine-onnx",
        metavar="BASELINE CANDIDATE",
        rare=True,
    )
    compare: CompareOptions = part(CompareOptions())


@command(CompareCall)
def compare(call: CompareCall, progress: ConsoleProgress) -> None:
    """Compare CANDIDATE with BASELINE: latency, perplexity, agreement, size.

    Both are ONNX files or folders with one, engines or folders of them; or what another
    runtime runs: torch:DIR, torch-compile:DIR (Hugging Face folders), openvino:DIR (ONNX),
    llama.cpp:FILE (GGUF). Writes report.json, report.md and report.html.
    """
    from exporter.compare.kept import forget
    from exporter.compare.session import compare as compare_models
    from exporter.report.files import write_reports

    _refuse_places(call)
    with locked(call.output):  # A folder that can't be made fails now, not after the measurement.
        report = compare_models(
            call.baseline,
            call.candidate,
            call.compare,
            references=call.references,
            also=call.also,
            floats=call.floats,
            onnx=call.onnx,
            resume=call.output,
            progress=progress,
        )
        write_reports(report, call.output)
        forget(call.output, report)
    print_comparison(report, call.output, progress.as_json)


def _refuse_places(call: CompareCall) -> None:
    """Keeps reports out of a model's folder, and from taking other files' places."""
    from exporter.report.files import REPORTS

    for name, kind in zip(REPORTS, ("comparison_report", TEXT, HTML), strict=True):
        refuse_foreign(call.output / name, kind)
    for arm in (call.baseline, call.candidate, *call.references, *call.also, *(call.floats or ())):
        path = Path(arm.partition(":")[2] or arm)
        if path.exists() and call.output.exists() and call.output.samefile(path):
            raise UsageError(
                f"{call.output} is one of the models; inputs are never changed.",
                "Name another folder for the report.",
            )
