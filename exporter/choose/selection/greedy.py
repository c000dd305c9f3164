"""Greedy choice: at each step the option that adds the least damage for its gain."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from exporter.artifacts import ImportanceReport
from exporter.artifacts.stacks import DECODER_KINDS, Stacks
from exporter.choose.selection.meters import Meter
from exporter.choose.selection.options import (
    Option,
    Step,
    Stop,
    cut_of_options,
    groups_of,
    most_sublayers,
    options_for,
    overlap,
    reaches,
    refuse_gain,
    refuse_number,
    standing_options,
    total_gain,
)
from exporter.choose.selection.search_options import SearchOptions
from exporter.errors import PlanError
from exporter.models.ablation.branch_replacements import BranchReplacements
from exporter.models.ablation.damage import AnyDamage, Objective
from exporter.progress import QUIET, Progress
from graph_passes.types import SublayerRef

if TYPE_CHECKING:
    from exporter.models.loading.model_source import LoadedModel

FIRST = 3
"""Times the shortlist are measured at the first step."""
_NEW_PART = 4  # one place in so many goes to candidates that were never measured


def greedy(
    meter: Meter,
    options: Sequence[Option],
    *,
    goal: float,
    objective: Objective = "kl",
    shortlist: int | None = None,  # None for all
    prior: Mapping[SublayerRef, float] | None = None,
    stop: Stop | None = None,
    start: BranchReplacements | None = None,
    allow_all: bool = False,
    progress: Progress = QUIET,
) -> list[Step]:
    """Chooses options one by one until their gain is the goal.

    An option may take the place of a chosen one that changes no other sublayer and is worth less,
    such as leaving a branch out that was replaced before.

    The steps in order; what stands after them is given by
    :func:`~exporter.choose.selection.options.standing_options`.
    """
    begun, most = dict(start or {}), most_sublayers(meter.num_layers, allow_all)
    options = [option for option in options if not set(option.names) & set(begun)]
    refuse_gain(options, goal, most - len(begun))
    search = _Greedy(meter, options, goal, objective, begun, most)
    steps: list[Step] = []
    while not reaches(search.gain, goal):
        candidates = search.shortlist(shortlist, prior or {})
        if not candidates:
            _refuse_end(search.gain, goal)
            break
        step = search.step(candidates, progress)
        if stop is not None and stop(step):
            break
        steps.append(step)
        value = step.damage.objective(objective)
        progress.detail(f"search: {step.option}: {objective} {value:+.4f}, gain {step.gain:g}")
    return steps


def by_prior(options: Sequence[Option], prior: Mapping[SublayerRef, float]) -> list[Option]:
    """What is likely to cost least for its gain first."""
    return sorted(options, key=lambda o: sum(prior.get(name, 0.0) for name in o.names) / o.gain)


class _Greedy:
    """What is chosen, and what candidates looked like when they were last measured."""

    def __init__(
        self,
        meter: Meter,
        options: Sequence[Option],
        goal: float,
        objective: Objective,
        start: BranchReplacements,
        most: int,
    ) -> None:
        self._meter, self._options = meter, options
        self._goal, self._objective, self._start = goal, objective, start
        self._most = most
        self._standing: list[Option] = []
        self._price: dict[Option, float] = {}

    @property
    def gain(self) -> float:
        """Of what is chosen."""
        return total_gain(self._standing)

    def shortlist(self, number: int | None, prior: Mapping[SublayerRef, float]) -> list[Option]:
        """The candidates that are worth measuring."""
        candidates = [option for option in self._options if self._may_follow(option)]
        if number is None or len(candidates) <= number:
            return candidates
        known = sorted((o for o in candidates if o in self._price), key=self._price.__getitem__)
        new = by_prior([option for option in candidates if option not in self._price], prior)
        if not self._price:
            return new[: FIRST * number]
        fresh = min(len(new), max(number - len(known), -(-number // _NEW_PART)))
        return [*new[:fresh], *known[: number - fresh]]

    def step(self, candidates: Sequence[Option], progress: Progress) -> Step:
        """Measures the candidates, then those that still looked better, and takes the best."""
        result = self._measured(candidates, progress)
        lowest = min(self._price[option] for option in result)
        missed = [
            option
            for option, price in self._price.items()
            if price < lowest and option not in result and self._may_follow(option)
        ]
        missed.sort(key=self._price.__getitem__)
        if missed:
            result |= self._measured(missed[: len(candidates)], progress)
        order = {option: place for place, option in enumerate(self._options)}
        best = min(result, key=lambda o: (self._price[o], order[o]))
        self._standing = self._after(best)
        return Step(best, result[best], self.gain)

    def _measured(self, options: Sequence[Option], progress: Progress) -> dict[Option, AnyDamage]:
        """The damage with each of them, and so their prices on the model as it is now."""
        cut = cut_of_options(self._standing, self._start)
        afters = [self._after(option) for option in options]
        cuts = [cut_of_options(after, self._start) for after in afters]
        now, *then = self._meter.measure_many(cut, cuts, progress)
        for option, after, damage in zip(options, afters, then, strict=True):
            # More than the gain that is still wanted is worth nothing.
            added = damage.objective(self._objective) - now.objective(self._objective)
            self._price[option] = added / min(total_gain(after) - self.gain, self._goal - self.gain)
        return dict(zip(options, then, strict=True))

    def _after(self, option: Option) -> list[Option]:
        return [o for o in self._standing if not overlap(o, option)] + [option]

    def _may_follow(self, option: Option) -> bool:
        gone = [o for o in self._standing if overlap(o, option)]
        if any(not set(o.names) <= set(option.names) for o in gone):
            return False
        changed = cut_of_options(self._after(option), self._start)
        return option.gain > total_gain(gone) and len(changed) <= self._most


def _refuse_end(gain: float, goal: float) -> None:
    if math.isfinite(goal):
        raise PlanError(
            f"The search ends at a gain of {gain:g}, short of {goal:g}: nothing else may be "
            "dropped.",
            f"Ask for at most {gain:g}, or protect fewer sublayers.",
        )


AFFORDABLE = 150_000_000
"""Parameters up to which damage is measured where nobody asks for it: minutes on a few cores."""


def settled_for_stacks(
    search: SearchOptions, load: Callable[[], LoadedModel], progress: Progress = QUIET
) -> SearchOptions:
    """The search with its method named."""
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
    """Chooses one by one what adds the least damage, each kind after the other."""
    prior = {
        SublayerRef(score.layer, score.kind): score.score
        for score in report.scores
        if score.kind in DECODER_KINDS
    }
    taken: list[Option] = []
    for group, number in groups_of(counts):
        start: BranchReplacements = cut_of_options(taken)
        options = options_for(group, stacks, {*protected, *start})
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
