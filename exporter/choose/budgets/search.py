"""Finds the candidate of least damage that holds a budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from exporter.choose.budgets.candidates import (
    PlanCandidate,
    QualityCheck,
    unmeasured_step,
    with_gains,
)
from exporter.choose.budgets.refusals import refuse_floors, refuse_goal
from exporter.choose.budgets.units import Counted, Goal, Unit
from exporter.choose.selection.greedy import FIRST, by_prior, greedy
from exporter.choose.selection.meters import Meter, RememberingMeter
from exporter.choose.selection.options import (
    Option,
    Step,
    Stop,
    most_sublayers,
)
from exporter.choose.selection.search_options import SearchOptions
from exporter.errors import PlanError
from exporter.models.ablation.damage import AnyDamage, Objective
from exporter.progress import QUIET, Progress
from graph_passes.types import SublayerRef

_SLACK = 1e-9
_TRIED = 4
"""Options that are held against the floors after one that broke them."""


class Search:
    """Looks for candidates among options."""

    def __init__(
        self,
        meter: Meter,
        checker: QualityCheck,
        options: Sequence[Option],
        settings: SearchOptions | None = None,
        prior: Mapping[SublayerRef, float] | None = None,
        quality: Mapping[Option, float] | None = None,
        allow_all: bool = False,
        progress: Progress = QUIET,
    ) -> None:
        self._meter = meter if isinstance(meter, RememberingMeter) else RememberingMeter(meter)
        self.checker = checker
        self._options = list(options)
        self._settings = settings or SearchOptions()
        self._shortlist = self._settings.shortlist or None
        self._allow_all = allow_all
        self._most = most_sublayers(self._meter.num_layers, allow_all)
        self._prior = dict(prior or {})
        self._quality = dict(quality) if quality else None
        self._progress = progress
        self._known: list[tuple[Unit, list[Option]]] = []

    def solve(self, goals: Sequence[Goal], use_up: Unit) -> PlanCandidate:
        """The candidate of least damage that reaches all goals within the floors."""
        if not goals:
            return self.within_floors(use_up)
        candidate = self._treated_better(goals, self._trimmed(goals, self._reaching(goals)))
        if self.checker.holds(candidate):
            return candidate
        nearest = self.within_floors(goals[0].unit)
        if not _all_reached(goals, nearest):
            refuse_floors(self.checker, candidate, goals, nearest)
        shorter = self._trimmed(goals, nearest)
        return shorter if self.checker.holds(shorter) else nearest

    def within_floors(self, unit: Unit) -> PlanCandidate:
        """As much of a unit as the floors allow; perhaps nothing."""
        return self._filled(unit, self._until_broken(unit))

    def path(self, unit: Unit, stop: Stop) -> list[tuple[PlanCandidate, AnyDamage]]:
        """The candidates after every greedy step, from the first on, with their damage."""
        steps = self._greedy(unit, math.inf, PlanCandidate(), stop)
        return [
            (PlanCandidate().plus(steps[: number + 1]), step.damage)
            for number, step in enumerate(steps)
        ]

    def damage(self, candidate: PlanCandidate) -> AnyDamage:
        """What a candidate costs on the text that is searched on."""
        return self._meter.measure_many(candidate.cut, [])[0]

    def smallest(self, unit: Unit) -> PlanCandidate:
        """The one step of least damage for its gain."""
        first: list[Step] = []

        def only(step: Step) -> bool:
            first.append(step)
            return True

        self._greedy(unit, math.inf, PlanCandidate(), only)
        return PlanCandidate().plus(first)

    def gentlest(self, unit: Unit) -> tuple[PlanCandidate, AnyDamage]:
        """The one step of least damage, whatever it gains, of those that a path begins with."""
        options = by_prior([o for o in self._with_gains(unit) if o.gain > 0], self._prior)
        looked_at = options[: FIRST * self._shortlist] if self._shortlist else options
        candidates = [PlanCandidate().plus([unmeasured_step(option)]) for option in looked_at]
        damages = self._meter.measure_many({}, [candidate.cut for candidate in candidates])[1:]
        pairs = zip(candidates, damages, strict=True)
        return min(pairs, key=lambda item: item[1].objective(self._objective))

    def _reaching(self, goals: Sequence[Goal]) -> PlanCandidate:
        """Greedy steps to one goal after the other."""
        # Blocks first, while both their halves are there.
        order = sorted(goals, key=lambda goal: goal.unit != Counted((), "block"))
        candidate = PlanCandidate()
        for goal in (*order, *order):  # a map for a later goal may have cost some of an earlier one
            candidate = self._towards(goal, candidate)
        for goal in order:
            if not _reached(goal, candidate):
                refuse_goal(goal, candidate.gain(goal.unit))
        return candidate

    def _towards(self, goal: Goal, candidate: PlanCandidate) -> PlanCandidate:
        missing = goal.amount - candidate.gain(goal.unit)
        if missing <= _SLACK * goal.amount:
            return candidate
        try:
            return candidate.plus(self._greedy(goal.unit, missing, candidate))
        except PlanError as error:
            # Greedy steps kept the wrong one, or maps that are too large; what is idle comes back.
            begun = candidate, self._strongest(goal.unit, candidate)
            everything = [self._everything(goal.unit, item) for item in begun]
            for item in everything:
                if _reached(goal, item):
                    return item
            refuse_goal(goal, max(item.gain(goal.unit) for item in everything), error)

    def _until_broken(self, unit: Unit) -> PlanCandidate:
        """Greedy steps up to the first that breaks a floor."""
        candidates = [PlanCandidate()]

        def breaks(step: Step) -> bool:
            candidates.append(candidates[-1].plus([step]))
            return not self.checker.holds(candidates[-1])

        self._greedy(unit, math.inf, PlanCandidate(), breaks)
        return next(
            candidate
            for candidate in reversed(candidates)
            if not candidate.options or self.checker.holds(candidate)
        )

    def _filled(self, unit: Unit, candidate: PlanCandidate) -> PlanCandidate:
        """What room the floors leave is filled, by the cheapest steps or by the smallest."""
        candidates = []
        for by_gain in (True, False):
            filled = candidate
            while (further := self._one_more(unit, filled, by_gain)) is not None:
                filled = further
            candidates.append(filled)
        return max(candidates, key=lambda item: item.gain(unit))

    def _one_more(
        self, unit: Unit, candidate: PlanCandidate, by_gain: bool
    ) -> PlanCandidate | None:
        """The step of least damage, or least for its gain, that the floors still allow."""
        further = [
            candidate.plus([unmeasured_step(option)]) for option in self._left(unit, candidate)
        ]
        if not further:
            return None
        cuts = [other.cut for other in further]
        now, *then = self._meter.measure_many(candidate.cut, cuts, self._progress)
        before, gained = now.objective(self._objective), candidate.gain(unit)
        added = [damage.objective(self._objective) - before for damage in then]
        gains = [other.gain(unit) - gained if by_gain else 1.0 for other in further]
        prices = [cost / gain for cost, gain in zip(added, gains, strict=True)]
        order = sorted(range(len(further)), key=prices.__getitem__)
        return next((further[i] for i in order[:_TRIED] if self.checker.holds(further[i])), None)

    def _left(self, unit: Unit, candidate: PlanCandidate) -> list[Option]:
        """Options that add to a candidate, or take the place of one of its own and gain more."""
        taken = {name: option for option in candidate.options for name in option.names}

        def adds(option: Option) -> bool:
            gone = {taken[name] for name in option.names if name in taken}
            whole = all(set(other.names) <= set(option.names) for other in gone)
            more = option.gain > sum(other.gain for other in gone)
            return whole and more and len({*taken, *option.names}) <= self._most

        left = [option for option in self._with_gains(unit) if adds(option)]
        left.sort(key=lambda option: sum(self._prior.get(name, 0.0) for name in option.names))
        return left[: self._shortlist]

    def _trimmed(self, goals: Sequence[Goal], candidate: PlanCandidate) -> PlanCandidate:
        """Puts back what the goals don't need: later steps may have made an earlier one idle."""
        while True:
            idle = [
                other
                for other in map(candidate.without, candidate.options)
                if _all_reached(goals, other)
            ]
            if not idle:
                return candidate
            damages = self._meter.measure_many(candidate.cut, [other.cut for other in idle])[1:]
            costs = [damage.objective(self._objective) for damage in damages]
            candidate = idle[costs.index(min(costs))]

    def _treated_better(self, goals: Sequence[Goal], candidate: PlanCandidate) -> PlanCandidate:
        """Another way for a sublayer, such as a map for nothing, where that lowers the damage."""
        while True:
            own = {option.names: option for option in candidate.options}
            others = [
                candidate.plus([unmeasured_step(option)])
                for option in self._with_gains(goals[0].unit)
                if option.names in own and option.replacement != own[option.names].replacement
            ]
            others = [other for other in others if _all_reached(goals, other)]
            now, *then = self._meter.measure_many(candidate.cut, [other.cut for other in others])
            costs = [damage.objective(self._objective) for damage in (now, *then)]
            if min(costs) >= costs[0]:
                return candidate
            candidate = others[costs.index(min(costs)) - 1]

    def _with_gains(self, unit: Unit) -> list[Option]:
        """The options with their gain in a unit: the same objects whenever it is asked for."""
        for known, options in self._known:
            if known is unit:
                return options
        self._known.append((unit, with_gains(self._options, unit, self._quality)))
        return self._known[-1][1]

    def _everything(self, unit: Unit, candidate: PlanCandidate) -> PlanCandidate:
        """A candidate, and all that may go beside it; one sublayer stays."""
        taken = set(candidate.choices)
        added: list[Option] = []
        for option in sorted(self._with_gains(unit), key=lambda item: -item.gain):
            if not taken & set(option.names) and len(taken) + len(option.names) <= self._most:
                added.append(option)
                taken.update(option.names)
        return candidate.plus(map(unmeasured_step, added))

    def _strongest(self, unit: Unit, candidate: PlanCandidate) -> PlanCandidate:
        """The same sublayers, each treated in the way that gains most."""
        own = {
            option.names: unit.gain(option.names, option.replacement)
            for option in candidate.options
        }
        better = [o for o in self._with_gains(unit) if o.names in own and o.gain > own[o.names]]
        return candidate.plus(map(unmeasured_step, sorted(better, key=lambda option: option.gain)))

    @property
    def _objective(self) -> Objective:
        return self._settings.kept_small

    def _greedy(
        self, unit: Unit, goal: float, candidate: PlanCandidate, stop: Stop | None = None
    ) -> list[Step]:
        return greedy(
            self._meter,
            self._with_gains(unit),
            goal=goal,
            objective=self._objective,
            shortlist=self._shortlist,
            prior=self._prior,
            stop=stop,
            start=candidate.cut,
            allow_all=self._allow_all,
            progress=self._progress,
        )


def _reached(goal: Goal, candidate: PlanCandidate) -> bool:
    return candidate.gain(goal.unit) >= goal.amount * (1 - _SLACK)


def _all_reached(goals: Sequence[Goal], candidate: PlanCandidate) -> bool:
    return all(_reached(goal, candidate) for goal in goals)
