"""`depthcut report`, `verify-engine`, `lm-eval` and `doctor`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from exporter.cli.command import command
from exporter.cli.console import CONFIG, SHOW_CONFIG, ConsoleProgress
from exporter.cli.results import print_result, table_lines
from exporter.engines.doctor import Place, diagnose, health
from exporter.errors import UsageError
from exporter.option_types import Count, InputFile, InputPath, OnnxFile, OutputPath
from exporter.options import Options, argument, dataclass, option

if TYPE_CHECKING:
    from exporter.engines.decoding.verify import Difference


@dataclass(frozen=True, kw_only=True)
class VerifyEngineCall(Options):
    """What `depthcut verify-engine` is asked to do."""

    engine_file: InputPath = argument("ENGINE")
    model: OnnxFile = argument("MODEL")
    output: OutputPath | None = option(
        None,
        "Write inputs and outputs of the run that is furthest off here, for Polygraphy.",
        "-o",
        "--output",
        metavar="FOLDER",
    )
    threads: Count | None = option(None, "CPU threads of ONNX Runtime.", usual="all cores")


@command(VerifyEngineCall, name="verify-engine")
def verify_engine(call: VerifyEngineCall, progress: ConsoleProgress) -> int:
    """Check ENGINE against ONNX Runtime anew, and note the result in its record.

    ENGINE may be a folder with an engine for each phase. MODEL is the ONNX file that they were
    built from. `build`, `compare` and `generate` make this check by themselves, once.

    Exit code 0 if all outputs agree, otherwise 1.
    """
    from exporter.engines.build.engine_set import find_builds
    from exporter.engines.decoding.verify import verify_engines

    results: list[Difference] = []
    for number, engines in enumerate(find_builds(call.engine_file), 1):
        folder = call.output
        if folder is not None and number > 1:
            folder = folder.with_name(f"{folder.name}-{number}")
        results += verify_engines(
            engines, call.model, folder=folder, threads=call.threads, progress=progress
        )[1]
    worst: dict[str, Difference] = {}
    for result in results:
        if result.run not in worst or not result.error <= worst[result.run].error:
            worst[result.run] = result
    rows = [
        (run, item.tensor, f"{item.error:.2e}", "agrees" if item.passed else "differs")
        for run, item in worst.items()
    ]
    table = table_lines(("run", "furthest output", "difference", "verdict"), rows)
    print_result(results, progress.as_json, *table)
    return 0 if all(result.passed for result in results) else 1


@dataclass(frozen=True)
class DoctorCall(Options):
    """What `depthcut doctor` is asked to do."""

    health: Place | None = option(
        None,
        "Only check whether models can run on a CPU or a GPU here, without running anything there.",
    )


@command(DoctorCall)
def doctor(call: DoctorCall, progress: ConsoleProgress) -> int:
    """Show what this machine can do, and which extra adds what is missing.

    Exit code 0 when ONNX files can be pruned, verified and compared here, else 1; with --health,
    0 when models can run there.
    """
    diagnosis = health(call.health) if call.health else diagnose()
    rows = [
        (component.name, component.found or "missing", component.serves)
        for component in diagnosis.components
    ]
    remedies = [f"{p.name.strip()}: {p.remedy}" for p in diagnosis.components if p.remedy]
    way = "To add what is missing (in a clone, write '.[cpu]' instead of 'depthcut[cpu]'):"
    lines = table_lines(("component", "found", "for"), rows)
    print_result(diagnosis, progress.as_json, *lines, *(["", way, *remedies] if remedies else []))
    return 0 if diagnosis.fit else 1


@dataclass(frozen=True, kw_only=True)
class ReportCall(Options):
    """What `depthcut report` is asked to do."""

    report: InputFile = argument("REPORT")
    output: OutputPath | None = option(
        None,
        "The file; FILE.md is written as Markdown.",
        "-o",
        "--output",
        usual="next to the report, with its name",
    )


@command(ReportCall)
def report(call: ReportCall, progress: ConsoleProgress) -> None:
    """Render a saved REPORT again, as an HTML page or as Markdown; nothing is measured."""
    from exporter.report.files import render_saved

    page = render_saved(call.report, output=call.output)
    print_result({"path": page}, progress.as_json, page)


@click.command(
    name="lm-eval",
    short_help="Run lm-eval's command line on depthcut's models.",
    context_settings={"ignore_unknown_options": True, "help_option_names": []},
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def lm_eval(arguments: tuple[str, ...]) -> None:
    """Run lm-eval's own command line, with the additional model `--model depthcut`.

    All arguments are lm-eval's. The model takes --model_args pretrained=FOLDER, and provider,
    threads, max_length and max_gen_toks.
    """
    from exporter.optional import require

    meta = click.get_current_context().meta
    if meta.get(CONFIG) or meta.get(SHOW_CONFIG):
        raise UsageError("All options of lm-eval are its own.", "Leave out those of depthcut.")
    command_line = require("lm_eval.__main__", extra="eval")
    require("exporter.compare.tasks.lm_eval_model", extra="eval").register()
    sys.argv = ["lm-eval", *arguments]
    command_line.cli_evaluate()
