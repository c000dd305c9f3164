"""Choice among the sublayers of an encoder-decoder by the damage that their absence does."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from exporter.artifacts import ImportanceReport
from exporter.artifacts.plans.stacks import DECODER_KINDS, Stacks
from exporter.choose.selection.greedy import greedy
from exporter.choose.selection.meters import Meter
from exporter.choose.selection.options import Group, Option, cut_of_options, standing_options
from exporter.choose.selection.refusals import groups_of, refuse_number
from exporter.choose.selection.search_options import SearchOptions
from exporter.models.ablation.branch_replacements import BranchReplacements
from exporter.models.ablation.damage import AnyDamage
from exporter.progress import QUIET, Progress
from graph_passes.types import SublayerRef

if TYPE_CHECKING:
    from exporter.models.loading.model_source import LoadedModel

AFFORDABLE = 150_000_000
"""Parameters up to which damage is measured where nobody asks for it: minutes on a few cores."""


def settled_for_stacks(
    search: SearchOptions, load: Callable[[], LoadedModel], progress: Progress = QUIET
) -> SearchOptions:
    """The search with its method named.

    Args:
        search: What was asked for.
        load: Gives the model, where its size decides.
        progress: Told what was decided.
    """
    if search.search != "auto":
        return replace(search, search=search.search or "one-shot")
    if load().model.num_parameters() > AFFORDABLE:
        progress.say("plan: chosen by scores; measuring the damage would take too long here")
        return replace(search, search="one-shot")
    progress.say("plan: chosen by measured damage, on the pairs that the scores rest on")
    return replace(search, search="greedy")


def greedy_in_stacks(
    meter: Meter,
    report: ImportanceReport,
    stacks: Stacks,
    counts: Mapping[str, int],
    protected: Collection[SublayerRef],
    search: SearchOptions,
    *,
    allow_all: bool = False,
    progress: Progress = QUIET,
) -> tuple[list[Option], AnyDamage]:
    """Chooses one by one what adds the least damage, each kind after the other.

    Args:
        meter: Measures the damage.
        report: The scores, which say what is tried first.
        stacks: The model's layers.
        counts: How many of each kind go.
        protected: What stays.
        search: How many are tried at a step, and which damage counts.
        allow_all: Lets every sublayer go.
        progress: Told of every step.

    Returns:
        The options in the order of choice, and the damage of all together.

    Raises:
        PlanError: More is asked for than may go.
        ScoringError: Logits are not finite.
    """
    prior = {
        SublayerRef(score.layer, score.kind): score.score
        for score in report.scores
        if score.kind in DECODER_KINDS
    }
    taken: list[Option] = []
    for group, number in groups_of(counts):
        start: BranchReplacements = cut_of_options(taken)
        options = options_in_stacks(group, stacks, {*protected, *start})
        if number > len(options):
            refuse_number(group, number, len(options), report.model.source)
        with progress.task(f"search by damage, {group}"):
            steps = greedy(
                meter,
                options,
                goal=number,
                objective="perplexity" if search.kept_small == "perplexity" else "kl",
                shortlist=search.shortlist or None,
                prior=prior,
                start=start,
                allow_all=allow_all,
                progress=progress,
            )
        taken += standing_options(steps)
    return taken, meter.measure_many(cut_of_options(taken), [])[0]


def options_in_stacks(
    group: Group, stacks: Stacks, kept: Collection[SublayerRef] = ()
) -> list[Option]:
    """An option of gain 1 for each sublayer, or block, that may go, in the layers' order."""
    found = []
    for layer in range(stacks.layers):
        refs = stacks.named(layer, "block")
        if group == "block":
            found.append(Option(tuple(refs)))
        else:
            found += [Option((ref,)) for ref in refs if group in ("joint", ref.kind)]
    return [option for option in found if not {*kept} & {*option.names}]
