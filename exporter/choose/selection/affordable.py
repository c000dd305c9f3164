"""How a number of sublayers is chosen where nobody says how: by damage, if that takes minutes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from exporter.artifacts import ImportanceReport
from exporter.choose.selection.options import options_for, protected_names
from exporter.choose.selection.refusals import groups_of, refuse_counts
from exporter.choose.selection.search_options import SearchOptions
from exporter.errors import PlanError
from exporter.heal.automatic import operations_per_second
from exporter.progress import QUIET, Progress

SEARCH_S = 150.0
"""What a search may take that nobody asked for."""
USUAL_DROPS = 8
"""Steps of a search whose number of drops is not known before."""
FEWEST_TOKENS = 512
"""On fewer a search would follow chance."""


def search_runs(candidates: int, drops: int, shortlist: int) -> float:
    """Runs of the model that a greedy search takes: a candidate costs half a run.

    Args:
        candidates: How many sublayers may be dropped.
        drops: How many are.
        shortlist: Candidates that are measured at a step; 0: all.
    """
    later = min(candidates, shortlist or candidates)
    first = min(candidates, 3 * later)
    return 1 + first / 2 + max(0, drops - 1) * (1 + later / 2)


def affordable_tokens(parameters: int, runs: float, operations_per_s: float) -> int:
    """On how many tokens a search of so many runs takes :data:`SEARCH_S`; 0 for too few.

    Args:
        parameters: Of the model: two operations for each of them and each token.
        runs: See :func:`search_runs`.
        operations_per_s: Of the machine.
    """
    found = int(SEARCH_S * operations_per_s / (2 * parameters * runs))
    return found if found >= FEWEST_TOKENS else 0


def affordable_shortlist(
    parameters: int, candidates: int, operations_per_s: float, shortlist: int
) -> int:
    """How many candidates a step measures, so that a search on few tokens takes :data:`SEARCH_S`.

    Args:
        parameters: Of the model.
        candidates: How many sublayers may be dropped.
        operations_per_s: Of the machine.
        shortlist: What was asked for; it is never exceeded.
    """
    most = min(candidates, shortlist or candidates)
    affords = partial(affordable_tokens, parameters, operations_per_s=operations_per_s)
    return next(
        (
            each
            for each in range(most, 1, -1)
            if affords(search_runs(candidates, USUAL_DROPS, each))
        ),
        1,
    )


def affordable(
    search: SearchOptions,
    report: ImportanceReport,
    counts: Mapping[str, int],
    model: Any,
    *,
    allow_all: bool = False,
    progress: Progress = QUIET,
) -> SearchOptions:
    """By measured damage where that takes minutes, else by scores.

    Args:
        search: What was asked for.
        report: The scores.
        counts: How many sublayers of each group go; none where something else decides, which only
            measured damage can.
        model: The transformers model.
        allow_all: Whether every sublayer may go.
        progress: Told which it is.
    """
    layers = report.model.num_layers
    protected = protected_names(search.protect, layers)
    groups = [group for group, _ in groups_of(counts)] or ["attention", "mlp"]
    options = sum(len(options_for(group, layers, protected)) for group in groups)
    runs = search_runs(options, sum(counts.values()) or USUAL_DROPS, search.shortlist)
    parameters, speed = model.num_parameters(), operations_per_second()
    tokens = affordable_tokens(parameters, runs, speed)
    if not counts or tokens:
        if not tokens:  # nothing but measured damage decides, so fewer are tried
            tokens = FEWEST_TOKENS
            shortlist = affordable_shortlist(parameters, options, speed, search.shortlist)
            search = replace(search, shortlist=shortlist)
        tokens = min(tokens, search.tokens)
        progress.say(f"plan: chosen by measured damage, on up to {tokens:,} tokens")
        return replace(search, search="greedy", tokens=tokens)
    found = by_scores_inside(search, report, counts, allow_all)
    kept = f", without the {' and '.join(found.protect)} layer" if found.protect else ""
    progress.say(f"plan: chosen by scores{kept}; measuring the damage would take too long here")
    return found


def by_scores_inside(
    search: SearchOptions, report: ImportanceReport, counts: Mapping[str, int], allow_all: bool
) -> SearchOptions:
    """The lowest scores, without the first and the last layer as far as others are enough.

    Scores say little of these two: what reads the embedding, and what writes the answer.

    Args:
        search: What was asked for; what it protects itself stands alone.
        report: The scores.
        counts: How many go.
        allow_all: Whether every sublayer may.
    """
    found = replace(search, search="one-shot")
    for ends in ((), ("last",), ("first", "last")) if not search.protect else ():
        if _suffices(report, counts, ends, allow_all):
            found = replace(found, protect=ends)
    return found


def _suffices(
    report: ImportanceReport, counts: Mapping[str, int], protect: Collection[str], allow_all: bool
) -> bool:
    names = protected_names(protect, report.model.num_layers)
    try:
        refuse_counts(report, counts, names, allow_all=allow_all)
    except PlanError:
        return False
    return True
