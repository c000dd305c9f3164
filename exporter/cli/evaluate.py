"""`depthcut evaluate`."""

from __future__ import annotations

from pathlib import Path

import click

from exporter.cli.console import ConsoleProgress
from exporter.cli.options import ANY_PATH, EXISTING_PATH, json_option, verbosity_options
from exporter.cli.quality_options import task_options
from exporter.cli.sections import Count


@click.command(short_help="Score a model on tasks with right answers.")
@click.argument("model", type=EXISTING_PATH)
@task_options(required=True)
@click.option("-o", "--output", type=ANY_PATH, help="File for the scores of each item, as JSON.")
@click.option(
    "--provider", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True,
    help="Where ONNX Runtime runs the model.",
)  # fmt: skip
@click.option("--threads", type=Count(), help="CPU threads. [all cores]")
@json_option
@verbosity_options
@click.pass_obj
def evaluate(
    progress: ConsoleProgress,
    /,
    model: Path,
    tasks: tuple[str, ...],
    task_data: Path | None,
    task_limit: int | None,
    output: Path | None,
    provider: str,
    threads: int | None,
    as_json: bool,
) -> None:
    """Score MODEL on tasks with right answers; compare scores two models on the same items.

    MODEL is an ONNX file with its tokenizer beside it, their folder, or an engine.
    """
    from exporter.tasks.choosing import TaskChoice
    from exporter.tasks.evaluation import evaluate_model

    choice = TaskChoice(tasks, task_data, task_limit)
    report = evaluate_model(model, choice, provider=provider, threads=threads, progress=progress)
    if output is not None:
        report.write(output)
    if as_json:
        click.echo(report.to_json(), nl=False)
        return
    for score in report.scores:
        click.echo(f"{score.task:<20} {score.metric:<10} {score.value:.4f}  {score.source}")
