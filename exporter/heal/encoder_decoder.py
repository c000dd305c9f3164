"""What takes the places of branches that an encoder-decoder loses: biases and linear maps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from exporter.artifacts import PlannedDeletion, PruningPlan
from exporter.errors import HealingError
from exporter.heal.fit import fit_branches
from exporter.heal.fits import most_explained
from exporter.heal.options import HealOptions
from exporter.heal.plan_file import kind_of
from exporter.models.ablation.branch_replacements import BranchReplacement
from exporter.models.anatomy.architectures import named_in
from exporter.models.loading.model_source import LoadedModel
from exporter.models.texts.calibration import CalibrationText
from exporter.progress import QUIET, Progress
from graph_passes.types import Replacement, SublayerRef

KINDS = ("bias", "linear", "best")
"""The ways of healing that there are; they put something in a branch's place."""


@dataclass(frozen=True)
class HealedStacks:
    """A healed plan, not yet written.

    Attributes:
        plan: Each sublayer with what takes its place.
        branch_replacements: What that is.
    """

    plan: PruningPlan
    branch_replacements: Mapping[SublayerRef, BranchReplacement]


def heal_stacks(
    loaded: LoadedModel,
    plan: PruningPlan,
    text: CalibrationText,
    options: HealOptions,
    progress: Progress = QUIET,
) -> HealedStacks:
    """Fits what takes the branches' places, each on the whole model.

    Args:
        loaded: An encoder-decoder.
        plan: What it loses.
        text: Pairs to fit on.
        options: ``best`` takes for each branch what explains most of its output on held-out
            tokens, nothing where neither explains any.
        progress: Told what goes on.

    Raises:
        HealingError: The way is none of :data:`KINDS`, or there are too few tokens.
        PlanError: The model has no such sublayers.
    """
    refuse_other_ways(options)
    names = named_in(loaded.model, plan.deletions)
    fits = fit_branches(
        loaded,
        text,
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
    deletions = [
        PlannedDeletion(layer=n.layer, kind=n.kind, replacement=kind_of(chosen[n])) for n in names
    ]
    told = {"deletions": deletions, "fitted_on": text.parts}
    return HealedStacks(plan.model_copy(update=told), chosen)


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
