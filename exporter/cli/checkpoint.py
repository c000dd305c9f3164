"""`depthcut checkpoint`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exporter.cli.console import ConsoleProgress, echo, echo_json
from exporter.cli.options import (
    ANY_PATH,
    EXISTING_FILE,
    json_option,
    loading,
    model_options,
    verbosity_options,
)
from exporter.cli.sections import SectionedCommand

if TYPE_CHECKING:
    from exporter.artifacts import Healing, ImportanceReport, PruningPlan
    from exporter.models.loading.model_source import LoadedModel


@click.command(
    cls=SectionedCommand, short_help="Write the pruned model as a Hugging Face checkpoint."
)
@click.argument("model")
@click.argument("plan", type=EXISTING_FILE)
@click.option("-o", "--output", type=ANY_PATH, required=True, help="Folder for the checkpoint.")
@click.option(
    "--importance", type=EXISTING_FILE,
    help="The importance.json that PLAN rests on, for the model card.",
)  # fmt: skip
@loading(
    "--dtype", type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Of the weights that are written. [the model's own]",
)  # fmt: skip
@loading(
    "--stream", is_flag=True,
    help="Read and write a layer's weights at a time, for models larger than memory.",
)  # fmt: skip
@model_options
@json_option
@verbosity_options
@click.pass_obj
def checkpoint(
    progress: ConsoleProgress,
    /,
    model: str,
    plan: Path,
    output: Path,
    *,
    importance: Path | None,
    stream: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Drop what PLAN says from MODEL, and write the rest as a Hugging Face checkpoint.

    MODEL is a Hugging Face folder, a hub id or a GGUF file; PLAN is a plan.json, healed or not, or
    a config.json of LLM-Drop, Puzzletron or transformers that says what is dropped. The weights of
    what is dropped are in no file. Whole blocks leave a plain model with fewer layers.
    """
    from exporter.artifacts.plans.by_score import read_plan, validate_plan
    from exporter.artifacts.plans.origin import hold_against_model
    from exporter.artifacts.replacement_file import read_replacements
    from exporter.checkpoint import CheckpointFacts, write_checkpoint
    from exporter.checkpoint.model_card import CardSources, model_card
    from exporter.checkpoint.pruned_model import refuse_checkpoint_folder
    from graph_passes.files.placing import working

    given = read_plan(plan)
    replacements = read_replacements(given, plan)
    scores, healing = _scores(importance, given), _healing(given, plan)
    numbers = [] if replacements is None else [replacements.path]
    refuse_checkpoint_folder(output, [plan, *numbers, Path(model)])

    def card(facts: CheckpointFacts) -> str:
        return model_card(facts, CardSources(given, scores, healing))

    with working(output):
        with progress.task(f"load {model}"):
            loaded = _loaded(model, stream, options)
        # A plan that leaves no sublayer was asked for with --force when it was made.
        validate_plan(given, loaded.ref.num_layers, model=model, path=plan, allow_all=True)
        hold_against_model(given, loaded.ref.sha256, model=model, path=plan, progress=progress)
        facts = write_checkpoint(
            loaded, given, output, replacements=replacements, card=card, progress=progress
        )
    if as_json:
        echo_json(facts.model_dump_json(indent=2))
    else:
        before, after = facts.before.parameters / 1e6, facts.after.parameters / 1e6
        echo(f"{before:,.2f} -> {after:,.2f} million parameters; {facts.loader_words}")
        echo(output)


def _loaded(model: str, stream: bool, options: dict[str, Any]) -> LoadedModel:
    """The model, with its weights or without, in the dtype that was asked for or its own."""
    from exporter.checkpoint.facts import own_dtype
    from exporter.cli.requests import source_options
    from exporter.cli.stream_options import streams
    from exporter.models.loading.meta_model import load_meta
    from exporter.models.loading.model_source import load_model

    source = vars(source_options({**options, "dtype": options["dtype"] or "float32"}))
    if options["dtype"] is None:
        source["dtype"] = own_dtype(model, **{k: v for k, v in source.items() if k != "dtype"})
    if streams({**options, "stream": stream}):
        names = ("dtype", "revision", "allow_any_model_type")
        return load_meta(model, **{name: source[name] for name in names})
    return load_model(model, **source)


def _scores(path: Path | None, plan: PruningPlan) -> ImportanceReport | None:
    """The scores, if they are those that the plan names."""
    from exporter.artifacts import ImportanceReport
    from exporter.errors import PlanError
    from exporter.files import sha256_file

    if path is None:
        return None
    if plan.importance_sha256 is None:
        raise PlanError(
            "The plan does not say that it rests on scores, as one by hand or of another program.",
            "Leave --importance away: the card would tell how it was not chosen.",
        )
    if plan.importance_sha256 != sha256_file(path):
        raise PlanError(
            f"{path} is not the file of scores that the plan was made from.",
            "Leave --importance away, or give that file.",
        )
    return ImportanceReport.read(path)


def _healing(plan: PruningPlan, path: Path) -> Healing | None:
    """What is known of the gain of a plan's replacements."""
    from exporter.artifacts import HealingReport
    from exporter.heal.plan_file import report_of

    report = report_of(plan, path)
    return None if report is None else HealingReport.read(report, named=False).healing
