"""Choice by scores: the lowest go; and whether measuring damage is affordable."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace

from exporter.artifacts import ImportanceReport, PruningPlan, Score
from exporter.artifacts.plans import plan_cut
from exporter.artifacts.stacks import Stacks
from exporter.choose.budgets.budget import SearchOptions
from exporter.choose.budgets.inputs import PlanInputs
from exporter.choose.budgets.options import groups_of, options_for, protected_names, refuse_counts
from exporter.errors import PlanError
from exporter.heal.automatic import operations_per_second


def lowest_scores(inputs: PlanInputs) -> PruningPlan:
    """The lowest scores of what may go; see :func:`exporter.artifacts.plans.plan_cut`."""
    report, protected = inputs.report, inputs.protected
    layers = {layer for layer, _ in protected}

    def may_go(score: Score) -> bool:  # a block stays when a sublayer of it does
        if score.kind == "block":
            return score.layer not in layers
        return (score.layer, score.kind) not in protected

    return plan_cut(
        report.model_copy(update={"scores": [s for s in report.scores if may_go(s)]}),
        **inputs.budget.counts,
        importance_sha256=inputs.importance_sha256,
        allow_all=inputs.allow_all,
        progress=inputs.progress,
    )


SEARCH_S = 150.0
"""What a search may take that nobody asked for."""
USUAL_DROPS = 8
"""Steps of a search whose number of drops is not known before."""
FEWEST_TOKENS = 512
"""On fewer a search would follow chance."""


def search_runs(candidates: int, drops: int, shortlist: int) -> float:
    """Runs of the model that a greedy search takes: a candidate costs half a run."""
    later = min(candidates, shortlist or candidates)
    first = min(candidates, 3 * later)
    return 1 + first / 2 + max(0, drops - 1) * (1 + later / 2)


def affordable_tokens(parameters: int, runs: float, operations_per_s: float) -> int:
    """On how many tokens a search of so many runs takes :data:`SEARCH_S`; 0 for too few."""
    number = int(SEARCH_S * operations_per_s / (2 * parameters * runs))
    return number if number >= FEWEST_TOKENS else 0


def affordable_shortlist(
    parameters: int, candidates: int, operations_per_s: float, shortlist: int
) -> int:
    """How many candidates a step measures, so that a search takes :data:`SEARCH_S`."""
    for number in range(min(candidates, shortlist or candidates), 1, -1):
        runs = search_runs(candidates, USUAL_DROPS, number)
        if affordable_tokens(parameters, runs, operations_per_s):
            return number
    return 1


def affordable(inputs: PlanInputs) -> SearchOptions:
    """By measured damage where that takes minutes, else by scores."""
    search, budget, layers = inputs.settings.search, inputs.budget, inputs.stacks
    counts = budget.counts if budget.only_counts else {}
    protected = protected_names(search.protect, layers)
    groups = [group for group, _ in groups_of(counts)] or ["attention", "mlp"]
    options = sum(len(options_for(group, layers, protected)) for group in groups)
    runs = search_runs(options, sum(counts.values()) or USUAL_DROPS, search.shortlist)
    parameters, speed = inputs.loaded.model.num_parameters(), operations_per_second()
    tokens = affordable_tokens(parameters, runs, speed)
    if not counts or tokens:
        if not tokens:  # nothing but measured damage decides, so fewer are tried
            tokens = FEWEST_TOKENS
            shortlist = affordable_shortlist(parameters, options, speed, search.shortlist)
            search = replace(search, shortlist=shortlist)
        tokens = min(tokens, search.tokens)
        inputs.progress.say(f"plan: chosen by measured damage, on up to {tokens:,} tokens")
        return replace(search, search="greedy", tokens=tokens)
    search = by_scores_inside(search, inputs.report, counts, inputs.allow_all)
    kept = f", without the {' and '.join(search.protect)} layer" if search.protect else ""
    inputs.progress.say(
        f"plan: chosen by scores{kept}; measuring the damage would take too long here"
    )
    return search


def by_scores_inside(
    search: SearchOptions, report: ImportanceReport, counts: Mapping[str, int], allow_all: bool
) -> SearchOptions:
    """The lowest scores, without the first and the last layer as far as others are enough.

    Scores say little of these two: what reads the embedding, and what writes the answer.
    """
    changed = replace(search, search="one-shot")
    for ends in ((), ("last",), ("first", "last")) if not search.protect else ():
        names = protected_names(ends, Stacks(report.model.num_layers))
        with suppress(PlanError):
            refuse_counts(report, counts, names, allow_all=allow_all)
            changed = replace(changed, protect=ends)
    return changed
