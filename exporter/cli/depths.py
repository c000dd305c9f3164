"""`depthcut depths`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from exporter.artifacts import ImportanceReport, Way
from exporter.choose.selection.search_options import DROPPING
from exporter.choose.studies.depths import WAYS
from exporter.cli.command import command
from exporter.cli.console import ConsoleProgress
from exporter.cli.study_results import print_study
from exporter.compare.options import ACCURACY, TaskOptions
from exporter.files import refuse_overwriting, sha256_file
from exporter.models.loading.model_source import load_model
from exporter.models.loading.options import SourceOptions
from exporter.option_types import (
    Count,
    InputFile,
    Lengths,
    OutputFile,
    Several,
    Written,
    comma_list,
)
from exporter.options import Options, Rule, argument, dataclass, option, part, required
from exporter.score.options import SCORING, MetricName
from graph_passes.files.placing import working

if TYPE_CHECKING:
    from exporter.choose.studies.depths import DepthOptions

_Ways = Annotated[tuple[Way, ...], comma_list, Written("WAY,WAY", ",".join, listed=True)]


@dataclass(frozen=True, kw_only=True)
class DepthsCall(Options):
    """What `depthcut depths` is asked to do."""

    model: str = argument("MODEL")
    importance: InputFile = required("The importance.json of MODEL.")
    output: OutputFile = option(
        Path("depths.json"),
        "The data; tables and a page with plots stand beside it as .md and .html.",
        "-o",
        "--output",
    )
    numbers: Lengths = option((4, 8, 12), "How many to drop.", "-n", "--numbers", section=DROPPING)
    ways: _Ways = option(
        WAYS,
        "What is dropped: attention, mlp, block, or joint: attentions and MLPs ranked together.",
        section=DROPPING,
    )
    metric: MetricName | None = option(
        None,
        "Which of IMPORTANCE's metrics decides.",
        metavar="NAME",
        usual="its first",
        section=SCORING,
    )
    eval_text: str = option(
        "pydoc",
        "Held-out text: a text or JSONL file, hf:DATASET or pydoc.",
        metavar="SOURCE",
        section=ACCURACY,
    )
    eval_tokens: Several = option(
        8192, "Tokens for perplexity and KL divergence.", section=ACCURACY
    )
    eval_sequence_length: Several = option(
        512, "Tokens in a sample of the held-out text.", section=ACCURACY, config_only=True
    )
    batch_size: Count = option(
        4, "Samples in one forward pass.", section=ACCURACY, config_only=True
    )
    tasks: TaskOptions = part(TaskOptions())
    load: SourceOptions = part(SourceOptions(), without=("dtype",))
    rules = (
        Rule(("numbers",), lambda told: not told.numbers, "{0} names none.", "Such as 4,8,12."),
    )


@command(DepthsCall)
def depths(call: DepthsCall, progress: ConsoleProgress) -> None:
    """Drop attentions, MLPs, blocks, or both jointly at several numbers, and measure the cost.

    MODEL runs in PyTorch with the branches left out; nothing is exported. One table has perplexity
    and KL divergence of every cut on held-out text, with intervals. What an interrupted call has
    measured is used when the same command is run again.
    """
    from exporter.choose.studies.depths import measure_depths
    from exporter.report.files import study_files, write_depths

    for path in study_files(call.output):
        refuse_overwriting(path, [call.importance, *map(Path, (call.model, call.eval_text))])
    report = ImportanceReport.read(call.importance).of_metric(call.metric)
    with working(call.output) as kept:
        with progress.task(f"load {call.model}"):
            loaded = load_model(call.model, **vars(call.load))
        found = measure_depths(
            loaded,
            report,
            _wanted(call),
            importance_sha256=sha256_file(call.importance),
            kept=kept,
            progress=progress,
        )
        write_depths(found, call.output)
    print_study(found, call.output, as_json=progress.as_json)


def _wanted(call: DepthsCall) -> DepthOptions:
    from exporter.choose.studies.depths import DepthOptions
    from exporter.compare.tasks.choosing import TaskChoice

    tasks = TaskChoice(call.tasks.tasks, call.tasks.task_data, call.tasks.task_limit)
    return DepthOptions(
        numbers=call.numbers,
        ways=call.ways,
        text=call.eval_text,
        tokens=call.eval_tokens,
        sequence_length=call.eval_sequence_length,
        batch_size=call.batch_size,
        tasks=tasks if tasks.names else None,
    )
