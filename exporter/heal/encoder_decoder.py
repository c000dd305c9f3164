"""What takes the places of branches that an encoder-decoder loses: biases and linear maps."""

from __future__ import annotations

from exporter.artifacts import HealingReport, PlannedDeletion, PruningPlan
from exporter.errors import HealingError
from exporter.heal.fit import fit_branches
from exporter.heal.fits import most_explained
from exporter.heal.healed import Healed, measured_healing
from exporter.heal.options import HealOptions
from exporter.heal.plan_file import kind_of
from exporter.models.anatomy.architectures import named_in
from exporter.models.loading.model_source import LoadedModel
from exporter.models.texts.calibration import CalibrationText
from exporter.progress import QUIET, Progress
from graph_passes.types import Replacement

KINDS = ("bias", "linear", "best")
"""The ways of healing that there are; they put something in a branch's place."""


def heal_stacks(
    loaded: LoadedModel,
    plan: PruningPlan,
    text: CalibrationText,
    options: HealOptions,
    progress: Progress = QUIET,
) -> Healed:
    """Fits what takes the branches' places, each on the whole model, and measures what that gains.

    Args:
        loaded: An encoder-decoder.
        plan: What it loses.
        text: Pairs, of which the last fifth is held out.
        options: ``best`` takes for each branch what explains most of its output on held-out
            tokens, nothing where neither explains any.
        progress: Told what goes on.

    Raises:
        HealingError: The way is none of :data:`KINDS`, or there are too few pairs or tokens.
        PlanError: The model has no such sublayers.
    """
    refuse_other_ways(options)
    fitted, held_out = _parts(text)
    names = named_in(loaded.model, plan.deletions)
    fits = fit_branches(
        loaded,
        fitted,
        names,
        rank=options.rank,
        ridge=options.ridge,
        batch_size=options.batch_size,
        uses_maps=options.kind != "bias",
        progress=progress,
    )
    kind: Replacement = "bias" if options.kind == "bias" else "linear"
    chosen = {
        name: most_explained(fit.choices) if options.kind == "best" else fit.choices[kind][1]
        for name, fit in fits.items()
    }
    healing = measured_healing(
        loaded, chosen, (held_out, None), options, [fitted.ref], fits, progress=progress
    )
    parents = {"model": loaded.ref.sha256, "calibration_0": text.ref.sha256}
    told = {
        "deletions": [
            PlannedDeletion(layer=n.layer, kind=n.kind, replacement=kind_of(chosen[n]))
            for n in names
        ],
        "fitted_on": fitted.parts,
        "judged_on": held_out.parts,
        "made_from": {**plan.made_from, **parents},
    }
    report = HealingReport(model=loaded.ref, healing=healing, made_from=parents)
    return Healed(plan.model_copy(update=told), chosen, report)


def _parts(text: CalibrationText) -> tuple[CalibrationText, CalibrationText]:
    """What is fitted on, and what is held out."""
    number = len(text.input_ids)
    if number < 2:
        raise HealingError(
            f"{text.ref.source} holds one pair; healing fits on some and measures on others.",
            "Give more pairs with --calibration.",
            code="too-few-pairs",
        )
    first = number - max(1, number // 5)
    return text.rows(slice(0, first)), text.rows(slice(first, None))


def refuse_other_ways(options: HealOptions) -> None:
    """Refuses what changes kept weights.

    Raises:
        HealingError: It does.
    """
    if options.kind not in KINDS:
        raise HealingError(
            f"--heal {options.kind} changes weights that are kept; an encoder-decoder is healed by "
            "what takes the branches' places alone.",
            f"Take {', '.join(KINDS)}, or none.",
            code="no-weights-changed",
        )
