"""From what a user asks for to a plan: costs, fits, search, refit, and a look at the clock."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.artifacts import ImportanceReport, ParetoCurve, PruningPlan, Speedup
from exporter.artifacts.plans.origin import parents_of
from exporter.choose.budgets.budget import Budget
from exporter.choose.budgets.curve import ENOUGH_NATS, curve_of
from exporter.choose.budgets.gains import Goal, Milliseconds
from exporter.choose.budgets.goals import goals_of, unit_to_use_up
from exporter.choose.budgets.healed import elsewhere, healing_of
from exporter.choose.budgets.hit import TOLERANCE, Measured, hit
from exporter.choose.budgets.meters import meter_of, searched_meter
from exporter.choose.budgets.options import Offer, make_offer, replacements_of
from exporter.choose.budgets.outcome import Outcome, predicted
from exporter.choose.budgets.reachable import refuse_no_front, refuse_nothing
from exporter.choose.budgets.search import Search, SearchSettings
from exporter.choose.budgets.settings import PlanSettings
from exporter.choose.budgets.stopwatch import Stopwatch
from exporter.choose.budgets.text import TextParts, parted
from exporter.choose.budgets.walk import Judge, Walk, percent
from exporter.choose.budgets.workplace import Workplace
from exporter.choose.costs import CostTable, GraphSizes
from exporter.choose.selection import protected_names
from exporter.errors import PlanError, UsageError
from exporter.heal.kept import about_fits
from exporter.models.ablation import BranchReplacement
from exporter.progress import QUIET, Progress
from graph_passes.types import Replacement, SublayerRef

if TYPE_CHECKING:
    from exporter.heal import Fit
    from exporter.models.loading.model_source import LoadedModel


class Planner:
    """Makes plans for one model.

    What takes long is done once, and kept in the workplace where a later call can use it.

    Args:
        report: The model's scores.
        load: Loads the model.
        budget: What the plan has to hold.
        settings: How to look for it.
        work: Keeps fits, costs and damages.
        sizes: Of the graph's sublayers; None: of the model's modules.
        stopwatch: Measures requests; None where no time is asked for.
        costs: Measured before; None: the stopwatch measures them.
        importance_sha256: The digest of the report's file, for the plan.
        cache_dir: Where text that the model sampled is kept.
        progress: Told what goes on.

    Raises:
        UsageError: The budget asks for what can't be told without a graph.
        CostError: The graph can't hold so many tokens.
    """

    def __init__(
        self,
        report: ImportanceReport,
        load: Callable[[], LoadedModel],
        budget: Budget,
        settings: PlanSettings,
        *,
        work: Workplace,
        sizes: GraphSizes | None = None,
        stopwatch: Stopwatch | None = None,
        costs: CostTable | None = None,
        importance_sha256: str | None = None,
        cache_dir: Path | None = None,
        progress: Progress = QUIET,
    ) -> None:
        self.report, self.budget, self.settings = report, budget, settings
        self._load, self._work, self._given_sizes = load, work, sizes
        self._stopwatch, self._given_costs = stopwatch, costs
        self._importance_sha256, self._cache_dir = importance_sha256, cache_dir
        self._progress = progress
        _refuse_missing(budget, sizes, stopwatch, costs)

    def plan(self) -> Outcome:
        """The plan of least damage that holds the budget.

        Raises:
            PlanError: There is none; says what is reachable.
            UsageError: The budget asks for nothing.
            DepthcutError: Of the stage that failed.
        """
        self.budget.refuse_empty()
        if self._given_sizes is not None:
            _ = self.goals  # what fits as it is needs no model
        walk, speedup = self._measured() if self._times_candidates else (self._solved(), None)
        self._refuse_nothing(walk)
        if speedup is None and self._stopwatch is not None:
            speedup = self._time(walk)
        branch_replacements = self._refitted(walk)
        return self._outcome(walk, branch_replacements, speedup)

    def curve(self) -> ParetoCurve:
        """The whole front, up to plans that leave next to nothing of the model's answers.

        Raises:
            PlanError: There is no such plan.
        """
        self.texts.refuse_short("a curve")
        unit = unit_to_use_up(self.budget, self.sizes, self.costs, self.settings.rank)
        with self._progress.task("look for the front"):
            walks = self.search.path(unit, ENOUGH_NATS)
        if not walks:
            refuse_no_front(self.judge, self.search.smallest(unit))
        return curve_of(
            walks,
            self.reporter,
            self.sizes,
            self.costs,
            self.settings.rank,
            report=self.report,
            text=self.texts.reported,
        )

    @cached_property
    def costs(self) -> CostTable | None:
        """What sublayers cost; None where no time is asked for."""
        if self._given_costs is not None or self._stopwatch is None:
            return self._given_costs
        return self._stopwatch.costs(replacements_of(self.settings.heal), self.settings.rank)

    @cached_property
    def loaded(self) -> LoadedModel:
        """The model; costs are measured before, while the memory is free."""
        _ = self.costs
        loaded = self._load()
        if loaded.ref.sha256 != self.report.model.sha256:
            raise PlanError(
                f"The scores are of {self.report.model.source} (sha256 "
                f"{self.report.model.sha256[:12]}), but {loaded.ref.source} is another model "
                f"(sha256 {loaded.ref.sha256[:12]}).",
                "Name the model that was scored, or score this one first: depthcut score.",
            )
        return loaded

    @cached_property
    def sizes(self) -> GraphSizes:
        """What sublayers weigh."""
        from exporter.choose.budgets.module_sizes import module_sizes

        return self._given_sizes or module_sizes(self.loaded)

    @cached_property
    def texts(self) -> TextParts:
        """What is searched and fitted on, checked on, and reported on.

        Raises:
            CalibrationError: Too little is held out for what is asked.
        """
        from exporter.models.texts.calibration import text_of_report

        text = text_of_report(
            self.loaded,
            self.report.calibration,
            calibration=self.settings.calibration,
            cache_dir=self._cache_dir,
            progress=self._progress,
        )
        parts = parted(text, self.settings.held_out)
        if self.budget.floors:
            parts.refuse_short("an interval, by which floors are held", 2)
        elif self.settings.heal != "none":
            parts.refuse_short("replacements")
        return parts

    @cached_property
    def fits(self) -> Mapping[SublayerRef, Fit]:
        """A replacement of each kind for every branch, fitted in one pass; none without healing."""
        from exporter.heal import fit_branches

        if self.settings.heal == "none":
            return {}
        text, rank = self.texts.searched, self.settings.rank
        about = about_fits(self.loaded.ref, str(self.loaded.model.dtype), text.ref, rank)
        known = self._work.kept_fits(about)
        if known is not None:
            self._progress.say("plan: the fits of an earlier call are used")
            return known
        batch_size = self.settings.batch_size
        found = fit_branches(
            self.loaded, text, rank=rank, batch_size=batch_size, progress=self._progress
        )
        self._work.keep_fits(about, found)
        return found

    @cached_property
    def offer(self) -> Offer:
        """What may be done to which sublayer."""
        protected = protected_names(self.settings.search.protect, self.report.model.num_layers)
        known = set(self.sizes.sublayers)
        if self.costs is not None:
            known &= set(self.costs.names)
        return make_offer(
            self.report,
            self.budget,
            self.settings.heal,
            self.fits,
            protected,
            known,
            {name for name, size in self.sizes.sublayers.items() if not size.takes_linear},
        )

    @cached_property
    def judge(self) -> Judge:
        """Holds the tokens that the search doesn't see."""
        meter = meter_of(self.loaded, self.texts.checked, self.settings)
        return Judge(meter, self.budget.floors)

    @cached_property
    def reporter(self) -> Judge:
        """Holds the tokens on which nothing is decided."""
        return Judge(meter_of(self.loaded, self.texts.reported, self.settings))

    @cached_property
    def search(self) -> Search:
        """Looks for walks."""
        how = self.settings.search
        return Search(
            searched_meter(self.loaded, self.texts.searched, self.settings, self._work.journal),
            self.judge,
            self.offer.options,
            SearchSettings(
                objective=how.objective,
                shortlist=how.shortlist or None,
                seconds=how.seconds if how.search == "evolution" else 0.0,
                seed=how.seed,
            ),
            self.offer.prior,
            self.offer.quality,
            self._progress,
        )

    @cached_property
    def goals(self) -> list[Goal]:
        """What has to go."""
        return goals_of(self.budget, self.sizes, self.costs, self.settings.rank)

    def _solved(self, goals: Sequence[Goal] | None = None) -> Walk:
        unit = unit_to_use_up(self.budget, self.sizes, self.costs, self.settings.rank)
        with self._progress.task("look for the plan of least damage"):
            return self.search.solve(self.goals if goals is None else goals, unit)

    @property
    def _times_candidates(self) -> bool:
        return self._stopwatch is not None and self.budget.target_speedup is not None

    def _measured(self) -> tuple[Walk, Speedup]:
        """Candidates are cut and measured until one is near the target speedup."""
        first, *others = self.goals
        assert isinstance(first.unit, Milliseconds)
        assert self.budget.target_speedup is not None
        found: Measured = hit(
            self.budget.target_speedup,
            first.amount,
            lambda goal_ms: self._solved([replace(first, amount=goal_ms), *others]),
            self._time,
            rounds=self.settings.rounds,
            progress=self._progress,
        )
        self._warn(found, self.budget.target_speedup)
        return found.walk, found.speedup

    def _warn(self, found: Measured, target: float) -> None:
        """Tells of a target that was missed, or not shown to be hit."""
        low, high = found.speedup.ci95
        if found.miss(target) > TOLERANCE:
            self._progress.say(
                f"plan: warning: no candidate came within {TOLERANCE:.0%} of a speedup of "
                f"{target:g}; the one that is taken measures {found.speedup.ratio:.3f}"
            )
        elif not found.is_shown(target):
            self._progress.say(
                f"plan: warning: a speedup within {TOLERANCE:.0%} of {target:g} is not shown: the "
                f"interval reaches from {low:.3f} to {high:.3f}; a quieter machine or a larger "
                "--time-budget tells more"
            )

    def _time(self, walk: Walk) -> Speedup:
        assert self._stopwatch is not None
        return self._stopwatch.speedup(walk)

    def _refuse_nothing(self, walk: Walk) -> None:
        if not walk.options:
            unit = unit_to_use_up(self.budget, self.sizes, self.costs, self.settings.rank)
            refuse_nothing(self.judge, self.search.smallest(unit))

    def _refitted(self, walk: Walk) -> Mapping[SublayerRef, BranchReplacement]:
        """The walk's replacements, fitted again on the healed model where that is better."""
        from exporter.heal import fit_sequential

        choices: dict[SublayerRef, Replacement] = walk.choices
        if all(replacement == "none" for replacement in choices.values()):
            return walk.cut
        again = fit_sequential(
            self.loaded,
            self.texts.searched,
            choices,
            rank=self.settings.rank,
            batch_size=self.settings.batch_size,
            progress=self._progress,
        )
        before, after = self.judge.damage(walk), self.judge.damage_of(again)
        rises = before.log_perplexity_increase, after.log_perplexity_increase
        better = rises[1] < rises[0] and not self.judge.broken_by(after)
        self._progress.detail(
            f"plan: fitted one after the other, the perplexity rises by {percent(rises[1])}, not "
            f"by {percent(rises[0])}{'' if better else '; not taken'}"
        )
        return again if better else walk.cut

    def _outcome(
        self,
        walk: Walk,
        branch_replacements: Mapping[SublayerRef, BranchReplacement],
        speedup: Speedup | None,
    ) -> Outcome:
        damage = self.reporter.damage_of(branch_replacements)
        figures = predicted(
            self.budget,
            walk,
            damage,
            self.sizes,
            self.costs,
            self.settings.rank,
            speedup,
        )
        healing = healing_of(
            self.loaded,
            self.texts.searched,
            self.texts.reported,
            branch_replacements,
            self.settings.heal,
            self.settings.rank,
            batch_size=self.settings.batch_size,
            check_text=self.settings.check_text,
            progress=self._progress,
        )
        figures |= elsewhere(healing)
        asked = {**self.budget.asked(), **self.settings.told()}
        digest = self._importance_sha256
        plan = PruningPlan(
            deletions=walk.deletions,
            budget=asked,
            importance_sha256=digest,
            made_from=parents_of(self.report, digest),
            predicted=figures,
            predicted_on=self.texts.figures_from,
        )
        return Outcome(plan, branch_replacements, damage, speedup, healing)


def _refuse_missing(
    budget: Budget,
    sizes: GraphSizes | None,
    stopwatch: Stopwatch | None,
    costs: CostTable | None,
) -> None:
    if budget.at is not None and stopwatch is None and costs is None:
        raise UsageError(
            "Times are measured on the exported graph.",
            "Name it with --onnx, or costs that were measured before with --costs.",
        )
    if budget.fits is not None and sizes is None:
        raise UsageError(
            "How much the caches take is read from the exported graph.", "Name it with --onnx."
        )
    if budget.fits is not None and sizes is not None:
        sizes.total_bytes(context=budget.fits.context, batch=budget.fits.batch)
    if costs is not None and budget.at is not None and costs.at != budget.at:
        raise UsageError(
            f"The costs were measured for {costs.at}, not for {budget.at}.",
            "Ask for that request with --at, or measure again.",
        )
