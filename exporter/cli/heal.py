"""`depthcut heal`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exporter.cli.console import NORMAL, ConsoleProgress, echo
from exporter.cli.heal_options import KINDS, heal_options
from exporter.cli.options import (
    ANY_PATH,
    EXISTING_FILE,
    force_option,
    json_option,
    loading,
    model_options,
    scoring,
    verbosity_options,
)
from exporter.cli.sections import Count, SectionedCommand

if TYPE_CHECKING:
    from exporter.artifacts import HealingReport


@click.command(
    cls=SectionedCommand, short_help="Fit what takes the dropped branches' places; no training."
)
@click.argument("model")
@click.argument("plan", type=EXISTING_FILE)
@click.option("-o", "--output", type=ANY_PATH, default=Path("healed.json"), show_default=True)
@click.option(
    "--kind", type=KINDS, default="linear", show_default=True,
    help="What is fitted: the mean of a branch's output, a linear map of what it reads, or for "
    "each branch what helps most.",
)  # fmt: skip
@click.option(
    "--save-checkpoint", type=ANY_PATH, metavar="DIR",
    help="Also write the healed model as a Hugging Face folder: its safetensors lack what was "
    "dropped and hold what took its place.",
)  # fmt: skip
@force_option
@heal_options()
@scoring(
    "--calibration", metavar="SOURCE", multiple=True,
    help="Text to fit on: a text or JSONL file, hf:DATASET, pydoc, or self (text that the model "
    "samples; the default for decoders). Several make a mixture.",
)  # fmt: skip
@scoring(
    "--samples", type=Count(),
    help="Samples to fit on, of each text; a quarter as many more are held out. [about 10,000 "
    "tokens]",
)  # fmt: skip
@scoring(
    "--sequence-length", type=Count(2), default=512, show_default=True, help="Tokens in a sample."
)
@scoring(
    "--batch-size", type=Count(), default=4, show_default=True,
    help="Samples in one forward pass.",
)  # fmt: skip
@scoring("--seed", type=int, metavar="N", default=0, show_default=True, help="For sampled text.")
@loading(
    "--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), default="float32",
    show_default=True, help="Of the model while it is fitted to.",
)  # fmt: skip
@model_options
@json_option
@verbosity_options
@click.pass_obj
def heal(
    progress: ConsoleProgress,
    /,
    model: str,
    plan: Path,
    output: Path,
    *,
    kind: str,
    calibration: tuple[str, ...],
    save_checkpoint: Path | None,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Fit what takes the places of what PLAN drops from MODEL, and measure what that gains.

    MODEL is a Hugging Face folder, a hub id or a GGUF file. Beside the healed plan its numbers and
    a report are written: healed.json, healed.safetensors and healed.report.json. The gain is told
    on held-out text of the calibration's domain and on text of another. Fits that an interrupted
    call has finished are used when the same command is run again.
    """
    from exporter.artifacts.plans.by_score import read_plan
    from exporter.checkpoint import write_checkpoint
    from exporter.checkpoint.model_card import CardSources, model_card
    from exporter.checkpoint.pruned_model import refuse_tokenless
    from exporter.cli.heal_options import heal_request
    from exporter.cli.requests import source_options
    from exporter.files import sha256_file
    from exporter.heal import heal as heal_plan
    from exporter.heal import write_healed_plan
    from exporter.heal.plan_file import numbers_of
    from exporter.models.loading.model_source import load_model
    from graph_passes.files.placing import working

    request = heal_request(kind, options, calibration=calibration)
    assert request is not None
    given = read_plan(plan)
    texts = map(Path, filter(None, (*calibration, options["check_text"])))
    _refuse_harm(Path(model), [plan, *texts, *numbers_of(given, plan)], output, save_checkpoint)
    with progress.task(f"load {model}"):
        loaded = load_model(model, **vars(source_options(options)))
    if save_checkpoint is not None:
        refuse_tokenless(loaded.model)
    made_from = {"plan": sha256_file(plan)}
    with working(output) as kept:
        healed = heal_plan(
            *(loaded, given, request),
            made_from=made_from, allow_all=force, work=kept, progress=progress,
        )  # fmt: skip
        write_healed_plan(output, healed.plan, healed.branch_replacements, report=healed.report)
    # Whoever isn't quiet has heard the warnings already.
    warnings = healed.report.healing.warnings if progress.verbosity < NORMAL else []
    _print(healed.report, output, as_json, warnings)
    if save_checkpoint is not None:
        sources = CardSources(healed.plan, healing=healed.report.healing)
        write_checkpoint(
            loaded,
            healed.plan,
            save_checkpoint,
            cut=healed.branch_replacements,
            card=lambda facts: model_card(facts, sources),
            progress=progress,
        )


def _refuse_harm(
    model: Path, inputs: Sequence[Path], output: Path, save_checkpoint: Path | None
) -> None:
    from exporter.checkpoint.pruned_model import refuse_checkpoint_folder
    from exporter.heal.plan_file import files_of, refuse_places

    refuse_places(output, inputs, model)
    if save_checkpoint is not None:
        refuse_checkpoint_folder(save_checkpoint, [*inputs, model, *files_of(output)])


def _print(report: HealingReport, output: Path, as_json: bool, warnings: Sequence[str]) -> None:
    from exporter.cli.results import print_artifact, print_rows
    from exporter.report.sections.healing import healing_grid, healing_words

    if not as_json and report.healing.texts:
        grid = healing_grid(report.healing)
        print_rows(grid.header, grid.rows)
    for warning in () if as_json else warnings:
        echo(f"Warning: {warning}")
    print_artifact(report, output, as_json, healing_words(report.healing).capitalize())
