"""`depthcut evaluate`."""

from __future__ import annotations

from pathlib import Path

import click

from exporter.cli.console import ConsoleProgress, echo, echo_json
from exporter.cli.options import (
    ANY_PATH,
    AUTO,
    EXISTING_PATH,
    Threads,
    json_option,
    verbosity_options,
)
from exporter.cli.quality_options import task_options


@click.command(short_help="Score a model on tasks with right answers.")
@click.argument("model", type=EXISTING_PATH)
@task_options(required=True)
@click.option("-o", "--output", type=ANY_PATH, help="File for the scores of each item, as JSON.")
@click.option(
    "--provider", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True,
    help="Where ONNX Runtime runs the model.",
)  # fmt: skip
@click.option(
    "--threads", type=Threads(), default=AUTO, show_default=True,
    help="CPU threads; auto: the fastest, found in a short probe.",
)  # fmt: skip
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
    threads: int | str,
    as_json: bool,
) -> None:
    """Score MODEL on tasks with right answers; compare scores two models on the same items.

    MODEL is an ONNX file with its tokenizer beside it, their folder, or an engine.
    """
    from exporter.compare.tasks.choosing import TaskChoice
    from exporter.compare.tasks.evaluation import evaluate_model

    choice = TaskChoice(tasks, task_data, task_limit)
    asked = None if threads == AUTO else int(threads)
    report = evaluate_model(model, choice, provider=provider, threads=asked, progress=progress)
    if output is not None:
        report.write(output)
    if as_json:
        echo_json(report.to_json())
        return
    for score in report.scores:
        echo(f"{score.task:<20} {score.metric:<10} {score.value:.4f}  {score.source}")
