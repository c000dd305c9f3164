"""How many sublayers may be dropped: what cuts cost on held-out text, bare and healed, and gain."""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass as plain_dataclass
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import TypeAdapter

from exporter.artifacts import (
    CalibrationRef,
    DepthCell,
    DepthDamage,
    DepthsReport,
    ImportanceReport,
    TaskResult,
    Way,
)
from exporter.artifacts.plan_figures import Increase
from exporter.artifacts.plans import plan_cut
from exporter.artifacts.store import Store
from exporter.choose.budgets.budget import DROPPING
from exporter.choose.budgets.limits import LEAST_SHARE
from exporter.choose.budgets.meters import RememberingMeter
from exporter.choose.budgets.options import refuse_another_model
from exporter.choose.costs.measuring import CostSettings, measure_on
from exporter.choose.costs.request_shape import RequestShape, RequestShapeOption
from exporter.choose.costs.table import CostTable
from exporter.choose.costs.timing import Effort
from exporter.choose.costs.weighing import module_sizes
from exporter.compare.intervals import mean_interval
from exporter.compare.options import ACCURACY, SPEED, TaskOptions
from exporter.compare.tasks.choosing import local_tasks, score_tasks
from exporter.compare.tasks.items import TaskScores, compare_scores
from exporter.compare.tasks.likelihood import saved_folder
from exporter.errors import (
    BackendError,
    CalibrationError,
    CostError,
    HealingError,
    PlanError,
)
from exporter.files import scratch_folder
from exporter.heal.fit import Fitting
from exporter.heal.folded import folded_values
from exporter.heal.options import HealOptions
from exporter.heal.texts import HealingTexts
from exporter.models.ablation.branch_replacements import (
    BranchReplacements,
    branches_replaced,
    without_branches,
)
from exporter.models.ablation.damage import Damage
from exporter.models.ablation.meter import CutMeter
from exporter.models.changed_weights import swapped
from exporter.models.loading.model_source import LoadedModel
from exporter.models.model_folder import ModelFolder
from exporter.models.tasks import Tokens
from exporter.models.texts.calibration import CalibrationText, calibration_text, text_of_report
from exporter.models.texts.sources import refuse_same_text
from exporter.option_types import Count, InputFile, Lengths, Several, Written, comma_list
from exporter.options import Options, Rule, dataclass, excludes, option, part
from exporter.printable import counted
from exporter.progress import QUIET, Progress
from graph_passes.types import SublayerRef

Place = tuple[Way, int]
WAYS: tuple[Way, ...] = ("attention", "mlp", "block", "joint")
QUICK_NUMBERS: dict[Way, tuple[int, ...]] = {"attention": (1, 2, 4, 8), "block": (2,)}
"""What is tried where no numbers are asked for."""
_Ways = Annotated[tuple[Way, ...], comma_list, Written("WAY,WAY", listed=True)]


@dataclass(frozen=True)
class DepthOptions(Options):
    """What is dropped, and what it is judged on."""

    section = ACCURACY
    numbers: Lengths | None = option(
        None,
        "Numbers of sublayers to drop, in all ways.",
        "-n",
        "--numbers",
        usual="1, 2, 4 and 8 attentions and 2 blocks",
        section=DROPPING,
    )
    ways: _Ways = option(
        WAYS,
        "What is dropped: attention, mlp, block, or joint: attentions and MLPs ranked together.",
        section=DROPPING,
    )
    text: str = option(
        "pydoc",
        "Held-out text: a text or JSONL file, hf:DATASET or pydoc.",
        "--eval-text",
        metavar="SOURCE",
    )
    tokens: Several = option(
        8192,
        "Tokens for perplexity and KL divergence. One half of them chooses, and the other is "
        "reported on.",
        "--eval-tokens",
    )
    most_increase: Increase = option(
        0.02,
        "How much the perplexity on held-out text may rise, by the upper end of its 95 % interval.",
        "--at-most",
        usual="2%",
    )
    at: RequestShapeOption = option(
        RequestShape(new=64), "The request whose speed is foretold.", section=SPEED
    )
    costs: InputFile | None = option(
        None,
        "Costs of the exported graph's sublayers, of depthcut costs.",
        metavar="FILE",
        usual="measured in PyTorch",
        section=SPEED,
        config_only=True,
    )
    sequence_length: Several = option(
        512, "Tokens in a sample of the held-out text.", "--eval-sequence-length", config_only=True
    )
    batch_size: Count = option(4, "Samples in one forward pass.", config_only=True)
    tasks: TaskOptions = part(TaskOptions())
    rules = (
        Rule(("numbers",), lambda told: told.numbers == (), "{0} names none.", "Such as 4,8,12."),
        excludes("costs", "at", "costs are those of one request"),
    )

    def asked(self, num_layers: int) -> list[Place]:
        """The cells, way by way; of those that nobody asked for, what the model has."""
        if self.numbers is not None:
            return [(way, n) for way in self.ways for n in sorted(set(self.numbers))]
        own = dict.fromkeys(self.ways, QUICK_NUMBERS["attention"])
        quick = QUICK_NUMBERS if self.ways == WAYS else own
        return [(way, n) for way, numbers in quick.items() for n in numbers if n < num_layers]


_TIMED_S = 8.0
_FITTED_TOKENS = 2048
_LEAST_SPEEDUP = 1.01
"""A cut that gains less isn't worth its loss."""
_TOO_FAR = "cuts that lose so much that no healing is expected to bring them within the limit."
_MOST_LOG = 700.0
_DAMAGE = TypeAdapter(DepthDamage)


def measure_depths(
    loaded: LoadedModel,
    report: ImportanceReport,
    options: DepthOptions,
    *,
    importance_sha256: str,
    kept: Path | None = None,  # None keeps nothing
    progress: Progress = QUIET,
) -> DepthsReport:
    """Measures every way of dropping at every number, and recommends one.

    A number that the model doesn't have, or a way whose scores are missing, is a cell that says
    so; the others are measured all the same.

    Args:
        loaded: The whole model.
        report: Its scores, which say what each way drops.
        options: Numbers and ways, the text, the limit, the request that is timed.
        importance_sha256: Of the scores' file, for the record.
        kept: Where finished measurements are kept for a second run; None keeps nothing.
        progress: Hears of each cut.

    Raises:
        ScoringError: The model predicts no next tokens.
        PlanError: The scores are of another model.
        TextSourceError: The text can't be read.
    """
    Tokens.of(loaded.model)
    refuse_another_model(report, loaded)
    local_tasks(options.tasks)  # what can't be read is told before hours of measuring
    table = None if options.costs is None else CostTable.read(options.costs)
    text, reported = _held_out(loaded, report.calibration, options, progress)
    cells = {place: _plan(report, *place) for place in options.asked(report.model.num_layers)}
    cuts = {
        place: without_branches(cell.deletions, loaded.model)
        for place, cell in cells.items()
        if not cell.refused
    }
    study = _Study(loaded, text, max(1, 2 * len(cuts)), options.batch_size, kept, progress)
    whole, bare = study.bare(cuts)
    most = 1 + options.most_increase
    hopeless = {p for p, d in bare.items() if d.perplexity_ratio**LEAST_SHARE > most}
    fitted = study.fitted_text(report.calibration)
    healed = study.healed({p: cut for p, cut in cuts.items() if p not in hopeless}, fitted)
    healed |= {place: {"not_healed": _TOO_FAR} for place in hopeless}
    table = table or study.costs(options.at, {name for cut in cuts.values() for name in cut})
    scored = compared_tasks(
        loaded, options.tasks, cuts, kept=study.place("tasks.jsonl"), progress=progress
    )
    sizes = module_sizes(loaded)
    for place, cut in cuts.items():
        gone = sum(sizes.sublayers[ref].parameters for ref in cut)
        more = {
            "damage": bare[place],
            "parameters_removed": gone / sizes.parameters,
            "speedup": None if table is None else table.speedup(dict.fromkeys(cut, "none")),
            "tasks": scored.get(place, []),
        }
        cells[place] = cells[place].model_copy(update={**more, **healed[place]})
    result = DepthsReport(
        model=report.model,
        metric=report.metric,
        calibration=report.calibration,
        text=text.ref,
        baseline_perplexity=whole.baseline_perplexity,
        cells=[*cells.values()],
        fitted_on=None if isinstance(fitted, str) else fitted.ref,
        most_increase=options.most_increase,
        looks=study.looks,
        request="" if table is None else str(table.at),
        backend="" if table is None else table.backend,
        threads=None if table is None else table.environment.threads,
        made_from={
            "model": report.model.sha256,
            "importance": importance_sha256,
            "text": text.ref.sha256,
        },
    )
    best = recommended(result.cells, options.most_increase)
    if best is None:
        return result
    update: dict[str, object] = {"way": best.way, "number": best.number}
    if reported is not None:
        progress.say("depths: the recommended cut, on text that has chosen nothing")
        unseen, cut = replace(study, text=reported, looks=1), cuts[best.way, best.number]
        is_bare = best.least is best.damage
        damage = unseen.damage_of(cut) if is_bare else unseen.folded(cut, fitted)
        update |= {"reported_text": reported.ref, "reported": damage}
    return result.model_copy(update=update)


def _held_out(
    loaded: LoadedModel, used: CalibrationRef, options: DepthOptions, progress: Progress
) -> tuple[CalibrationText, CalibrationText | None]:
    """What cuts are measured on; the other half is for a report of the one that is recommended."""
    text = calibration_text(
        loaded,
        options.text,
        samples=math.ceil(options.tokens / options.sequence_length),
        sequence_length=options.sequence_length,
        part="evaluation",
        progress=progress,
    )
    what = "the text of the scores: what is dropped was chosen to do well on it"
    refuse_same_text(text.ref, used.texts, what, error=CalibrationError)
    return text.in_turn() if len(text.input_ids) > 1 else (text, None)


def _plan(report: ImportanceReport, way: Way, number: int) -> DepthCell:
    counts: Any = {way: number}
    try:
        plan = plan_cut(report, **counts)
    except PlanError as error:
        return DepthCell(way=way, number=number, refused=error.message)
    return DepthCell(way=way, number=number, deletions=plan.deletions)


@plain_dataclass
class _Study:
    """Cuts of a model on one text."""

    loaded: LoadedModel
    text: CalibrationText
    looks: int  # how many figures one cut is chosen by
    batch_size: int
    kept: Path | None  # None keeps nothing
    progress: Progress

    def __post_init__(self) -> None:
        task, text = Tokens(self.loaded.model), self.text
        self._meter: CutMeter[Damage] = task.meter(
            text.input_ids, text.mask, batch_size=self.batch_size
        )

    def place(self, name: str) -> Path | None:
        """A file that is kept."""
        return None if self.kept is None else self.kept / name

    def bare(
        self, cuts: Mapping[Place, BranchReplacements]
    ) -> tuple[Damage, dict[Place, DepthDamage]]:
        """One damage that knows the whole model's losses, and every cut's."""
        about = {**self.loaded.identity(), "text": self.text.ref.model_dump(), "by": "depths"}
        meter = RememberingMeter(self._meter, self.place("damages.jsonl"), about)
        self.progress.say(f"depths: {', '.join(f'{way} at {n}' for way, n in cuts)}")
        whole, *damages = meter.measure_many({}, list(cuts.values()), self.progress)
        own = (depth_damage(damage, self.text, self.looks) for damage in damages)
        return whole, dict(zip(cuts, own, strict=True))

    def damage_of(self, cut: BranchReplacements) -> DepthDamage:
        """What one cut costs."""
        return depth_damage(self._meter.measure(cut, self.progress), self.text, self.looks)

    def fitted_text(self, used: CalibrationRef) -> CalibrationText | str:
        """What weights are folded on, or why there is none."""
        try:
            text = text_of_report(self.loaded, used, progress=self.progress)
        except CalibrationError as error:
            return error.message
        return text.first_tokens(_FITTED_TOKENS)

    def healed(
        self, cuts: Mapping[Place, BranchReplacements], fitted: CalibrationText | str
    ) -> dict[Place, dict[str, object]]:
        """What folded weights leave of each cut's damage, or why they leave all."""
        about = {
            **self.loaded.identity(),
            "ids": [self.text.ids_sha256, None if isinstance(fitted, str) else fitted.ids_sha256],
            "looks": self.looks,
        }
        store = Store(self.place("healed.jsonl"), about)
        results: dict[Place, dict[str, object]] = {}
        for (way, number), cut in cuts.items():
            self.progress.say(f"depths: {way} at {number}, healed by folded weights")
            try:
                damage = store.once(_name(cut), _DAMAGE, partial(self.folded, cut, fitted))
            except HealingError as error:
                results[way, number] = {"not_healed": error.message}
            else:
                results[way, number] = {"healed": damage}
        return results

    def folded(self, cut: BranchReplacements, fitted: CalibrationText | str) -> DepthDamage:
        """What a cut costs with kept weights folded."""
        if isinstance(fitted, str):
            raise HealingError(fitted)
        texts = HealingTexts(fitted, (fitted.ref,), (), None)
        options = HealOptions(kind="fold", batch_size=self.batch_size)
        fitting = Fitting(self.loaded, texts, sorted(cut), options, None, self.progress)
        values = folded_values(fitting, fitted)
        if not values:
            raise HealingError("no weight that is kept could make up for it.")
        meter = self._meter.inside(lambda: swapped(values))
        return depth_damage(meter.measure(cut, self.progress), self.text, self.looks)

    def costs(self, at: RequestShape, names: Collection[SublayerRef]) -> CostTable | None:
        """What cutting sublayers saves of a request in PyTorch; None where that can't be timed."""
        from exporter.choose.costs.torch_cost_runner import torch_runner

        effort = Effort(seconds=_TIMED_S, reload=False)
        kept = self.place("costs.json")
        settings = CostSettings(at, replacements=("none",), effort=effort, kept=kept)
        try:
            return measure_on(torch_runner(self.loaded), settings, names, self.progress)
        except (BackendError, CostError) as error:
            self.progress.say(f"depths: no speeds: {error.message}")
            return None


def depth_damage(damage: Damage, text: CalibrationText, looks: int = 1) -> DepthDamage:
    """A cut's damage with 95 % intervals."""
    increase, documents = damage.nll_sums - damage.baseline_nll_sums, text.clusters
    rise = mean_interval(increase, damage.positions, documents)
    corrected = mean_interval(increase, damage.positions, documents, looks=looks)
    return DepthDamage(
        perplexity_ratio=_exp(damage.log_perplexity_increase),
        perplexity_ratio_ci95=None if rise is None else (_exp(rise.ci95[0]), _exp(rise.ci95[1])),
        perplexity_ratio_most=None if corrected is None else _exp(corrected.ci95[1]),
        kl=damage.kl,
        top1_agreement=damage.top1_agreement,
    )


def _exp(value: float) -> float:
    return math.exp(max(-_MOST_LOG, min(_MOST_LOG, value)))


def recommended(cells: Sequence[DepthCell], most_increase: float) -> DepthCell | None:
    """The fastest cell that keeps the limit on held-out text, healed or not.

    By the rule of a budget's limits: all of the interval is within, which is as much wider as the
    number of cells takes; of a single sample nothing is certain. Where no speed is known, the one
    that removes most parameters.
    """

    def holds(cell: DepthCell) -> bool:
        ends = (d.perplexity_ratio_most for d in (cell.damage, cell.healed) if d is not None)
        return any(end is not None and end <= 1 + most_increase for end in ends)

    def gain(cell: DepthCell) -> tuple[float, float]:
        speed = cell.speedup or 1 / (1 - (cell.parameters_removed or 0.0))
        return speed, 0.0 if cell.least is None else -cell.least.perplexity_ratio

    fitting = [cell for cell in cells if holds(cell) and gain(cell)[0] > _LEAST_SPEEDUP]
    return max(fitting, key=gain, default=None)


_P = TypeVar("_P", bound=Hashable)
_RESULTS = TypeAdapter(list[TaskResult])


def compared_tasks(
    loaded: LoadedModel,
    options: TaskOptions,
    cuts: Mapping[_P, BranchReplacements],
    *,
    kept: Path | None = None,  # None keeps nothing
    progress: Progress = QUIET,
) -> dict[_P, list[TaskResult]]:
    """Each cut model's scores beside the whole one's, on the same items.

    The branches that are cut still run and fill their caches; only what they add is nothing. Cuts
    that are the same are scored once.
    """
    if not options.tasks:
        return {}
    import torch

    from exporter.engines.runners.pytorch import TorchRunner

    files = local_tasks(options)
    tasks = options.tasks if files is None else [(task.name, task.sha256) for task in files]
    about = {**loaded.identity(), "of": list(map(list, tasks)), "limit": options.task_limit}
    store = Store(kept, about)
    with ExitStack() as stack:

        @cache
        def opened() -> tuple[TorchRunner, ModelFolder]:
            runner = TorchRunner(loaded.model, compiled=False, threads=torch.get_num_threads())
            folder = saved_folder(loaded, stack.enter_context(scratch_folder("tasks")))
            return stack.enter_context(runner), folder

        def scored(cut: BranchReplacements) -> list[TaskScores]:
            what = f"without {counted(len(cut), 'sublayer')}" if cut else "the whole model"
            progress.say(f"tasks: {what}")
            with branches_replaced(loaded.model, cut):
                return score_tasks(options, *opened(), progress=progress)

        whole = cache(lambda: scored({}))

        def compared(cut: BranchReplacements) -> list[TaskResult]:
            pairs = zip(whole(), scored(cut), strict=True)
            return [result for pair in pairs for result in compare_scores(*pair)]

        return {
            name: store.once(_name(cut), _RESULTS, partial(compared, cut))
            for name, cut in cuts.items()
        }


def _name(cut: BranchReplacements) -> str:
    return ", ".join(f"{kind} {layer}" for layer, kind in sorted(cut))
