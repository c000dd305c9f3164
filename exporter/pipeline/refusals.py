"""What `depthcut export` refuses before minutes of work go into it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from exporter.artifacts import CalibrationRef, PruningPlan
from exporter.artifacts.base import nouns_of
from exporter.artifacts.plan_figures import kind_of
from exporter.artifacts.store import FOLDER
from exporter.choose.budgets.options import groups_of, refuse_number
from exporter.choose.budgets.planner import refuse_more_than_scores
from exporter.compare.evaluation import questions
from exporter.compare.kept import decided_on, evaluation_texts, read_source, refuse_deciding
from exporter.compare.sequences import refuse_unread
from exporter.compare.tasks.choosing import local_tasks
from exporter.engines.build.libraries import LIBRARIES, cards_of, load, refuse_unbuildable
from exporter.engines.runners.sessions import check_provider
from exporter.errors import PlanError, UnmetGoalError, UsageError
from exporter.heal.healed import refuse_other_ways
from exporter.heal.options import TRAINED, HealOptions
from exporter.models.loading.meta_model import MetaModel
from exporter.models.loading.model_source import LoadedModel
from exporter.models.loading.sources import classifies_images
from exporter.models.model_folder import find_model
from exporter.models.residual_stream import together_in
from exporter.models.tasks import task_of
from exporter.models.texts.pairs import read_pairs
from exporter.models.texts.self_text import SAMPLED
from exporter.models.texts.sources import PYDOC, Part, TextSource
from exporter.optional import require
from exporter.options import is_given, refusal
from exporter.pipeline.request import EngineRequest, ExportRequest
from exporter.pipeline.run import CHECKPOINT, ENGINES, HEALING, QUANTIZED, Run
from exporter.processes import available_bytes
from exporter.progress import Progress
from exporter.report.files import REPORTS
from exporter.score.options import refuse_idle_of_pairs

_RESULTS: tuple[str, ...] = (
    "importance.json", "plan.json", "baseline", "candidate", "prune.json", *REPORTS,
)  # fmt: skip
_OTHERS = (CHECKPOINT, HEALING, ENGINES, *QUANTIZED.values())


def refuse_bad_options(request: ExportRequest) -> None:
    """Refuses what can be told without the model."""
    request.check()
    require("torch", extra="torch")
    check_provider(request.compare.provider)
    if request.engines is not None:
        check_engines(request.engines)
    local_tasks(request.compare.quality)
    questions(request.compare.quality.prompts)
    for path in request.also:
        find_model(path)


def check_engines(wanted: EngineRequest) -> None:
    """Looks whether such engines can be built here."""
    refuse_unbuildable(wanted.backend, wanted.settings.compute_capabilities)
    cards_of(load(LIBRARIES[wanted.backend]), wanted.settings.compute_capabilities)


def refuse_deciding_text(run: Run) -> None:
    """Refuses to judge on a text that scores, replacements, weights or the plan rest on."""
    request, paired = run.request, run.is_encoder_decoder
    heal, quantize = request.heal, request.quantize
    images = not paired and classifies_images(request.source, **request.load.reading)
    named = dict.fromkeys(request.score.calibration, "what importance would be measured on")
    if heal is not None and not paired:
        named |= dict.fromkeys(heal.calibration, "what the replacements would be fitted to")
    if quantize is not None and quantize.needs_calibration:
        named |= dict.fromkeys(quantize.calibration, "what the weights would be fitted to")

    def read(spec: str, part: Part) -> TextSource:
        if not paired:
            return read_source(spec, part=part, images=images)
        pairs = read_pairs(spec, part=part, sound=run.hears)
        return TextSource(pairs.source, (), pairs.sha256)

    if paired:
        refuse_unread(request.compare, hears=run.hears)
        noise = run.hears and request.compare.eval_text == PYDOC
        if len(named) > 1 or noise or not request.compared:  # told later, or nothing is judged
            return
    known: dict[str, list[TextSource | CalibrationRef]] = {}
    if run.given_plan is not None:
        known |= {what: [*refs] for what, refs in decided_on(run.given_plan.plan.parts).items()}
    for spec, what in named.items():
        if paired or spec not in SAMPLED:
            known.setdefault(what, []).append(read(spec, "calibration"))
    if paired:
        refuse_deciding([read(request.compare.eval_text, "evaluation")], known)
    else:
        evaluation_texts(request.compare, known, images=images)


def refuse_foreign_goals(run: Run) -> None:
    """Refuses goals that the model can't be held to, before it is scored."""
    budget = run.request.drops.budget
    if budget is None:
        return
    budget.floors.of_task(task_of(run.choosing.model))
    ref = run.choosing.ref
    for group, number in groups_of(budget.counts):
        if number > (most := ref.num_layers * (2 if group == "joint" else 1)):
            refuse_number(group, number, most, ref.source)


def refuse_useless(run: Run) -> None:
    """Refuses a cut that ruins the model, where that was measured and no limit was asked for."""
    budget, plan = run.request.drops.budget, run.plan.plan
    if not run.request.refuses_useless or budget is None or budget.floors:
        return
    if not (lost := _ruin(plan, run)):
        return
    raise UnmetGoalError(
        f"Without {plan.describe()} the model is useless: {lost}, on text of "
        f"{', '.join(text.source for text in plan.judged_on[:1]) or 'the search'}.",
        "Ask for less; without a number or a goal the largest cut is found that costs next to "
        "nothing, or --allow-damage goes on.",
        code="useless",
    )


_ERRORS = 2.5  # of a share on a few texts, which may stand for a useful one


def _ruin(plan: PruningPlan, run: Run) -> str:
    """What a cut costs, in words, where nobody would ship the model; else empty."""
    figure = kind_of(plan.predicted).limited[0]
    value = plan.predicted.get(figure.key)
    if value is None or figure.loss(value) <= figure.loss(figure.useless):
        return ""
    several = ""
    if figure.is_share:
        several = nouns_of(type(run.choosing.model).__name__).several
        texts: float = plan.judged_on[0].samples if plan.judged_on else 0
        if together_in(run.choosing.model) > 1:
            texts /= 2  # as many orders are seen
        if not texts or value + _ERRORS * math.sqrt(value * (1 - value) / texts) >= figure.useless:
            return ""
    return figure.useless_words.format(
        value=value,
        factor=1 + figure.held(value),
        limit=figure.useless,
        several=several,
    )


def refuse_foreign_results(run: Run) -> None:
    """Refuses to write over results that are none of ours, and over ours by a plan's numbers."""
    request, given = run.request, run.given_plan
    if given is not None and given.plan.replacements is not None:
        name = Path(given.plan.replacements.path).parts[0]
        if name in (*_RESULTS, *_OTHERS, FOLDER):
            raise PlanError(
                f"{given.path}: $.replacements.path: {name} is the name of a result in the output "
                "folder.",
                "Give the file of replacements another name, in the plan too.",
                code="same-file",
            )
    wanted = (request.checkpoint, request.heal, request.engines, *[request.quantize] * 2)
    others = (name for name, asks in zip(_OTHERS, wanted, strict=True) if asks)
    for name in (*_RESULTS, *others):
        if (request.out / name).exists() and not run.ledger.owns(name):
            raise UsageError(
                f"{request.out / name} is there and was not written by depthcut export.",
                "Use another output folder.",
                code="not-ours",
            )


_SESSION_SPARE = 1.2  # what a session takes, by its weights


def refuse_too_large(run: Run) -> None:
    """Refuses before hours of work what would fail after them for want of memory."""
    request = run.request
    if not request.stream:
        return
    weights, free = hollow(run.loaded).weights.nbytes(), available_bytes()
    for wanted, what, needed, hint in (
        (request.compared, "Running both models at once", int(2 * _SESSION_SPARE * weights),
         "Leave it out with --no-measure, and compare where there is memory: depthcut compare."),
        (request.load.dtype == "bfloat16", "Checking a candidate in bfloat16, which ONNX Runtime "
         "runs in float32,", 2 * weights,
         "Say --dtype float16 or float32, whose weights stay on the disk."),
    ):  # fmt: skip
        if wanted and free is not None and needed > free:
            raise UsageError(
                f"{what} would take about {needed / 1e9:.3g} GB of memory, and {free / 1e9:.3g} GB "
                "are free.",
                hint,
                code="too-little-memory",
            )


def hollow(loaded: LoadedModel) -> MetaModel:
    """A model that --stream has loaded, without its weights."""
    assert isinstance(loaded, MetaModel)
    return loaded


def refuse_of_stacks(request: ExportRequest) -> None:
    """Refuses what an encoder-decoder can't be exported with, before anything is done."""
    if request.drops.budget is not None:
        refuse_more_than_scores(request.drops.budget, request.search)
    heal, scored = request.heal, request.score
    lacking = {
        "target": request.target != "portable",
        "exporter": request.exporter == "optimum",
        "load.dtype": request.load.dtype == "bfloat16",  # ONNX Runtime's CPU runs none
        **{name: is_given(request, name) for name in ("pooling", "checkpoint", "also", "server")},
        **{name: is_given(request, name) for name in ("stream", "quantize", "engines")},
    }
    if heal is not None:
        lacking |= {
            "heal.check_text": heal.check_text is not None,
            "heal.calibration": heal.calibration not in ((), scored.calibration),
            "heal.samples": heal.samples not in (None, scored.samples),
            **{
                f"heal.{name}": heal.kind == "auto" and is_given(heal, name)
                for name in (*TRAINED, "replacements")
            },
        }
    words = "{0} is for models of one graph. An encoder-decoder becomes three, and is healed on "
    words += "the pairs that it is scored on, without a training."
    for name in (name for name, is_asked in lacking.items() if is_asked):
        raise refusal(request, [name], words, "Leave {0} out.", code="one-graph-option")
    if heal is not None:
        refuse_other_ways(without_weights(heal))
    refuse_unread(request.compare)
    refuse_idle_of_pairs(scored, "sequence_length", "seed")


def settled(request: ExportRequest, progress: Progress) -> ExportRequest:
    """The request with what export does by itself as it goes with such a model; it says so."""
    heal = request.heal
    if heal is not None and heal != (own := without_weights(heal)):
        progress.say("heal: by biases and linear maps; kept weights stay as they are")
        heal = own
    return replace(request, heal=heal, in_stacks=True)


def without_weights(heal: HealOptions) -> HealOptions:
    """The usual ways of healing, with what they do where no kept weight can be changed."""
    if heal.kind == "auto":
        return replace(heal, kind="best", replacements="none")
    if heal.kind == "fold" and heal.replacements != "none":
        return replace(heal, kind=heal.replacements, replacements="none")
    return heal
