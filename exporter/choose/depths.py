"""How many sublayers may be dropped: what cuts cost on held-out text, bare and healed, and gain."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass as plain_dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import TypeAdapter

from exporter.artifacts import (
    Accuracy,
    CalibrationRef,
    DepthCell,
    DepthDamage,
    DepthInt8,
    DepthsReport,
    ImportanceReport,
    Interval,
    Speedup,
    Target,
    TaskResult,
    Way,
)
from exporter.artifacts.loaded_plan import LoadedPlan
from exporter.artifacts.plan_figures import Increase
from exporter.artifacts.plans import plan_cut
from exporter.artifacts.store import Store
from exporter.choose.budgets.budget import DROPPING
from exporter.choose.budgets.limits import RememberingMeter, least_share
from exporter.choose.budgets.options import refuse_another_model
from exporter.choose.costs.measuring import (
    CostSettings,
    Effort,
    cut_for_a_while,
    measure_on,
    of_rows,
    time_request,
    torch_runner,
)
from exporter.choose.costs.table import CostTable, RequestShape, RequestShapeOption
from exporter.choose.costs.weighing import module_sizes
from exporter.compare.answers import Tokens as TokenAnswers
from exporter.compare.arms import Comparison
from exporter.compare.evaluation import EvaluationTokens
from exporter.compare.intervals import mean_interval
from exporter.compare.kinds import open_file_arm
from exporter.compare.options import ACCURACY, SPEED, CompareOptions, TaskOptions
from exporter.compare.tasks.choosing import local_tasks, score_tasks
from exporter.compare.tasks.items import TaskScores, compare_scores
from exporter.compare.tasks.likelihood import saved_folder
from exporter.engines.environment import default_threads, processor_name
from exporter.engines.tensors import has_cache
from exporter.errors import (
    BackendError,
    CalibrationError,
    CostError,
    DepthcutError,
    HealingError,
    PlanError,
)
from exporter.export.forms.targets import write_form
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
from exporter.models.changed_weights import OwnValue, swapped
from exporter.models.loading.model_files import save_pretrained_files
from exporter.models.loading.model_source import LoadedModel
from exporter.models.model_folder import ModelFolder
from exporter.models.tasks import Tokens
from exporter.models.texts.calibration import CalibrationText, calibration_text, text_of_report
from exporter.models.texts.sources import refuse_same_text
from exporter.option_types import Count, InputFile, Lengths, Several, Written, comma_list
from exporter.options import Options, Rule, dataclass, excludes, option, part
from exporter.printable import counted
from exporter.processes import available_bytes
from exporter.progress import QUIET, Progress
from exporter.quantize.quantize import quantize_file
from exporter.quantize.settings import QuantizeSettings

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
        "Held-out text: a file or folder of text, hf:DATASET or pydoc.",
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


_INT8_EFFORT = Effort(seconds=10.0, reload=False)
_GRAPHS_BESIDE = 3.5
"""Times the weights: a graph in float and two in int8, beside the model in PyTorch."""
_FITTED_TOKENS = 2048
_LEAST_SPEEDUP = 1.01
"""A cut that gains less isn't worth its loss."""
_TOO_FAR = "cuts that lose so much that no healing is expected to bring them within the limit."
_MOST_LOG = 700.0
_TARGET: Target = "onnxruntime-cpu"
_DAMAGE = TypeAdapter(DepthDamage)
_INT8 = TypeAdapter(list[DepthInt8])


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
    study = _Study(loaded, report, options, kept, progress)
    result = study.measured(importance_sha256)
    best = recommended(result.cells, options.most_increase)
    return result.model_copy(update={**study.reported(best), **study.in_int8(best)})


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


@plain_dataclass(frozen=True)
class _Judge:
    """A text, and what cuts of a model cost there."""

    text: CalibrationText
    meter: CutMeter[Damage]
    looks: int  # how many figures one cut is chosen by
    progress: Progress

    def damage(self, cut: BranchReplacements, values: Sequence[OwnValue]) -> DepthDamage:
        """Of one cut, with other values of some weights that it keeps."""
        meter = self.meter.inside(lambda: swapped(values)) if values else self.meter
        return depth_damage(meter.measure(cut, self.progress), self.text, self.looks)


@plain_dataclass
class _Study:
    """Cuts of a model, measured on one half of a text."""

    loaded: LoadedModel
    report: ImportanceReport
    options: DepthOptions
    kept: Path | None  # None keeps nothing
    progress: Progress

    def __post_init__(self) -> None:
        options, report, model = self.options, self.report, self.loaded.model
        self.given_costs = None if options.costs is None else CostTable.read(options.costs)
        text, self.other_half = _held_out(self.loaded, report.calibration, options, self.progress)
        places = options.asked(report.model.num_layers)
        self.cells = {place: _plan(report, *place) for place in places}
        self.cuts = {
            place: without_branches(cell.deletions, model)
            for place, cell in self.cells.items()
            if not cell.refused
        }
        self.judge, self.sizes = self._judge(text, 2 * len(self.cuts)), module_sizes(self.loaded)

    def _judge(self, text: CalibrationText, looks: int) -> _Judge:
        task, batch_size = Tokens(self.loaded.model), self.options.batch_size
        meter = task.meter(text.input_ids, text.mask, batch_size=batch_size)
        return _Judge(text, meter, max(1, looks), self.progress)

    def _place(self, name: str) -> Path | None:
        return None if self.kept is None else self.kept / name

    def _store(self, name: str, **about: object) -> Store:
        """What an earlier run has found on the same texts."""
        fitted, looks = self.fitted, self.judge.looks
        ids = [self.judge.text.ids_sha256, None if isinstance(fitted, str) else fitted.ids_sha256]
        known = {**self.loaded.identity(), "ids": ids, "looks": looks, **about}
        return Store(self._place(name), known)

    @cached_property
    def fitted(self) -> CalibrationText | str:
        """What weights are folded on, or why there is none."""
        try:
            text = text_of_report(self.loaded, self.report.calibration, progress=self.progress)
        except CalibrationError as error:
            return error.message
        return text.first_tokens(_FITTED_TOKENS)

    @cached_property
    def costs(self) -> CostTable | None:
        """What cutting sublayers saves of a request; None where that can't be timed."""
        if self.given_costs is not None:
            return self.given_costs
        settings = CostSettings(self.options.at, kept=self._place("costs.jsonl"))
        try:
            return measure_on(torch_runner(self.loaded), settings, self.progress)
        except (BackendError, CostError) as error:
            self.progress.say(f"depths: no speeds: {error.message}")
            return None

    def folded(self, cut: BranchReplacements) -> list[OwnValue]:
        """Values of kept weights that make up for a cut."""
        if isinstance(self.fitted, str):
            raise HealingError(self.fitted)
        texts = HealingTexts(self.fitted, (self.fitted.ref,), (), None)
        options = HealOptions(kind="fold", batch_size=self.options.batch_size)
        fitting = Fitting(self.loaded, texts, sorted(cut), options, None, self.progress)
        values = folded_values(fitting, self.fitted)
        if not values:
            raise HealingError("no weight that is kept could make up for it.")
        return values

    def bare(self) -> tuple[Damage, dict[Place, DepthDamage]]:
        """One damage that knows the whole model's losses, and every cut's."""
        text, looks = self.judge.text, self.judge.looks
        about = {**self.loaded.identity(), "text": text.ref.model_dump(), "by": "depths"}
        meter = RememberingMeter(self.judge.meter, self._place("damages.jsonl"), about)
        self.progress.say(f"depths: {', '.join(f'{way} at {n}' for way, n in self.cuts)}")
        whole, *damages = meter.measure_many({}, list(self.cuts.values()), self.progress)
        own = (depth_damage(damage, text, looks) for damage in damages)
        return whole, dict(zip(self.cuts, own, strict=True))

    def healed(self, bare: Mapping[Place, DepthDamage]) -> Iterator[dict[str, object]]:
        """What folded weights leave of each cut's damage, or why they leave all."""
        store = self._store("healed.jsonl")
        for place, cut in self.cuts.items():
            if (
                bare[place].perplexity_ratio ** least_share(trains=False)
                > 1 + self.options.most_increase
            ):
                yield {"not_healed": _TOO_FAR}
                continue
            self.progress.say(f"depths: {place[0]} at {place[1]}, healed by folded weights")
            try:
                yield {"healed": store.once(_name(cut), _DAMAGE, partial(self._healed, cut))}
            except HealingError as error:
                yield {"not_healed": error.message}

    def _healed(self, cut: BranchReplacements) -> DepthDamage:
        return self.judge.damage(cut, self.folded(cut))

    def measured(self, importance_sha256: str) -> DepthsReport:
        """All but what is said of the recommended cut."""
        whole, bare = self.bare()
        healed, costs, sizes = [*self.healed(bare)], self.costs, self.sizes
        options, kept = self.options.tasks, self._place("tasks.jsonl")
        scored = compared_tasks(self.loaded, options, self.cuts, kept=kept, progress=self.progress)
        for (place, cut), healing in zip(self.cuts.items(), healed, strict=True):
            gone = sum(sizes.sublayers[ref].parameters for ref in cut)
            more = {
                "damage": bare[place],
                "parameters_removed": gone / sizes.parameters,
                "speedup": costs and costs.speedup(dict.fromkeys(cut, "none")),
                "tasks": scored.get(place, []),
            }
            self.cells[place] = self.cells[place].model_copy(update={**more, **healing})
        model, text = self.report.model, self.judge.text.ref
        hashes = {"model": model.sha256, "importance": importance_sha256, "text": text.sha256}
        return DepthsReport(
            model=model,
            metric=self.report.metric,
            calibration=self.report.calibration,
            text=text,
            baseline_perplexity=whole.baseline_perplexity,
            cells=[*self.cells.values()],
            fitted_on=None if isinstance(self.fitted, str) else self.fitted.ref,
            most_increase=self.options.most_increase,
            looks=self.judge.looks,
            request="" if costs is None else str(costs.at),
            backend="" if costs is None else costs.backend,
            threads=None if costs is None else costs.environment.threads,
            made_from=hashes,
        )

    def _values(self, cell: DepthCell) -> list[OwnValue]:
        """Those of a cut that loses less with them."""
        return [] if cell.least is cell.damage else self.folded(self.cuts[cell.way, cell.number])

    def reported(self, best: DepthCell | None) -> dict[str, object]:
        """The recommended cut, on text that has chosen nothing."""
        if best is None:
            return {}
        name: dict[str, object] = {"way": best.way, "number": best.number}
        if self.other_half is None:
            return name
        self.progress.say("depths: the recommended cut, on text that has chosen nothing")
        judge, cut = self._judge(self.other_half, 1), self.cuts[best.way, best.number]
        damage = judge.damage(cut, self._values(best))
        return {**name, "reported_text": self.other_half.ref, "reported": damage}

    def in_int8(self, best: DepthCell | None) -> dict[str, object]:
        """The whole model in int8, and the recommended cut so, or why there are no such rows."""
        needed, free = _GRAPHS_BESIDE * self.sizes.weight_bytes, available_bytes()
        if free is not None and needed > free:
            too_much = f"it takes {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} are free"
            return {"no_int8": too_much}
        request = None if self.costs is None else self.costs.at
        text = self.other_half or self.judge.text
        on = [str(request), processor_name(), default_threads(), text.ids_sha256]
        cut = {} if best is None else self.cuts[best.way, best.number]
        self.progress.say("depths: in int8 on ONNX Runtime")
        rows = partial(self._rows_in_int8, best, request, text)
        try:
            result = self._store("int8.jsonl", on=on).once(_name(cut), _INT8, rows)
        except DepthcutError as error:
            self.progress.say(f"depths: nothing in int8: {error.message}")
            return {"no_int8": error.message.rstrip(".")}
        return {"int8": result, "reported_text": self.other_half and self.other_half.ref}

    def _rows_in_int8(
        self, best: DepthCell | None, request: RequestShape | None, text: CalibrationText
    ) -> list[DepthInt8]:
        ref = text.ref
        ids = [row[mask] for row, mask in zip(text.input_ids, text.mask, strict=True)]
        read = EvaluationTokens(ids, ref.source, ref.sha256, documents=text.clusters)
        with scratch_folder("depths") as place, self._graphs(place, best) as comparison:
            whole, *others = comparison.arms
            runners = {name: arm.runner for name, arm in comparison.arms.items()}
            pairs = [(whole, name) for name in others]
            judged = TokenAnswers(read, causal=True).hold(runners, pairs, self.progress)
            speedups = {} if request is None else _speedups(comparison, request)
            size = comparison.whole.facts.file_bytes
            return [
                DepthInt8(
                    deletions=arm.plan(),
                    bytes_removed=1 - arm.facts.file_bytes / size,
                    damage=_damage_of(judged[whole, name]),
                    speedup=speedups.get(name),
                )
                for name, arm in comparison.arms.items()
                if name != whole
            ]

    @contextmanager
    def _graphs(self, place: Path, best: DepthCell | None) -> Iterator[Comparison]:
        """The whole graph, and in int8 that and the recommended cut, all running."""
        graph, settings = self._graph(place / "whole", []), QuantizeSettings(scheme="int8")
        graphs = {"baseline": graph, "candidate": place / "int8.onnx"}
        quantize_file(graph, graphs["candidate"], settings, progress=self.progress)
        if best is not None:
            graphs["cut"], values = place / "cut.onnx", self._values(best)
            healed, plan = place / "healed", LoadedPlan.of(best.deletions)
            source = self._graph(healed, values) if values else graph
            with cut_for_a_while(source, place, plan) as cut:
                quantize_file(cut, graphs["cut"], settings, progress=self.progress)
        options, threads = CompareOptions(), default_threads()
        arms = {
            name: open_file_arm(path, options, threads=threads) for name, path in graphs.items()
        }
        comparison = Comparison(arms, progress=self.progress)
        with comparison.running():
            yield comparison

    def _graph(self, folder: Path, values: Sequence[OwnValue]) -> Path:
        folder.mkdir()
        save_pretrained_files(self.loaded, folder)
        with swapped(values):
            return write_form(self.loaded, folder, target=_TARGET, progress=self.progress)[0]


def _speedups(comparison: Comparison, request: RequestShape) -> dict[str, Speedup]:
    """How much faster each arm answers a request than the first."""
    cells = request.cells(cached=has_cache(comparison.whole.runner.inputs))
    counts, whole = [count for _, count in cells], comparison.pair[0]
    timed = comparison.timed()
    rows = time_request(timed, cells, _INT8_EFFORT, lambda _: False, comparison.progress)
    others = [name for name in timed if name != whole]
    return {name: of_rows(rows, counts, arm=name).speedup for name in others}


def depth_damage(damage: Damage, text: CalibrationText, looks: int = 1) -> DepthDamage:
    """A cut's damage with 95 % intervals."""
    increase, documents = damage.nll_sums - damage.baseline_nll_sums, text.clusters
    rise = mean_interval(increase, damage.positions, documents)
    corrected = mean_interval(increase, damage.positions, documents, looks=looks)
    return DepthDamage(
        perplexity_ratio=_exp(damage.log_perplexity_increase),
        perplexity_ratio_ci95=_ratios(rise),
        perplexity_ratio_most=None if corrected is None else _exp(corrected.ci95[1]),
        kl=damage.kl,
        top1_agreement=damage.top1_agreement,
    )


def _damage_of(accuracy: Accuracy) -> DepthDamage:
    """An arm's damage, which nothing is chosen by."""
    pair, kl, top1 = accuracy.perplexity, accuracy.kl_divergence, accuracy.top1_agreement
    assert pair is not None
    assert kl is not None
    assert top1 is not None
    return DepthDamage(
        perplexity_ratio=pair.candidate / pair.baseline,
        perplexity_ratio_ci95=_ratios(accuracy.intervals.get("perplexity")),
        kl=kl,
        top1_agreement=top1,
    )


def _ratios(rise: Interval | None) -> tuple[float, float] | None:
    return None if rise is None else (_exp(rise.ci95[0]), _exp(rise.ci95[1]))


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
