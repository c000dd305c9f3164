"""Drops sublayers in four ways at several numbers, and measures what each costs."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from exporter.artifacts import (
    CalibrationRef,
    DepthCell,
    DepthsReport,
    ImportanceReport,
    TaskResult,
    Way,
)
from exporter.artifacts.plan_figures import Increase
from exporter.artifacts.plans import plan_cut
from exporter.artifacts.store import Store
from exporter.choose.budgets.inputs import module_sizes
from exporter.choose.costs.request_shape import RequestShape, RequestShapeOption
from exporter.choose.depths_answer import Judged, Place, Question, answered, depth_damage
from exporter.choose.selection.meters import RememberingMeter
from exporter.choose.selection.options import refuse_another_model
from exporter.choose.selection.search_options import DROPPING
from exporter.compare.options import ACCURACY, TaskOptions
from exporter.compare.tasks.choosing import local_tasks, score_tasks
from exporter.compare.tasks.items import compare_scores
from exporter.compare.tasks.likelihood import saved_folder
from exporter.errors import CalibrationError, PlanError, ScoringError
from exporter.files import scratch_folder
from exporter.models.ablation.branch_replacements import (
    BranchReplacements,
    branches_replaced,
    without_branches,
)
from exporter.models.ablation.damage import Damage
from exporter.models.ablation.meter import CutMeter
from exporter.models.loading.model_source import LoadedModel
from exporter.models.tasks import Tokens, task_of
from exporter.models.texts.calibration import calibration_text
from exporter.models.texts.sources import refuse_same_text
from exporter.option_types import Count, Lengths, Several, Written, comma_list
from exporter.options import Options, Rule, dataclass, is_given, option, part
from exporter.printable import counted
from exporter.progress import QUIET, Progress
from exporter.score import CalibrationText

_P = TypeVar("_P", bound=Hashable)
_RESULTS = TypeAdapter(list[TaskResult])


def compared_tasks(
    loaded: LoadedModel,
    asked: TaskOptions,
    cuts: Mapping[_P, BranchReplacements],
    *,
    kept: Path | None = None,  # None keeps nothing
    progress: Progress = QUIET,
) -> dict[_P, list[TaskResult]]:
    """Each cut model's scores beside the whole one's, on the same items.

    The branches that are cut still run and fill their caches; only what they add is nothing. Cuts
    that are the same are scored once.
    """
    if not asked.tasks:
        return {}
    store = Store(kept, _about(loaded, asked))
    missing = {_name(cut): cut for cut in cuts.values() if not _known(store, cut)}
    if missing:
        _score(loaded, asked, list(missing.values()), store, progress)
    return {name: _known(store, cut) for name, cut in cuts.items()}


def _name(cut: BranchReplacements) -> str:
    return ", ".join(f"{kind} {layer}" for layer, kind in sorted(cut))


def _known(store: Store, cut: BranchReplacements) -> list[TaskResult]:
    try:
        return _RESULTS.validate_python(store.find(_name(cut)))
    except ValidationError:
        return []


def _about(loaded: LoadedModel, task_options: TaskOptions) -> dict[str, object]:
    files = local_tasks(task_options)
    tasks = task_options.tasks if files is None else [(task.name, task.sha256) for task in files]
    return {**loaded.identity(), "of": list(map(list, tasks)), "limit": task_options.task_limit}


def _score(
    loaded: LoadedModel,
    task_options: TaskOptions,
    cuts: Sequence[BranchReplacements],
    store: Store,
    progress: Progress,
) -> None:
    import torch

    from exporter.engines.runners.pytorch import TorchRunner

    runner = TorchRunner(loaded.model, compiled=False, threads=torch.get_num_threads())
    with scratch_folder("tasks") as place, runner:
        folder = saved_folder(loaded, place)
        progress.say("tasks: the whole model")
        whole = score_tasks(task_options, runner, folder, progress=progress)
        for number, cut in enumerate(cuts, start=1):
            progress.say(
                f"tasks: without {counted(len(cut), 'sublayer')} ({number} of {len(cuts)})"
            )
            with branches_replaced(loaded.model, cut):
                scores = score_tasks(task_options, runner, folder, progress=progress)
            pairs = zip(whole, scores, strict=True)
            task_results = [result for pair in pairs for result in compare_scores(*pair)]
            store.keep(_name(cut), _RESULTS.dump_python(task_results, mode="json"))


WAYS: tuple[Way, ...] = ("attention", "mlp", "block", "joint")
QUICK_NUMBERS: dict[Way, tuple[int, ...]] = {"attention": (1, 2, 4, 8), "block": (2,)}
"""What is tried where no numbers are asked for."""
ANSWER = "How much may be dropped"
_Ways = Annotated[tuple[Way, ...], comma_list, Written("WAY,WAY", ",".join, listed=True)]


def _for_an_answer(name: str) -> Rule:
    def broken(value: Any) -> bool:
        return is_given(value, name) and not value.recommends

    return Rule((name, "recommend"), broken, "{0} is for {1}.", "Give both, or leave -n out.")


@dataclass(frozen=True)
class DepthOptions(Options):
    """What is dropped, and what it is judged on."""

    section = ACCURACY
    numbers: Lengths | None = option(
        None,
        "Numbers of sublayers to drop, in all ways, and what that costs.",
        "-n",
        "--numbers",
        usual="1, 2, 4 and 8 attentions and 2 blocks, with --recommend",
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
        "Tokens for perplexity and KL divergence. With --recommend one half of them chooses, and "
        "the other is reported on.",
        "--eval-tokens",
    )
    recommend: bool = option(
        False,
        "Also measure the speed, the loss in a second domain and with healed weights, and "
        "recommend a number. Always on without -n.",
        section=ANSWER,
        config_only=True,
    )
    other_text: str | None = option(
        None,
        "With --recommend: text of the second domain, such as your own.",
        metavar="SOURCE",
        usual="text that the model samples",
        section=ANSWER,
    )
    most_increase: Increase = option(
        0.02,
        "With --recommend: how much the perplexity on held-out text may rise, by the upper end of "
        "its 95 % interval.",
        "--at-most",
        usual="2%",
        section=ANSWER,
    )
    at: RequestShapeOption = option(
        RequestShape(new=64), "With --recommend: the request that is timed.", section=ANSWER
    )
    sequence_length: Several = option(
        512, "Tokens in a sample of the held-out text.", "--eval-sequence-length", config_only=True
    )
    batch_size: Count = option(4, "Samples in one forward pass.", config_only=True)
    tasks: TaskOptions = part(TaskOptions())
    rules = (
        Rule(("numbers",), lambda told: told.numbers == (), "{0} names none.", "Such as 4,8,12."),
        *map(_for_an_answer, ("other_text", "most_increase", "at")),
    )

    @property
    def recommends(self) -> bool:
        """Whether more than damage is measured, and one cell is recommended."""
        return self.recommend or self.numbers is None

    def asked(self, num_layers: int) -> list[Place]:
        """The cells, way by way; of those that nobody asked for, what the model has."""
        if self.numbers is not None:
            return [(way, n) for way in self.ways for n in sorted(set(self.numbers))]
        own = dict.fromkeys(self.ways, QUICK_NUMBERS["attention"])
        quick = QUICK_NUMBERS if self.ways == WAYS else own
        return [(way, n) for way, numbers in quick.items() for n in numbers if n < num_layers]


def measure_depths(
    loaded: LoadedModel,
    report: ImportanceReport,
    options: DepthOptions,
    *,
    importance_sha256: str,
    kept: Path | None = None,  # None keeps nothing
    progress: Progress = QUIET,
) -> DepthsReport:
    """Measures every way of dropping at every number.

    A number that the model doesn't have, or a way whose scores are missing, is a cell that says
    so; the others are measured all the same.
    """
    refuse_encoder(loaded.model)
    refuse_another_model(report, loaded)
    local_tasks(options.tasks)  # what can't be read is told before hours of measuring
    text, reported = _held_out(loaded, report.calibration, options, progress)
    cells = {place: _plan(report, *place) for place in options.asked(report.model.num_layers)}
    cuts = {
        place: without_branches(cell.deletions, loaded.model)
        for place, cell in cells.items()
        if not cell.refused
    }
    meter = Tokens(loaded.model).meter(text.input_ids, text.mask, batch_size=options.batch_size)
    whole, measured = _measured(loaded, text, meter, cells, cuts, options, kept, progress)
    result = DepthsReport(
        model=report.model,
        metric=report.metric,
        calibration=report.calibration,
        text=text.ref,
        baseline_perplexity=whole.baseline_perplexity,
        cells=list((cells | measured).values()),
        made_from={
            "model": report.model.sha256,
            "importance": importance_sha256,
            "text": text.ref.sha256,
        },
    )
    if not options.recommends:
        return result
    question = Question(
        loaded,
        Judged(text, meter, whole),
        reported,
        _looks(cuts),
        options.other_text,
        options.at,
        options.most_increase,
        options.numbers is None,
        options.batch_size,
        kept,
        progress,
    )
    return answered(question, result, cuts)


def _looks(cuts: Mapping[Place, BranchReplacements]) -> int:
    """How many figures one cut is chosen by: of each the bare one's and the healed one's."""
    return max(1, 2 * len(cuts))


def refuse_encoder(model: Any) -> None:
    """Refuses a model whose cuts have no perplexity to raise."""
    if not task_of(model).predicts_tokens:
        raise ScoringError(
            f"{type(model).__name__} predicts no next token, so it has no perplexity.",
            "depthcut export MODEL -o out finds the largest cut that keeps its embeddings.",
            code="no-next-token",
        )


def _held_out(
    loaded: LoadedModel, used: CalibrationRef, options: DepthOptions, progress: Progress
) -> tuple[CalibrationText, CalibrationText | None]:
    """What cuts are measured on; where one is recommended, the other half is for a report of it."""
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
    return text.in_turn() if options.recommends and len(text.input_ids) > 1 else (text, None)


def _plan(report: ImportanceReport, way: Way, number: int) -> DepthCell:
    try:
        plan = plan_cut(
            report,
            attention=number * (way == "attention"),
            mlp=number * (way == "mlp"),
            block=number * (way == "block"),
            joint=number * (way == "joint"),
        )
    except PlanError as error:
        return DepthCell(way=way, number=number, refused=error.message)
    return DepthCell(way=way, number=number, deletions=plan.deletions)


def _measured(
    loaded: LoadedModel,
    text: CalibrationText,
    meter: CutMeter[Damage],
    cells: Mapping[Place, DepthCell],
    cuts: Mapping[Place, BranchReplacements],
    options: DepthOptions,
    kept: Path | None,
    progress: Progress,
) -> tuple[Damage, dict[Place, DepthCell]]:
    """A damage that knows the whole model's losses, and every cell that has a cut, measured."""
    whole, damages = _damages(loaded, text, meter, cuts, options, kept, progress)
    sizes = module_sizes(loaded)
    scored = compared_tasks(
        loaded,
        options.tasks,
        cuts,
        kept=None if kept is None else kept / "tasks.jsonl",
        progress=progress,
    )
    return whole, {
        place: cells[place].model_copy(
            update={
                "damage": depth_damage(damage, text, _looks(cuts)),
                "parameters_removed": sum(sizes.sublayers[ref].parameters for ref in cuts[place])
                / sizes.parameters,
                "tasks": scored.get(place, []),
            }
        )
        for place, damage in damages.items()
    }


def _damages(
    loaded: LoadedModel,
    text: CalibrationText,
    meter: CutMeter[Damage],
    cuts: Mapping[Place, BranchReplacements],
    options: DepthOptions,
    kept: Path | None,
    progress: Progress,
) -> tuple[Damage, dict[Place, Damage]]:
    """One that knows the whole model's losses, and every cut's.

    A study goes way by way, so that a call that is cut short leaves some. An answer's few cuts are
    measured together: each way begins with a run of the whole model.
    """
    about = {**loaded.identity(), "text": text.ref.model_dump(), "by": "depths"}
    remembering = RememberingMeter(meter, None if kept is None else kept / "damages.jsonl", about)
    results: dict[Place, Damage] = {}
    ways = dict.fromkeys(way for way, _ in cuts)
    for group in [tuple(ways)] if options.recommends else [(way,) for way in ways]:
        some = {place: cut for place, cut in cuts.items() if place[0] in group}
        progress.say(f"depths: {', '.join(f'{way} at {number}' for way, number in some)}")
        _, *damages = remembering.measure_many({}, list(some.values()), progress)
        results.update(zip(some, damages, strict=True))
    any_cut = next(iter(results.values()), None)  # each knows the whole model's losses too
    return any_cut or remembering.measure_many({}, [], progress)[0], results
