"""`depthcut heal`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.artifacts import HealingReport
from exporter.artifacts.plans import read_plan
from exporter.checkpoint.model_card import CardSources, model_card
from exporter.checkpoint.pruned_model import refuse_checkpoint_folder, refuse_tokenless
from exporter.cli.command import command
from exporter.cli.console import NORMAL, ConsoleProgress, echo
from exporter.cli.results import print_artifact, print_rows
from exporter.files import sha256_file
from exporter.heal.options import HealOptions
from exporter.models.changed_weights import change_weights
from exporter.models.loading.model_source import LoadedModel, load_model
from exporter.models.loading.sources import SourceOptions
from exporter.option_types import InputFile, OutputPath
from exporter.options import Options, argument, dataclass, option, part
from exporter.report.sections.healing import healing_grid, healing_words
from graph_passes.files.placing import working

if TYPE_CHECKING:
    from exporter.heal.healed import Healed


@dataclass(frozen=True, kw_only=True)
class HealCall(Options):
    """What `depthcut heal` is asked to do."""

    model: str = argument("MODEL")
    plan: InputFile = argument("PLAN")
    output: OutputPath = option(Path("healed.json"), "The healed plan.", "-o", "--output")
    heal: HealOptions = part(HealOptions())
    save_checkpoint: OutputPath | None = option(
        None,
        "Also write the healed model as a Hugging Face folder, without the dropped weights "
        "and with their replacements.",
        metavar="DIR",
    )
    allow_empty: bool = option(
        False, "Accept a plan that leaves no attention and no MLP. Disables no other check."
    )
    load: SourceOptions = part(SourceOptions())


@command(HealCall)
def heal(call: HealCall, progress: ConsoleProgress) -> None:
    """Recover quality that MODEL loses by PLAN, and measure the gain.

    MODEL is a Hugging Face folder, a hub id or a GGUF file. Writes the healed plan, its
    numbers and a report: healed.json, healed.safetensors and healed.report.json. The gain is
    measured on held-out text of the calibration's domain and on text of another domain. After an
    interruption the same command resumes.
    """
    from exporter.heal.distill.workers import is_first_process
    from exporter.heal.healed import heal as heal_plan
    from exporter.heal.plan_file import numbers_of, write_healed_plan

    plan = read_plan(call.plan)
    texts = map(Path, filter(None, (*call.heal.calibration, call.heal.check_text)))
    _refuse_harm(call, [call.plan, *texts, *numbers_of(plan, call.plan)])
    with progress.task(f"load {call.model}"):
        loaded = load_model(call.model, **vars(call.load))
    if call.save_checkpoint is not None:
        refuse_tokenless(loaded.model)
    if not is_first_process():  # of those that train together; the first one writes and tells
        heal_plan(loaded, plan, call.heal, allow_all=call.allow_empty)
        return
    with working(call.output) as kept:
        healed = heal_plan(
            loaded,
            plan,
            call.heal,
            made_from={"plan": sha256_file(call.plan)},
            allow_all=call.allow_empty,
            work=kept,
            progress=progress,
        )
        write_healed_plan(
            call.output,
            healed.plan,
            healed.branch_replacements,
            weights=healed.weights,
            report=healed.report,
        )
    _print(healed.report, call.output, progress)
    if call.save_checkpoint is not None:
        _write_checkpoint(loaded, healed, call.save_checkpoint, progress)


def _refuse_harm(call: HealCall, inputs: Sequence[Path]) -> None:
    from exporter.heal.plan_file import files_of, refuse_places

    model, folder = Path(call.model), call.save_checkpoint
    refuse_places(call.output, inputs, model)
    if folder is not None:
        refuse_checkpoint_folder(folder, [*inputs, model, *files_of(call.output)])


def _write_checkpoint(
    loaded: LoadedModel, healed: Healed, folder: Path, progress: ConsoleProgress
) -> None:
    from exporter.checkpoint.write import write_checkpoint

    change_weights(loaded.model, healed.weights)
    sources = CardSources(healed.plan, healing=healed.report.healing)
    write_checkpoint(
        loaded,
        healed.plan,
        folder,
        cut=healed.branch_replacements,
        card=lambda facts: model_card(facts, sources),
        progress=progress,
    )


def _print(report: HealingReport, output: Path, progress: ConsoleProgress) -> None:
    if not progress.as_json and report.healing.measured:
        grid = healing_grid(report.healing, read=report.reads)
        print_rows(grid.header, grid.rows)
    # Whoever isn't quiet has heard the warnings already.
    if not progress.as_json and progress.verbosity < NORMAL:
        for warning in report.healing.warnings:
            echo(f"Warning: {warning}")
    words = healing_words(report.healing, report.reads).capitalize()
    print_artifact(report, output, progress.as_json, words)
