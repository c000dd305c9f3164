"""Choice by measured damage: greedy steps of least damage for their gain, to goals or limits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NoReturn

from exporter.choose.budgets.budget import SearchOptions
from exporter.choose.budgets.limits import Meter, QualityCheck, RememberingMeter
from exporter.choose.budgets.options import (
    Goal,
    Option,
    PlanCandidate,
    Step,
    Stop,
    Unit,
    most_sublayers,
    with_gains,
    words_of,
)
from exporter.errors import PlanError, UndecidedGoalError, UnmetGoalError
from exporter.models.ablation.branch_replacements import BranchReplacements
from exporter.models.ablation.damage import AnyDamage, Objective
from exporter.progress import QUIET, Progress
from graph_passes.types import SublayerRef

FIRST = 3
"""Times the shortlist are measured at the first step."""
_NEW_PART = 4  # one place in so many goes to candidates that were never measured
_SLACK = 1e-9  # gains are summed in floats
_TRIED = 4
"""Options that are held against the floors after one that broke them."""


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
    """Chooses options one by one until their gain is the goal, or nothing else may go.

    An option may take the place of a chosen one that changes no other sublayer and is worth less,
    such as leaving a branch out that was replaced before.

    The steps in order; a :class:`PlanCandidate` tells what stands after them.
    """
    begun, most = dict(start or {}), most_sublayers(meter.num_layers, allow_all)
    options = [option for option in options if not set(option.names) & set(begun)]
    search = _Greedy(meter, options, goal, objective, begun, most)
    steps: list[Step] = []
    while search.gain < goal - _SLACK * max(1.0, abs(goal) if math.isfinite(goal) else 1.0):
        candidates = search.shortlist(shortlist, prior or {})
        if not candidates:
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


_MORE_TEXT = "score on more text, which makes the intervals narrower."


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
        self._chosen = PlanCandidate()
        self._price: dict[Option, float] = {}

    @property
    def gain(self) -> float:
        """Of what is chosen."""
        return self._chosen.worth

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
        self._chosen = self._chosen.plus(best)
        return Step(best, result[best], self.gain)

    def _measured(self, options: Sequence[Option], progress: Progress) -> dict[Option, AnyDamage]:
        """The damage with each of them, and so their prices on the model as it is now."""
        afters = [self._chosen.plus(option) for option in options]
        cut, *cuts = ({**self._start, **chosen.cut} for chosen in (self._chosen, *afters))
        now, *then = self._meter.measure_many(cut, cuts, progress)
        for option, after, damage in zip(options, afters, then, strict=True):
            # More than the gain that is still wanted is worth nothing.
            added = damage.objective(self._objective) - now.objective(self._objective)
            self._price[option] = added / min(after.worth - self.gain, self._goal - self.gain)
        return dict(zip(options, then, strict=True))

    def _may_follow(self, option: Option) -> bool:
        return self._chosen.takes(option, self._most, self._start)


class Search:
    """Looks for the candidate of least damage that holds a budget, among options."""

    def __init__(
        self,
        meter: Meter,
        checker: QualityCheck,
        options: Sequence[Option],
        settings: SearchOptions | None = None,
        prior: Mapping[SublayerRef, float] | None = None,
        allow_all: bool = False,
        progress: Progress = QUIET,
    ) -> None:
        self._meter = meter if isinstance(meter, RememberingMeter) else RememberingMeter(meter)
        self.checker, self._options = checker, list(options)
        settings = settings or SearchOptions()
        self._shortlist, self._objective = settings.shortlist or None, settings.kept_small
        self._allow_all = allow_all
        self._most = most_sublayers(self._meter.num_layers, allow_all)
        self._prior, self._progress = dict(prior or {}), progress
        self._known: list[tuple[Unit, list[Option]]] = []

    def solve(self, goals: Sequence[Goal], use_up: Unit) -> PlanCandidate:
        """The candidate of least damage that reaches all goals within the floors."""
        if not goals:
            return self.within_floors(use_up)
        candidate = self._treated_better(goals, self._trimmed(goals, self._reaching(goals)))
        if self.checker.holds(candidate.cut):
            return candidate
        nearest = self.within_floors(goals[0].unit)
        if not _all_reached(goals, nearest):
            raise self._beyond_floors(
                f"The budget can't be met: with {words_of(goals)}",
                self.checker.damage_of(candidate.cut),
                f"Within the limits on quality, this is possible: {words_of(goals, nearest.gain)} "
                f"({self.checker.damage_of(nearest.cut).words}). Ask for that, allow more damage, "
                f"let more be dropped or replaced (--heal best), or {_MORE_TEXT}",
                "beyond-floors",
            )
        shorter = self._trimmed(goals, nearest)
        return shorter if self.checker.holds(shorter.cut) else nearest

    def within_floors(self, unit: Unit) -> PlanCandidate:
        """As much of a unit as the floors allow: greedy steps, and what room they leave is filled.

        By the cheapest steps or by the smallest; perhaps nothing.
        """
        candidates = [PlanCandidate()]

        def breaks(step: Step) -> bool:
            candidates.append(candidates[-1].plus(step.option))
            return not self.checker.holds(candidates[-1].cut)

        self._greedy(unit, math.inf, PlanCandidate(), breaks)
        last = next(c for c in reversed(candidates) if not c.options or self.checker.holds(c.cut))
        results = []
        for by_gain in (True, False):
            filled = last
            while (further := self._one_more(unit, filled, by_gain)) is not None:
                filled = further
            results.append(filled)
        return max(results, key=lambda item: item.gain(unit))

    def path(self, unit: Unit, stop: Stop) -> list[tuple[PlanCandidate, AnyDamage]]:
        """The candidates after every greedy step, from the first on, with their damage."""
        steps = self._greedy(unit, math.inf, PlanCandidate(), stop)
        options = [step.option for step in steps]
        return [
            (PlanCandidate().plus(*options[: number + 1]), step.damage)
            for number, step in enumerate(steps)
        ]

    def damage(self, candidate: PlanCandidate) -> AnyDamage:
        """What a candidate costs on the text that is searched on."""
        return self._meter.measure_many(candidate.cut, [])[0]

    def smallest(self, unit: Unit) -> PlanCandidate:
        """The one step of least damage for its gain."""
        first: list[Option] = []

        def only(step: Step) -> bool:
            first.append(step.option)
            return True

        self._greedy(unit, math.inf, PlanCandidate(), only)
        return PlanCandidate(tuple(first))

    def gentlest(self, unit: Unit) -> tuple[PlanCandidate, AnyDamage]:
        """The one step of least damage, whatever it gains, of those that a path begins with."""
        options = by_prior(self._with_gains(unit), self._prior)
        looked_at = options[: FIRST * self._shortlist] if self._shortlist else options
        candidates = [PlanCandidate((option,)) for option in looked_at] or [PlanCandidate()]
        damages = self._meter.measure_many({}, [candidate.cut for candidate in candidates])[1:]
        pairs = zip(candidates, damages, strict=True)
        return min(pairs, key=lambda item: item[1].objective(self._objective))

    def refuse_nothing(self, unit: Unit) -> NoReturn:
        """Refuses floors that not even the smallest cut keeps."""
        candidate = self.smallest(unit)
        if not candidate.options:
            raise PlanError(
                "Nothing can be dropped: no sublayer that may be dropped gains anything.",
                "Protect fewer sublayers, allow more --kinds, or smaller replacements: --heal "
                "best.",
                code="nothing-to-drop",
            )
        damage = self.checker.damage_of(candidate.cut)
        raise self._beyond_floors(
            f"Nothing can be dropped within the limits on quality: with {candidate.options[0]} "
            "alone",
            damage,
            f"The nearest plan costs: {damage.words}. Allow more, take --heal best, or "
            f"{_MORE_TEXT}",
            "nothing-within-floors",
        )

    def _beyond_floors(self, lead: str, damage: AnyDamage, hint: str, code: str) -> UnmetGoalError:
        """The error for a cut that breaks the floors, or isn't shown to keep them."""
        message = f"{lead}, {self.checker.outcome(damage)}."
        if self.checker.rung_with(damage).is_beyond:
            return UnmetGoalError(message, hint, code=code)
        return UndecidedGoalError(message, hint, code=f"undecided-{code}")

    def _reaching(self, goals: Sequence[Goal]) -> PlanCandidate:
        """Greedy steps to one goal after the other; blocks first, while both halves are there."""
        order = sorted(goals, key=lambda goal: not goal.unit.is_blocks)
        candidate = PlanCandidate()
        for goal in (*order, *order):  # a map for a later goal may have cost some of an earlier one
            candidate = self._towards(goal, candidate)
        for goal in order:
            if not _reached(goal, candidate):
                _refuse_goal(goal, candidate.gain(goal.unit))
        return candidate

    def _towards(self, goal: Goal, candidate: PlanCandidate) -> PlanCandidate:
        missing = goal.amount - candidate.gain(goal.unit)
        if missing <= _SLACK * goal.amount:
            return candidate
        everything = self._everything(goal.unit, candidate)
        if _reached(goal, everything):
            steps = self._greedy(goal.unit, missing, candidate)
            reached = candidate.plus(*(step.option for step in steps))
            if _reached(goal, reached):
                return reached
        # Greedy steps kept the wrong one, or maps that are too large; what is idle comes back.
        strongest = self._everything(goal.unit, self._strongest(goal.unit, candidate))
        both = everything, strongest
        if not any(_reached(goal, item) for item in both):
            _refuse_goal(goal, max(item.gain(goal.unit) for item in both))
        return next(item for item in both if _reached(goal, item))

    def _one_more(
        self, unit: Unit, candidate: PlanCandidate, by_gain: bool
    ) -> PlanCandidate | None:
        """The step of least damage, or least for its gain, that the floors still allow."""
        further = [candidate.plus(option) for option in self._left(unit, candidate)]
        if not further:
            return None
        cuts = [other.cut for other in further]
        now, *then = self._meter.measure_many(candidate.cut, cuts, self._progress)
        before, gained = now.objective(self._objective), candidate.gain(unit)
        added = [damage.objective(self._objective) - before for damage in then]
        gains = [other.gain(unit) - gained if by_gain else 1.0 for other in further]
        prices = [cost / gain for cost, gain in zip(added, gains, strict=True)]
        order = [further[n] for n in sorted(range(len(further)), key=prices.__getitem__)]
        return next((item for item in order[:_TRIED] if self.checker.holds(item.cut)), None)

    def _left(self, unit: Unit, candidate: PlanCandidate) -> list[Option]:
        """Options that add to a candidate, or take the place of one of its own and gain more."""
        left = [o for o in self._with_gains(unit) if candidate.takes(o, self._most)]
        left.sort(key=lambda option: sum(self._prior.get(name, 0.0) for name in option.names))
        return left[: self._shortlist]

    def _trimmed(self, goals: Sequence[Goal], candidate: PlanCandidate) -> PlanCandidate:
        """Puts back what the goals don't need: later steps may have made an earlier one idle."""
        while True:
            others = map(candidate.without, candidate.options)
            idle = [other for other in others if _all_reached(goals, other)]
            if not idle:
                return candidate
            candidate = self._least(candidate, idle)

    def _treated_better(self, goals: Sequence[Goal], candidate: PlanCandidate) -> PlanCandidate:
        """Another way for a sublayer, such as a map for nothing, where that lowers the damage."""
        while True:
            own = {option.names: option for option in candidate.options}
            others = [
                candidate.plus(option)
                for option in self._with_gains(goals[0].unit)
                if option.names in own and option.replacement != own[option.names].replacement
            ]
            others = [other for other in others if _all_reached(goals, other)]
            best = self._least(candidate, [candidate, *others])
            if best is candidate:
                return candidate
            candidate = best

    def _least(self, now: PlanCandidate, others: Sequence[PlanCandidate]) -> PlanCandidate:
        """The one of least damage among others that differ from a candidate by one step."""
        damages = self._meter.measure_many(now.cut, [other.cut for other in others])[1:]
        costs = [damage.objective(self._objective) for damage in damages]
        return others[costs.index(min(costs))]

    def _with_gains(self, unit: Unit) -> list[Option]:
        """The options with their gain in a unit: the same objects whenever it is asked for."""
        for known, options in self._known:
            if known is unit:
                return options
        self._known.append((unit, with_gains(self._options, unit)))
        return self._known[-1][1]

    def _everything(self, unit: Unit, candidate: PlanCandidate) -> PlanCandidate:
        """A candidate, and all that may go beside it; one sublayer stays."""
        taken = set(candidate.choices)
        added: list[Option] = []
        for option in sorted(self._with_gains(unit), key=lambda item: -item.gain):
            if not taken & set(option.names) and len(taken) + len(option.names) <= self._most:
                added.append(option)
                taken.update(option.names)
        return candidate.plus(*added)

    def _strongest(self, unit: Unit, candidate: PlanCandidate) -> PlanCandidate:
        """The same sublayers, each treated in the way that gains most."""
        own = {o.names: unit.gain(o.names, o.replacement) for o in candidate.options}
        better = [o for o in self._with_gains(unit) if o.names in own and o.gain > own[o.names]]
        return candidate.plus(*sorted(better, key=lambda option: option.gain))

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


def _refuse_goal(goal: Goal, most: float) -> NoReturn:
    """Refuses a goal that even dropping everything that may be dropped doesn't reach."""
    raise UnmetGoalError(
        "The budget is out of reach: dropping everything that may be dropped gives "
        f"{goal.unit.words(most)}; the budget is {words_of([goal])}.",
        "Ask for less, or let more be dropped: more kinds, fewer protected, no replacements.",
        code="out-of-reach",
    )
