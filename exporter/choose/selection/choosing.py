"""From an importance report, numbers and a way of searching to a plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.artifacts import ImportanceReport, PruningPlan, Score
from exporter.artifacts.plans.by_score import (
    check_counts,
    plan_drop,
    refuse_unscored_blocks,
    validate_plan,
)
from exporter.artifacts.plans.origin import parents_of
from exporter.choose.selection.evolution import evolve
from exporter.choose.selection.greedy import greedy
from exporter.choose.selection.iterative import iterative
from exporter.choose.selection.meters import MakeMeter, Meter, RememberingMeter
from exporter.choose.selection.options import (
    Group,
    Option,
    Step,
    Stop,
    chosen,
    cut_of_options,
    options_for,
)
from exporter.choose.selection.protection import protected_names
from exporter.choose.selection.refusals import (
    groups_of,
    refuse_another_model,
    refuse_number,
    refuse_too_many,
    refuse_unreachable,
)
from exporter.choose.selection.search_options import SearchOptions
from exporter.errors import UsageError
from exporter.progress import QUIET, Progress, Task
from graph_passes.types import BLOCK_KINDS, SublayerRef

if TYPE_CHECKING:
    from exporter.models.ablation import BranchReplacements, Damage
    from exporter.models.loading.model_source import LoadedModel
    from exporter.score import CalibrationText

POSITIONS = 2
"""A search compares answers at every second position: the head costs a third of a small model."""


def choose(
    report: ImportanceReport,
    counts: Mapping[str, int],
    options: SearchOptions | None = None,
    *,
    load: Callable[[], LoadedModel] | None = None,
    calibration: str | None = None,
    batch_size: int = 4,
    cache_dir: Path | None = None,
    journal: Path | None = None,
    make_meter: MakeMeter | None = None,
    importance_sha256: str | None = None,
    allow_all: bool = False,
    progress: Progress = QUIET,
) -> PruningPlan:
    """Chooses what to drop.

    Kinds are chosen one after the other, each on the model without what was chosen before.

    Args:
        report: The scores: they decide (one-shot), come first (iterative), or make the shortlist.
        counts: How many of ``attention``, ``mlp``, ``block`` and ``joint``, as
            :func:`exporter.artifacts.plans.by_score.plan_drop` takes them.
        options: How to search.
        load: Loads the model that the report is about; called only by searches that run it.
        calibration: Another text to measure on than the report's.
        batch_size: Samples in one forward pass.
        cache_dir: Where text that the model sampled is kept.
        journal: A file that keeps what greedy and evolution have measured, so that an interrupted
            search goes on; the caller removes it once the plan is kept.
        make_meter: Makes what measures greedy's and evolution's candidates, such as one that has
            workers elsewhere; None: in this process.
        importance_sha256: The digest of the report's file, for the plan.
        allow_all: Lets every attention and every MLP go.
        progress: Told every step.

    Raises:
        PlanError: When more is asked for than may go, or the scores are another model's.
        UsageError: When the protection can't be read, or there is no model to run.
        CalibrationError: When the report's text is no longer the same.
        ScoringError: When activations or logits are not finite, or the model predicts no tokens.
    """
    options = options or SearchOptions()
    check_counts(counts)
    protected = protected_names(options.protect, report.model.num_layers)
    if not options.runs_the_model:
        plan = _one_shot(report, counts, protected, importance_sha256, allow_all, progress)
        return _telling_how(plan, options) if protected else plan
    if load is None:
        raise UsageError(f"A search that is {options.search} runs the model.", "Name the model.")
    refuse_unreachable(report, counts, protected, allow_all=allow_all)
    searcher = _Searcher(
        report,
        options,
        load(),
        calibration=calibration,
        batch_size=batch_size,
        cache_dir=cache_dir,
        journal=journal,
        make_meter=make_meter,
        allow_all=allow_all,
    )
    plan, damage = searcher.plan(counts, protected, importance_sha256, progress)
    layers, model = report.model.num_layers, report.model.source
    validate_plan(plan, layers, model=model, allow_all=allow_all)
    return plan if damage is None else plan.model_copy(update={"predicted": _predicted(damage)})


def _one_shot(
    report: ImportanceReport,
    counts: Mapping[str, int],
    protected: frozenset[SublayerRef],
    importance_sha256: str | None,
    allow_all: bool,
    progress: Progress,
) -> PruningPlan:
    refuse_unscored_blocks(report, counts.get("block", 0))
    left = _without(report, protected)
    refuse_too_many(left, counts, protected)
    return plan_drop(
        left,
        **counts,
        importance_sha256=importance_sha256,
        allow_all=allow_all,
        progress=progress,
    )


def _without(report: ImportanceReport, protected: frozenset[SublayerRef]) -> ImportanceReport:
    """Without the scores of what must stay; a block stays when a sublayer of it does."""
    layers = {layer for layer, _ in protected}

    def may_go(score: Score) -> bool:
        if score.kind == "block":
            return score.layer not in layers
        return (score.layer, score.kind) not in protected

    return report.model_copy(update={"scores": [s for s in report.scores if may_go(s)]})


class _Searcher:
    """The model, its text and its meter, for one search."""

    def __init__(
        self,
        report: ImportanceReport,
        options: SearchOptions,
        loaded: LoadedModel,
        *,
        calibration: str | None,
        batch_size: int,
        cache_dir: Path | None,
        journal: Path | None,
        make_meter: MakeMeter | None,
        allow_all: bool,
    ) -> None:
        refuse_another_model(report, loaded)
        self._report, self._options, self._loaded = report, options, loaded
        self._calibration, self._cache_dir = calibration, cache_dir
        self._batch_size, self._allow_all = batch_size, allow_all
        self._make_meter = make_meter or _meter_here
        self._journal = journal if options.by_damage else None

    def plan(
        self,
        counts: Mapping[str, int],
        protected: frozenset[SublayerRef],
        importance_sha256: str | None,
        progress: Progress,
    ) -> tuple[PruningPlan, Damage | None]:
        """The plan, and what it does to the model where that can be told."""
        from exporter.models.texts.calibration import text_of_report

        text = text_of_report(
            self._loaded,
            self._report.calibration,
            calibration=self._calibration,
            cache_dir=self._cache_dir,
            progress=progress,
        )
        meter = self._meter(text) if self._can_measure else None
        taken: list[Option] = []
        for group, number in groups_of(counts):
            found = options_for(group, self._report.model.num_layers, protected)
            taken += self._chosen(group, found, number, taken, text, meter, progress)
        cut = cut_of_options(taken)
        damage = None if meter is None else meter.measure_many(cut, [], progress)[0]
        plan = PruningPlan(
            deletions=[deletion for option in taken for deletion in option.deletions()],
            importance_sha256=importance_sha256,
            budget={name: count for name, count in counts.items() if count},
            made_from=parents_of(self._report, importance_sha256),
        )
        return _telling_how(plan, self._options), damage

    @property
    def _can_measure(self) -> bool:
        model: Any = self._loaded.model
        generates = model.can_generate() and model.get_output_embeddings() is not None
        return bool(generates or self._options.by_damage)  # Else the meter says what is wrong.

    def _chosen(
        self,
        group: Group,
        options: list[Option],
        number: int,
        before: list[Option],
        text: CalibrationText,
        meter: RememberingMeter | None,
        progress: Progress,
    ) -> list[Option]:
        """One kind's, on the model without what was chosen before."""
        start = cut_of_options(before)
        options = [o for o in options if not set(o.names) & set(start)]
        if number > len(options):
            refuse_number(group, number, len(options), self._report.model.source)
        if meter is not None and self._options.by_damage:
            return self._by_damage(options, number, start, meter, progress)
        with progress.task("iterative search"):
            return iterative(
                partial(self._rescored, text=text, blocks=group == "block", progress=progress),
                options,
                goal=number,
                num_layers=self._report.model.num_layers,
                every=self._options.every,
                start=start,
                allow_all=self._allow_all,
                progress=progress,
            )

    def _by_damage(
        self,
        options: list[Option],
        number: int,
        start: BranchReplacements,
        meter: RememberingMeter,
        progress: Progress,
    ) -> list[Option]:
        how = self._options
        with progress.task("greedy search", total=number) as task:
            steps = greedy(
                meter,
                options,
                goal=number,
                objective=how.objective,
                shortlist=how.shortlist or None,
                prior=_prior(self._report.scores),
                stop=_counted_on(task),
                start=start,
                allow_all=self._allow_all,
                progress=progress,
            )
        if how.search == "evolution":
            with progress.task("evolution search"):
                steps = evolve(
                    meter,
                    steps,
                    options,
                    goal=number,
                    objective=how.objective,
                    seconds=how.seconds,
                    seed=how.seed,
                    start=start,
                    allow_all=self._allow_all,
                    progress=progress,
                )
        return chosen(steps)

    def _rescored(
        self, cut: BranchReplacements, *, text: CalibrationText, blocks: bool, progress: Progress
    ) -> list[Score]:
        from exporter.models.ablation import branches_replaced
        from exporter.score import score_on

        with branches_replaced(self._loaded.model, cut):
            report = score_on(
                self._loaded,
                text,
                metrics=(self._report.metric,),
                batch_size=self._batch_size,
                blocks=blocks,
                progress=progress,
            )
        return report.scores

    def _meter(self, text: CalibrationText) -> RememberingMeter:
        from exporter.files import sha256_bytes

        searched = text.first_tokens(self._options.tokens)
        meter = self._make_meter(self._loaded, searched, self._batch_size, POSITIONS)
        about = {
            "model": self._loaded.ref.sha256,
            "dtype": str(self._loaded.model.dtype),
            "ids": sha256_bytes(searched.input_ids.astype("<i8").tobytes()),
            "positions": POSITIONS,
        }
        return RememberingMeter(meter, self._journal, about)


def _meter_here(
    loaded: LoadedModel, text: CalibrationText, batch_size: int, positions: int
) -> Meter:
    from exporter.models.ablation import DamageMeter

    return DamageMeter(
        loaded.model, text.input_ids, text.mask, batch_size=batch_size, positions=positions
    )


def _counted_on(task: Task) -> Stop:
    """Ends nothing; marks each step as done."""

    def step_done(_: Step) -> bool:
        task.advance()
        return False

    return step_done


def _prior(scores: list[Score]) -> dict[SublayerRef, float]:
    return {SublayerRef(s.layer, s.kind): s.score for s in scores if s.kind in BLOCK_KINDS}


def _telling_how(plan: PruningPlan, options: SearchOptions) -> PruningPlan:
    """The plan with the search beside the numbers that were asked for."""
    told: dict[str, int | float | str] = {**plan.budget, "search": options.search}
    if options.by_damage:
        told["objective"] = options.objective
    if options.protect:
        told["protect"] = ", ".join(options.protect)
    return plan.model_copy(update={"budget": told})


def _predicted(damage: Damage) -> dict[str, float]:
    """On the text of the search, so rather too good."""
    names = ("kl", "log_perplexity_increase", "top1_agreement")
    return {name: float(getattr(damage, name)) for name in names}
