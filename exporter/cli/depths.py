"""`depthcut depths`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from exporter.cli.console import ConsoleProgress
from exporter.cli.metric_options import METRIC_NAMES
from exporter.cli.options import (
    ANY_FILE,
    EXISTING_FILE,
    Lengths,
    accuracy,
    dropping,
    json_option,
    model_options,
    scoring,
    verbosity_options,
)
from exporter.cli.quality_options import Names, task_options
from exporter.cli.sections import Count, SectionedCommand

_WAYS = ("attention", "mlp", "block", "joint")


@click.command(
    cls=SectionedCommand, short_help="Drop in four ways at several depths; one table of the cost."
)
@click.argument("model")
@click.option(
    "--importance", type=EXISTING_FILE, required=True, help="The importance.json of MODEL."
)
@click.option(
    "-o", "--output", type=ANY_FILE, default=Path("depths.json"), show_default=True,
    help="The data; tables and a page with plots stand beside it as .md and .html.",
)  # fmt: skip
@dropping(
    "-n", "--numbers", type=Lengths(), default=(4, 8, 12), show_default=True,
    help="How many to drop.",
)  # fmt: skip
@dropping(
    "--ways", type=Names(), default=_WAYS, show_default=True,
    help="What is dropped: attentions, MLPs, blocks, or attentions and MLPs ranked together.",
)  # fmt: skip
@scoring(
    "--metric", type=click.Choice(METRIC_NAMES), metavar="NAME",
    help="Which of the scores' metrics decides. [its first]",
)  # fmt: skip
@accuracy(
    "--eval-text", metavar="SOURCE", default="pydoc", show_default=True,
    help="Held-out text: a text or JSONL file, hf:DATASET or pydoc.",
)  # fmt: skip
@accuracy(
    "--eval-tokens", type=Count(2), default=8192, show_default=True,
    help="Tokens for perplexity and KL divergence.",
)  # fmt: skip
@accuracy(
    "--sequence-length", type=Count(2), default=512, show_default=True, help="Tokens in a sample."
)
@accuracy(
    "--batch-size", type=Count(), default=4, show_default=True,
    help="Samples in one forward pass.",
)  # fmt: skip
@task_options()
@model_options
@json_option
@verbosity_options
@click.pass_obj
def depths(
    progress: ConsoleProgress,
    /,
    model: str,
    importance: Path,
    output: Path,
    *,
    as_json: bool,
    **options: Any,
) -> None:
    """Drop attentions, MLPs, blocks, or both jointly at several numbers, and measure the cost.

    MODEL runs in PyTorch with the branches left out; nothing is exported. One table has perplexity
    and KL divergence of every cut on held-out text, with intervals. What an interrupted call has
    measured is used when the same command is run again.
    """
    from exporter.artifacts import ImportanceReport
    from exporter.choose.studies.depths import measure_depths
    from exporter.cli.requests import source_options
    from exporter.cli.study_results import print_study
    from exporter.files import refuse_overwriting, sha256_file
    from exporter.models.loading.model_source import load_model
    from exporter.report.files import study_files, write_depths
    from graph_passes.files.placing import working

    for path in study_files(output):
        refuse_overwriting(path, [importance, *map(Path, (model, options["eval_text"]))])
    wanted = _depth_options(options)
    report = ImportanceReport.read(importance).of_metric(options["metric"])
    with working(output) as kept:
        with progress.task(f"load {model}"):
            loaded = load_model(model, **vars(source_options(options)))
        found = measure_depths(
            loaded,
            report,
            wanted,
            importance_sha256=sha256_file(importance),
            kept=kept,
            progress=progress,
        )
        write_depths(found, output)
    print_study(found, output, as_json=as_json)


def _depth_options(options: dict[str, Any]) -> Any:
    from exporter.choose.studies.depths import DepthOptions
    from exporter.compare.tasks.choosing import TaskChoice
    from exporter.errors import UsageError

    unknown = [way for way in options["ways"] if way not in _WAYS]
    if unknown:
        raise UsageError(
            f"There is no way {unknown[0]!r} of dropping.", f"Ways: {', '.join(_WAYS)}."
        )
    if not options["numbers"]:
        raise UsageError("No number is named.", "Ask for some: -n 4,8,12.")
    if not options["tasks"] and (options["task_data"] or options["task_limit"]):
        raise UsageError("No task is named.", "Name some with --tasks.")
    tasks = TaskChoice(options["tasks"], options["task_data"], options["task_limit"])
    return DepthOptions(
        numbers=options["numbers"],
        ways=options["ways"],
        text=options["eval_text"],
        tokens=options["eval_tokens"],
        sequence_length=options["sequence_length"],
        batch_size=options["batch_size"],
        tasks=tasks if tasks.names else None,
    )
