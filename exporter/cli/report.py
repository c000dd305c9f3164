"""`depthcut report`."""

from __future__ import annotations

from exporter.cli.command import command
from exporter.cli.console import ConsoleProgress, echo
from exporter.option_types import InputFile, OutputPath
from exporter.options import Options, argument, dataclass, option
from exporter.report.files import Form


@dataclass(frozen=True, kw_only=True)
class ReportCall(Options):
    """What `depthcut report` is asked to do."""

    reports: tuple[InputFile, ...] = argument("REPORTS...")
    output: OutputPath | None = option(
        None, "The file.", "-o", "--output", usual="for one report: next to it, with its name"
    )
    form: Form = option("html", "An HTML page, or Markdown.", "--format")
    importance: InputFile | None = option(
        None, "The importance.json that the plan was made from, to show all layers."
    )


@command(ReportCall, json=False)
def report(call: ReportCall, _progress: ConsoleProgress) -> None:
    """Render saved REPORTS again, as one HTML page or as Markdown; nothing is measured.

    Several report.json make one page, with one plot of quality against speed.
    """
    from exporter.report.files import render_saved

    echo(render_saved(call.reports, importance=call.importance, output=call.output, form=call.form))
