"""Evolutionary refinement: swaps in a finished choice, kept where the damage falls.

A (1 + n) evolution strategy: children of the best choice so far swap some of its options for
others, the goal stays reached, and the best child takes its place when it is better. First each
option is put back or taken alone; the first children of a choice are the single swaps that then
look best. Further ones are drawn, more often with options that looked dear (to put back) or cheap
(to take).

Source: EvoPress (arXiv 2410.14649), its search over depth; here the draw is weighted by measured
damage, gains may have any unit, and all children are judged on the same samples.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from exporter.choose.selection.meters import Meter
from exporter.choose.selection.options import (
    Objective,
    Option,
    Step,
    cut_of_options,
    most_sublayers,
    objective_of,
    overlap,
    reaches,
    standing_options,
    total_gain,
)
from exporter.errors import PlanError
from exporter.models.ablation.branch_replacements import BranchReplacements
from exporter.models.ablation.damage import AnyDamage
from exporter.progress import QUIET, Progress
from graph_passes.types import SublayerRef

CHILDREN = 8
_SWAPS = (1, 2, 3)
_SWAP_ODDS = (0.65, 0.25, 0.1)
_FORESEEN = 2 * CHILDREN  # single swaps of a choice that are tried before any is drawn
_DRAWS = 200  # that find nothing new: the neighbourhood is used up

Choice = tuple[Option, ...]


def evolve(
    meter: Meter,
    steps: Sequence[Step],
    options: Sequence[Option],
    *,
    goal: float,
    objective: Objective = "kl",
    seconds: float = 600.0,
    generations: int | None = None,
    seed: int = 0,
    start: BranchReplacements | None = None,
    allow_all: bool = False,
    clock: Callable[[], float] = time.monotonic,
    progress: Progress = QUIET,
) -> list[Step]:
    """Refines a choice; what comes back is never worse than what was given.

    Args:
        meter: Measures the damage.
        steps: The choice to begin from; it reaches the goal.
        options: What may be done.
        goal: The gain that stays reached.
        objective: Which damage counts.
        seconds: No generation begins after so much time.
        generations: At most so many; None for as many as there is time for. With a number, and
            time enough, the same seed gives the same choice on any machine.
        seed: Of the draws.
        start: What is cut before, and stays so.
        allow_all: Lets every sublayer go.
        clock: Seconds of a clock.
        progress: Told of what is better.

    Returns:
        Steps to the refined choice: what stayed, in its order, then what was swapped in. The steps
        that were given when nothing is better.

    Raises:
        PlanError: The choice does not reach the goal.
        ScoringError: Logits are not finite.
    """
    begun = tuple(standing_options(steps))
    if not begun or not reaches(total_gain(begun), goal):
        raise PlanError(
            f"What is to be refined is worth {total_gain(begun):g} of {goal:g}.",
            "Begin with a choice that reaches the goal.",
            code="short-of-goal",
        )
    most = most_sublayers(meter.num_layers, allow_all)
    population = _Population(meter, begun, options, goal, objective, dict(start or {}), most, seed)
    deadline = clock() + seconds
    for number in itertools.count() if generations is None else range(generations):
        if clock() >= deadline or not population.generation(progress):
            break
        progress.detail(f"search: generation {number + 1}: {objective} {population.objective:+.4f}")
    return population.steps(progress) if population.choice != begun else list(steps)


class _Population:
    """The best choice so far, and what is known of the options."""

    def __init__(
        self,
        meter: Meter,
        begun: Choice,
        options: Sequence[Option],
        goal: float,
        objective: Objective,
        start: BranchReplacements,
        most: int,
        seed: int,
    ) -> None:
        self._meter, self._goal, self._objective, self._start = meter, goal, objective, start
        self._most = most
        self._options = [o for o in options if not set(o.names) & set(start)]
        self._random = np.random.default_rng(seed)
        self.choice = begun
        self.objective = float("inf")
        self._seen: set[frozenset[Option]] = {frozenset(begun)}
        self._price: dict[Option, float] = {}
        self._to_try = list(dict.fromkeys((*self._options, *begun)))
        self._foreseen: list[Choice] | None = None

    def generation(self, progress: Progress) -> bool:
        """One more set of children; False when there is nothing new to try."""
        if self._to_try:  # The first generations only look what each option does alone.
            self._look(progress)
            return True
        if self._foreseen is None:
            self._foreseen = self._best_swaps()[:_FORESEEN]
        children = list(itertools.islice(self._children(self._foreseen), CHILDREN))
        if not children:
            return False
        _, *damages = self._measure(children, progress)
        values = [objective_of(damage, self._objective) for damage in damages]
        best = min(range(len(children)), key=values.__getitem__)
        if values[best] < self.objective:
            self.choice, self.objective = children[best], values[best]
            self._foreseen = None
        return True

    def steps(self, progress: Progress) -> list[Step]:
        """The way to the choice, each step measured."""
        parts = [self.choice[: n + 1] for n in range(len(self.choice))]
        cuts = [cut_of_options(part, self._start) for part in parts]
        _, *damages = self._meter.measure_many(self._start, cuts, progress)
        return [
            Step(part[-1], damage, total_gain(part))
            for part, damage in zip(parts, damages, strict=True)
        ]

    def _look(self, progress: Progress) -> None:
        looked, self._to_try = self._to_try[:CHILDREN], self._to_try[CHILDREN:]
        tried = {option: self._toggled(option) for option in looked}
        tried = {option: choice for option, choice in tried.items() if self._is_sound(choice)}
        now, *then = self._measure(list(tried.values()), progress)
        self.objective = objective_of(now, self._objective)
        for (option, choice), damage in zip(tried.items(), then, strict=True):
            added = abs(total_gain(choice) - total_gain(self.choice)) or option.gain
            change = objective_of(damage, self._objective) - self.objective
            self._price[option] = (-change if option in self.choice else change) / added

    def _toggled(self, option: Option) -> Choice:
        if option in self.choice:
            return tuple(o for o in self.choice if o is not option)
        return (*(o for o in self.choice if not overlap(o, option)), option)

    def _measure(self, choices: Sequence[Choice], progress: Progress) -> Sequence[AnyDamage]:
        cuts = [cut_of_options(choice, self._start) for choice in (self.choice, *choices)]
        return self._meter.measure_many(cuts[0], cuts[1:], progress)

    def _children(self, foreseen: list[Choice]) -> Iterator[Choice]:
        while foreseen:
            child = foreseen.pop(0)
            self._seen.add(frozenset(child))
            yield child
        for _ in range(_DRAWS):
            drawn = self._child()
            if drawn is not None and frozenset(drawn) not in self._seen:
                self._seen.add(frozenset(drawn))
                yield drawn

    def _best_swaps(self) -> list[Choice]:
        """One option for another, the goal still reached, by the sum of what each did alone."""
        found: list[tuple[float, Choice]] = []
        for gone, taken in itertools.product(self.choice, self._price):
            kept = [option for option in self.choice if option is not gone]
            if taken is gone or taken in kept or not self._fits(taken, kept):
                continue
            choice = (*kept, taken)
            is_new = gone in self._price and frozenset(choice) not in self._seen
            if is_new and reaches(total_gain(choice), self._goal):
                change = self._price[taken] * taken.gain - self._price[gone] * gone.gain
                found.append((change, choice))
        return [choice for _, choice in sorted(found, key=lambda pair: pair[0])]

    def _child(self) -> Choice | None:
        """A swap; None when the goal is not reached by what could be drawn."""
        swaps = min(len(self.choice), int(self._random.choice(_SWAPS, p=_SWAP_ODDS)))
        gone = set(self._drawn(self.choice, swaps, dear=True))
        kept = [option for option in self.choice if option not in gone]
        taken: list[Option] = []
        while not reaches(total_gain([*kept, *taken]), self._goal):
            standing = [*kept, *taken]
            free = [o for o in self._options if o not in gone and self._fits(o, standing)]
            if not free:
                return None
            taken += self._drawn(free, 1, dear=False)
        return self._without_spare([*kept, *taken])

    def _drawn(self, options: Sequence[Option], number: int, *, dear: bool) -> list[Option]:
        """Draws without repeat; the odds fall with the rank, the dearest or the cheapest first."""
        unknown = float("inf")
        order = sorted(options, key=lambda o: self._price.get(o, unknown), reverse=dear)
        odds = 1.0 / np.arange(1, len(order) + 1)
        drawn = self._random.choice(len(order), size=number, replace=False, p=odds / odds.sum())
        return [order[index] for index in drawn]

    def _fits(self, option: Option, standing: Sequence[Option]) -> bool:
        if any(overlap(option, other) for other in standing):
            return False
        return self._is_sound([*standing, option])

    def _is_sound(self, choice: Sequence[Option]) -> bool:
        return len(self._names(choice)) <= self._most

    def _names(self, choice: Sequence[Option]) -> set[SublayerRef]:
        return set(cut_of_options(choice, self._start))

    def _without_spare(self, choice: list[Option]) -> Choice:
        """Without options that the goal does not need, the dearest first."""
        for option in sorted(choice, key=lambda o: -self._price.get(o, 0.0)):
            rest = [other for other in choice if other is not option]
            if rest and reaches(total_gain(rest), self._goal):
                choice = rest
        return tuple(choice)
