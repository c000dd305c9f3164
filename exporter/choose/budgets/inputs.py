"""What a planner works with: the model, its text, costs, sizes, fits and meters, each made once."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from exporter.artifacts import FiguresFrom, ImportanceReport
from exporter.artifacts.base import Nouns, nouns_of
from exporter.artifacts.servers import places_of
from exporter.artifacts.stacks import Stacks
from exporter.choose.budgets.budget import NO_FLOORS, OF_EMBEDDINGS, Budget, Floors, SearchOptions
from exporter.choose.budgets.greedy import Search
from exporter.choose.budgets.limits import QualityCheck, RememberingMeter, searched_meter
from exporter.choose.budgets.options import (
    REPLACEMENTS,
    Goal,
    Option,
    Unit,
    goals_of,
    prior_of,
    protected_names,
    refuse_another_model,
    unit_to_use_up,
)
from exporter.choose.budgets.settings import PlanSettings
from exporter.choose.budgets.target_speedup import Stopwatch
from exporter.choose.costs.table import CostTable
from exporter.choose.costs.weighing import GraphSizes, module_sizes
from exporter.compare.intervals import MOST_JUDGED, fewest_to_show, highest_to_show
from exporter.errors import (
    BackendError,
    CalibrationError,
    ComparisonError,
    CostError,
    PlanError,
    UsageError,
)
from exporter.heal.fit import Fit, fit_branches
from exporter.heal.texts import text_behind, text_beyond
from exporter.models.ablation.damage import AnyDamage
from exporter.models.loading.model_source import LoadedModel
from exporter.models.residual_stream import together_in
from exporter.models.tasks import Task, Tokens, meter_here, task_of
from exporter.models.texts.calibration import CalibrationText, specs_of, text_of_report
from exporter.models.texts.pairs import scored_pairs
from exporter.printable import are, counted
from exporter.progress import QUIET, Progress
from graph_passes.types import BLOCK_KINDS, Replacement, SublayerRef

HELD_OUT = 0.25
"""Of a text: checked or reported on, and not searched on."""
_FEWEST_IMAGES = 32


@dataclass(frozen=True)
class TextParts:
    """A text's samples by what they are for."""

    searched: CalibrationText
    checked: CalibrationText
    reported: CalibrationText

    @property
    def figures_from(self) -> FiguresFrom:
        """On what the figures rest."""
        if self.reported is self.searched:
            return "searched"
        return "checked" if self.reported is self.checked else "unseen"

    @property
    def held_out(self) -> int:
        """Samples that aren't searched on, and that checks can use."""
        return 0 if self.checked is self.searched else len(self.checked.input_ids)


def parted(text: CalibrationText, held_out: float = HELD_OUT, together: int = 1) -> TextParts:
    """The first documents to search on; of the last ones, in turn, to check and to report on.

    Of a single document it is its samples.
    """
    samples = len(text.input_ids)
    if samples < 2 * together:
        return TextParts(text, text, text)
    first, rest = text.apart_at(_held_out(samples, held_out), together)
    return TextParts(first, *rest.in_turn(together=together))


def _held_out(samples: int, held_out: float) -> int:
    """How many of two samples or more are not searched on."""
    return min(samples - 1, max(2 if samples >= 4 else 1, round(samples * held_out)))


def measured_on(text: CalibrationText, tokens: int) -> CalibrationText:
    """As much of a text as each candidate is measured on.

    Of images that are at least 32, if there are as many: each gets one class, however many
    positions it has.
    """
    if text.are_images:
        few = text.rows(slice(0, _FEWEST_IMAGES))
        tokens = max(tokens, few.ref.tokens)
    return text.first_tokens(tokens)


@dataclass(frozen=True)
class Judges:
    """The texts, pairs or images with a class that a limit is held on; none for other models."""

    fewest: int = 0
    usual: int = 0
    together: int = 1
    labels: int = 1

    @classmethod
    def of(cls, floors: Floors, model: Any) -> Judges:
        """Those of a model's limits."""
        floor = floors.top1_agreement
        labels = task_of(model).answers_a_text
        if floor is None or not labels:
            return cls()
        together = together_in(model)
        needed = together * fewest_to_show(floor)
        if needed > MOST_JUDGED * labels:
            highest = cls(together=together, labels=labels).highest(MOST_JUDGED)
            raise PlanError(
                f"--min-top1-agreement {floor:g} can't be shown: {math.ceil(needed / labels):,} "
                f"{nouns_of(type(model).__name__).several} would have to keep their answers, "
                f"{MOST_JUDGED:,} judge at most.",
                f"Give --min-top1-agreement {highest:.3f} or less.",
                code="too-few-to-show",
            )
        return cls(math.ceil(needed / labels), min(MOST_JUDGED, 2 * needed), together, labels)

    def highest(self, number: int) -> float:
        """The highest limit that so many show, to a thousandth; 0 where they show none."""
        answers = number * self.labels // self.together
        return math.floor(1000 * highest_to_show(answers)) / 1000 if answers > 0 else 0.0

    def refuse_fewer(
        self,
        number: int,
        source: str,
        read: Nouns,
        *,
        healing_text: bool = False,
    ) -> None:
        """Refuses a source of which fewer can judge."""
        left = max(0, number)
        if left >= self.fewest:
            return
        missing = counted(self.fewest - left, read.one, read.several)
        flag = "--heal-calibration" if healing_text else "--calibration"
        highest = self.highest(left)
        lower = f", or --min-top1-agreement {highest:.3f} or less" if highest > 0 else ""
        raise PlanError(
            f"Of {source} {counted(left, read.one, read.several)} {are(left)} left to judge a cut "
            f"by, beside those that choose it; the limit of --min-top1-agreement takes "
            f"{self.fewest:,}, if all of them keep their class.",
            f"Give {missing} more ({flag}), or fewer --samples{lower}.",
            code="too-few-to-show",
        )

    def parted(self, text: CalibrationText) -> tuple[CalibrationText, CalibrationText]:
        """What limits are checked on, and what is reported on: the same where it is short."""
        parts = text.in_turn(together=self.together)
        return parts if min(len(part.input_ids) for part in parts) >= self.fewest else (text, text)


DAMAGES, _CHECKS = "damages.jsonl", "checks.jsonl"
"""In a planner's folder. Each file there says what it is about."""
_SEEN_FIRST = 32
"""Of the texts or images that a limit is held on: a bad cut need not be run on all of them."""


class PlanInputs:
    """What a plan is made from. What takes long is made when it is first asked for, and kept."""

    def __init__(
        self,
        report: ImportanceReport,
        load: Callable[[], LoadedModel],
        budget: Budget,
        settings: PlanSettings,
        *,
        work: Path,  # a folder that outlives an interrupted call
        sizes: GraphSizes | None = None,  # of the graph's sublayers; None: of the model's modules
        stopwatch: Stopwatch | None = None,  # measures requests; None where no time is asked for
        costs: CostTable | None = None,  # measured before; None: the stopwatch measures them
        importance_sha256: str | None = None,
        cache_dir: Path | None = None,
        progress: Progress = QUIET,
    ) -> None:
        self.began = time.monotonic()
        self.report, self.budget, self.settings = report, budget, settings.for_budget(budget)
        self.importance_sha256, self.work, self.progress = importance_sha256, work, progress
        self.given_sizes, self.stopwatch, self._given_costs = sizes, stopwatch, costs
        self._load, self._cache_dir = load, cache_dir
        self.allow_all = self.settings.allow_all and budget.only_counts
        untimed = budget.at is not None and stopwatch is None and costs is None
        if untimed or (budget.fits is not None and self.given_sizes is None):
            raise UsageError(
                "Times of requests and sizes of caches are those of the exported graph.",
                "Name it with --onnx; for times the key costs may name a table instead.",
                code="needs-graph",
            )
        if budget.fits is not None and self.given_sizes is not None:
            self.given_sizes.total_bytes(context=budget.fits.context, batch=budget.fits.batch)
        if costs is not None and budget.at is not None and costs.at != budget.at:
            raise UsageError(
                f"The costs were measured for {costs.at}, not for {budget.at}.",
                "Ask for that request with --at, or measure again.",
                code="other-conditions",
            )

    @cached_property
    def costs(self) -> CostTable | None:
        """What sublayers cost; None where no time is asked for.

        A time that only orders sublayers may be missing: parameters are counted then.
        """
        if self._given_costs is not None or self.stopwatch is None:
            return self._given_costs
        try:
            return self.stopwatch.costs()
        except (BackendError, ComparisonError, CostError) as error:
            if self.budget.target_speedup is not None:
                raise
            self.progress.say(f"plan: parameters are counted instead of time: {error.message}")
            self.stopwatch = None
            return None

    @cached_property
    def loaded(self) -> LoadedModel:
        """The model; costs are measured before, while the memory is free."""
        _ = self.costs
        loaded = self._load()
        refuse_another_model(self.report, loaded)
        return loaded

    @property
    def stacks(self) -> Stacks:
        """The layers of the model."""
        model = self.report.model
        return Stacks.numbered(model.num_layers, model.encoder_layers)

    @cached_property
    def floors(self) -> Floors:
        """The limits that the model can be held to."""
        return self.budget.floors.of_task(self.task)

    @cached_property
    def task(self) -> Task[Any]:
        """What the model answers with."""
        return task_of(self.loaded.model)

    @cached_property
    def searching(self) -> SearchOptions:
        """How the search goes, with what it keeps small named."""
        objectives, objective = self.task.objectives, self.settings.search.objective
        search = replace(self.settings.search, objective=objective or objectives[0])
        alike = (search.objective in OF_EMBEDDINGS) == (objectives[0] in OF_EMBEDDINGS)
        if self.settings.limits_healed(self.budget) and not alike:
            raise PlanError(
                f"--objective {search.objective} and the limits on quality of this model, whose "
                f"searches keep {' or '.join(objectives)} small, don't go together.",
                "Leave --objective out, or the limits.",
                code="other-objective",
            )
        if search.objective not in (*objectives, *OF_EMBEDDINGS):
            Tokens.of(self.loaded.model)
        return search

    @property
    def embeds(self) -> bool:
        """Whether the search keeps the damage to embeddings small."""
        return self.searching.kept_small in OF_EMBEDDINGS

    @cached_property
    def sizes(self) -> GraphSizes:
        """What sublayers weigh."""
        return self.given_sizes or module_sizes(self.loaded)

    @cached_property
    def text(self) -> CalibrationText:
        """All that the scores rest on, or as much of each of other texts; paragraphs to embed."""
        return text_of_report(
            self.loaded,
            self.report.calibration,
            calibration=self.settings.calibration,
            cache_dir=self._cache_dir,
            passages=self.embeds or self.task.passages,
            progress=self.progress,
        )

    @cached_property
    def pairs(self) -> CalibrationText:
        """Of an encoder-decoder all that the scores rest on, or other pairs that are named."""
        ref = self.report.calibration
        named = self.settings.calibration or specs_of(ref)
        return scored_pairs(self.loaded, named, samples=ref.samples or None, progress=self.progress)

    @cached_property
    def texts(self) -> TextParts:
        """What is searched on, checked on, and reported on."""
        parts = parted(self.text, together=together_in(self.loaded.model))
        judges = self.judges
        if judges.fewest > len(parts.checked.input_ids):
            further = self.further_text if self.settings.weighs_replacements else None
            used = [self.text, *([] if further is None else [further])]
            rest = text_beyond(self.loaded, used, 2 * judges.usual, self._cache_dir)
            read = nouns_of(type(self.loaded.model).__name__)
            judges.refuse_fewer(len(rest.input_ids), self.text.ref.source, read)
            return TextParts(self.text, *judges.parted(rest))
        holds_limits = self.budget.floors and not self.settings.limits_healed(self.budget)
        # An interval takes two, replacements are checked on one.
        if parts.held_out < (2 if holds_limits else self.settings.weighs_replacements):
            raise CalibrationError(
                f"Of {self.text.ref.source} {counted(parts.held_out, 'sample')} would check the "
                "plan, which is too few.",
                "Score on a longer text or with more --samples, or ask for a shorter "
                "--sequence-length when scoring.",
            )
        return parts

    @cached_property
    def judges(self) -> Judges:
        """How many texts with a class hold the limits of a cut that isn't healed afterwards."""
        if not self.budget.floors or self.settings.limits_healed(self.budget):
            return Judges()
        return Judges.of(self.floors, self.loaded.model)

    @cached_property
    def further_text(self) -> CalibrationText | None:
        """As much again of the same texts, on which nothing was chosen; None if it isn't there."""
        kept, fewest = self._cache_dir, self.judges.fewest
        further = text_behind(self.loaded, self.text, kept, self.progress)
        held_out = len(parted(self.text).checked.input_ids)
        if further is not None and self.settings.weighs_replacements and fewest > held_out:
            left = text_beyond(self.loaded, (self.text, further), fewest, kept)
            if len(left.input_ids) < fewest:  # too few would be left to show the limit
                further = None
        if further is None:
            short = f"{self.text.ref.source} is too short for four parts"
            self.progress.say(f"plan: warning: {short}: what chooses serves two ends")
        return further

    @property
    def fitted_text(self) -> CalibrationText:
        """What replacements are fitted on."""
        searched = self.texts.searched  # refuses what is too short before more is read
        return self.further_text or searched

    @cached_property
    def fits(self) -> Mapping[SublayerRef, Fit]:
        """A replacement of each kind for what may go, fitted in one pass; none without healing."""
        heal = self.settings.weighed
        if heal is None:
            return {}
        names = {name for subject in self.subjects for name in subject}
        return fit_branches(
            self.loaded,
            self.fitted_text,
            names,
            intercept=heal.intercept,
            batch_size=self.settings.batch_size,
            progress=self.progress,
        )

    @property
    def subjects(self) -> Iterator[tuple[SublayerRef, ...]]:
        """The sublayers, or the two of a block, that may go."""
        budget = self.budget
        counts = (budget.attention, budget.mlp, budget.joint)
        others = (*counts, budget.parameters, budget.fits, budget.target_speedup)
        for layer in range(self.report.model.num_layers):
            if budget.block:
                yield tuple(SublayerRef(layer, kind) for kind in BLOCK_KINDS)
            if not budget.block or any(other for other in others):
                for kind in budget.kinds:
                    yield (SublayerRef(layer, kind),)

    @cached_property
    def allowed(self) -> list[Option]:
        """Every sublayer, or block where blocks are asked for, in every way allowed."""
        weighed, sizes, protected = self.settings.weighed, self.sizes.sublayers, self.protected
        known = {*sizes} if self.costs is None else {*sizes} & {*self.costs.names}

        def option(names: tuple[SublayerRef, ...], how: Replacement) -> Option:
            if how == "none":
                return Option(names, given_back=0.0)
            own = {name: self.fits[name].choices[how] for name in names}
            given = [share for share, _ in own.values()]
            stand_ins = {name: what for name, (_, what) in own.items()}
            return Option(names, 1.0, how, stand_ins, given_back=sum(given) / len(given))

        return [
            option(names, how)
            for names in self.subjects
            if {*names} <= known - protected
            for how in REPLACEMENTS[None if weighed is None else weighed.decided]
            if how != "linear" or all(sizes[name].takes_linear for name in names)
            if all(how in places_of(self.settings.server, name) for name in names)
        ]

    @cached_property
    def checker(self) -> QualityCheck:
        """Holds the tokens that the search doesn't see."""
        text, batch_size = self.texts.checked, self.settings.batch_size
        meter = searched_meter(self.loaded, text, batch_size, kept=self.work / _CHECKS)
        healed = self.settings.limits_healed(self.budget)
        first = None
        if self.judges.fewest and len(text.input_ids) > _SEEN_FIRST:
            few = text.rows(slice(0, _SEEN_FIRST))
            first = meter_here(self.loaded, few, batch_size), few.clusters
        return QualityCheck(meter, NO_FLOORS if healed else self.floors, first, text.clusters)

    @cached_property
    def reporter(self) -> QualityCheck:
        """Holds the tokens on which nothing is decided."""
        return QualityCheck(meter_here(self.loaded, self.texts.reported, self.settings.batch_size))

    def objective_meter(self) -> RememberingMeter[AnyDamage]:
        """Measures what the search keeps small."""
        return searched_meter(
            self.loaded,
            self.measured_text,
            self.settings.batch_size,
            embeds=self.embeds,
            kept=self.work / DAMAGES,
        )

    @property
    def measured_text(self) -> CalibrationText:
        """As much of what is searched on as each candidate is measured on; of pairs all."""
        if self.stacks.decoder:
            return self.pairs
        return measured_on(self.texts.searched, self.settings.search.tokens)

    @cached_property
    def search(self) -> Search:
        """Looks for candidates."""
        return Search(
            self.objective_meter(),
            self.checker,
            self.allowed,
            self.searching,
            prior_of(self.report, self.allowed),
            self.allow_all,
            self.progress,
        )

    @cached_property
    def goals(self) -> list[Goal]:
        """What has to go."""
        return goals_of(self.budget, self.sizes, self.costs)

    @cached_property
    def used_up(self) -> Unit:
        """What limits on quality are used up for."""
        return unit_to_use_up(self.budget, self.sizes, self.costs)

    @property
    def protected(self) -> frozenset[SublayerRef]:
        """Sublayers that stay; a runtime needs some, unless only whole blocks go."""
        model, server, kept = self.report.model, self.settings.server, self.settings.search.protect
        named = protected_names(kept, self.stacks)
        if server is None or set(self.budget.counts) == {"block"}:
            return named
        every = (SublayerRef(n, kind) for n in range(model.num_layers) for kind in BLOCK_KINDS)
        return named | {ref for ref in every if "none" not in places_of(server, ref)}
