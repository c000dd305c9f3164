"""`depthcut depths`."""

from __future__ import annotations

from pathlib import Path

from exporter.artifacts import ImportanceReport
from exporter.choose.studies.depths import DepthOptions, measure_depths
from exporter.cli.command import command
from exporter.cli.console import ConsoleProgress
from exporter.cli.study_results import print_study
from exporter.files import refuse_overwriting, sha256_file
from exporter.models.loading.model_source import load_model
from exporter.models.loading.options import SourceOptions
from exporter.option_types import InputFile, OutputFile
from exporter.options import Options, argument, dataclass, option, part, required
from exporter.score.options import SCORING, MetricName
from graph_passes.files.kinds import HTML, TEXT
from graph_passes.files.placing import working


@dataclass(frozen=True, kw_only=True)
class DepthsCall(Options):
    """What `depthcut depths` is asked to do."""

    model: str = argument("MODEL")
    importance: InputFile = required("The importance.json of MODEL.")
    output: OutputFile = option(
        Path("depths.json"),
        "File for the data; tables and a page with plots are written next to it as .md and .html.",
        "-o",
        "--output",
    )
    metric: MetricName | None = option(
        None,
        "Which metric of IMPORTANCE to use.",
        metavar="NAME",
        usual="its first",
        section=SCORING,
    )
    options: DepthOptions = part(DepthOptions())
    load: SourceOptions = part(SourceOptions(), without=("dtype",))


@command(DepthsCall)
def depths(call: DepthsCall, progress: ConsoleProgress) -> None:
    """Drop several numbers of attentions, MLPs, blocks, or both jointly, and measure the damage.

    MODEL runs in PyTorch with the branches left out; nothing is exported. One table lists the
    perplexity and KL divergence of every cut on held-out text, with intervals. After an
    interruption the same command resumes.
    """
    from exporter.report.files import study_files, write_study

    for path, kind in zip(study_files(call.output), ("depths_report", TEXT, HTML), strict=True):
        read = [call.importance, *map(Path, (call.model, call.options.text))]
        refuse_overwriting(path, read, kind)
    report = ImportanceReport.read(call.importance).of_metric(call.metric)
    with working(call.output) as kept:
        with progress.task(f"load {call.model}"):
            loaded = load_model(call.model, **vars(call.load))
        found = measure_depths(
            loaded,
            report,
            call.options,
            importance_sha256=sha256_file(call.importance),
            kept=kept,
            progress=progress,
        )
        write_study(found, call.output)
    print_study(found, call.output, as_json=progress.as_json)
