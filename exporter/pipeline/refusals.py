"""What `depthcut export` refuses before minutes of work go into it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from exporter.artifacts import CalibrationRef, PruningPlan
from exporter.artifacts.base import nouns_of
from exporter.artifacts.loaded_plan import LoadedPlan
from exporter.artifacts.plan_figures import PlanFigure, kind_of
from exporter.artifacts.plans import read_plan
from exporter.artifacts.store import FOLDER
from exporter.choose.budgets.options import groups_of, refuse_number
from exporter.compare.evaluation import questions
from exporter.compare.intervals import share_interval
from exporter.compare.kept import decided_on, evaluation_texts, read_source
from exporter.compare.tasks.choosing import refuse_missing_tasks
from exporter.engines.build.libraries import LIBRARIES, cards_of, load, refuse_unbuildable
from exporter.engines.runners.cache_form import read_cache_form
from exporter.engines.runners.sessions import check_provider
from exporter.errors import DepthcutError, PlanError, UnmetGoalError, UsageError
from exporter.export.forms.targets import refuse_options
from exporter.models.loading.meta_model import MetaModel
from exporter.models.loading.model_source import LoadedModel
from exporter.models.loading.sources import classifies_images, encoder_decoder_config
from exporter.models.model_folder import find_model
from exporter.models.residual_stream import together_in
from exporter.models.tasks import task_of
from exporter.models.texts.self_text import SAMPLED
from exporter.models.texts.sources import TextSource
from exporter.optional import require
from exporter.pipeline.request import EngineRequest, ExportRequest
from exporter.pipeline.run import ENGINES, HEALING, QUANTIZED, Run
from exporter.processes import available_bytes
from exporter.quantize.settings import QuantizeSettings
from exporter.report.files import REPORTS

_RESULTS: tuple[str, ...] = (
    "importance.json", "plan.json", "baseline", "candidate", "prune.json", *REPORTS,
)  # fmt: skip


def refuse_contradictions(request: ExportRequest) -> None:
    """Refuses options that don't go together, on any machine."""
    refuse_options(
        request.target,
        exporter=request.exporter,
        opset=request.opset,
        dtype=request.load.dtype,
        provider=request.compare.provider,
        engine=None if request.engines is None else request.engines.backend,
        cache_length=request.cache_length,
    )
    room, needed = request.cache_length, request.compare.longest
    if room and needed > room:  # a measurement would find out at the end that its text has no room
        raise UsageError(
            f"Caches of {room} positions are too short for what is measured: {needed}.",
            f"Say --cache-length {needed} or more, or measure shorter texts.",
        )
    refuse_unstreamable(request)
    if request.quantize is not None:
        _refuse_quantization(request, request.quantize)


def refuse_bad_options(request: ExportRequest) -> None:
    """Refuses what can be told without the model."""
    refuse_contradictions(request)
    require("torch", extra="torch")
    check_provider(request.compare.provider)
    if request.exporter == "optimum":
        require("optimum.exporters.onnx", extra="optimum")
    if request.drops.plan is not None:
        path = request.drops.plan
        refuse_reserved_replacements(LoadedPlan.read(path).plan, path)
    if request.engines is not None:
        _refuse_engines(request.engines)
    if not _reads(encoder_decoder_config, request):
        _refuse_deciding_text(request)
    refuse_missing_tasks(request.compare.quality)
    questions(request.compare.quality.prompts)
    for path in request.also:
        find_model(path)


def _refuse_engines(wanted: EngineRequest) -> None:
    refuse_unbuildable(wanted.backend, wanted.settings.compute_capabilities)
    cards_of(load(LIBRARIES[wanted.backend]), wanted.settings.compute_capabilities)


def _refuse_deciding_text(request: ExportRequest) -> None:
    """Refuses to judge on a text that scores, replacements, weights or the plan rest on."""
    images = _reads(classifies_images, request)
    named = dict.fromkeys(request.score.calibration, "what importance would be measured on")
    heal, quantize, given = request.heal, request.quantize, request.drops.plan
    if heal is not None:
        named |= dict.fromkeys(heal.calibration, "what the replacements would be fitted to")
    if quantize is not None and quantize.needs_calibration:
        named |= dict.fromkeys(quantize.calibration, "what the weights would be fitted to")
    decided: dict[str, list[TextSource | CalibrationRef]] = {}
    for spec, what in named.items():
        if spec not in SAMPLED:
            source = read_source(spec, part="calibration", images=images)
            decided.setdefault(what, []).append(source)
    known = {} if given is None else decided_on(read_plan(given).parts)
    evaluation_texts(request.compare, {**decided, **known}, images=images)


def _reads(what: Callable[..., object], request: ExportRequest) -> bool:
    """Whether the model reads something, such as pairs; a broken one is told where it is opened."""
    try:
        return bool(what(request.source, **request.load.reading))
    except DepthcutError:
        return False


def _refuse_quantization(request: ExportRequest, settings: QuantizeSettings) -> None:
    """Refuses what can't be quantised so."""
    settings.refuse_missing_text()
    for_engines = request.engines is not None or request.target.startswith("tensorrt")
    if for_engines and settings.scheme != "int8-qdq":
        raise UsageError(
            f"TensorRT's parser takes no graph in {settings.scheme}.",
            "Say --quantize int8-qdq, with a --calibration text.",
            code="other-target",
        )
    settings.refuse_dtypes([request.load.dtype])


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


def refuse_lost_caches(run: Run) -> None:
    """Refuses to take every cache out of a graph whose mask is as long as its caches.

    Who runs it reads that length from a cache; the graph alone doesn't say it.
    """
    dropped = {
        deletion.layer
        for deletion in run.plan.plan.deletions
        if deletion.kind in ("attention", "block")
    }
    if len(dropped) < run.num_layers:
        return
    if read_cache_form(run.ledger.path("baseline") / "model.onnx").mask is not None:
        raise PlanError(
            "The plan drops every attention, and with them the caches of fixed length that a graph "
            f"for {run.request.target} is run by.",
            "Say --cache-length 0 for caches that grow, or keep an attention.",
            code="no-caches-left",
        )


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


def _ruin(plan: PruningPlan, run: Run) -> str:
    """What a cut costs, in words, where nobody would ship the model; else empty."""
    figure = kind_of(plan.predicted).limited[0]
    value = plan.predicted.get(figure.key)
    if value is None or figure.loss(value) <= figure.loss(figure.useless):
        return ""
    several = ""
    if figure.is_share:
        several = nouns_of(type(run.choosing.model).__name__).several
        texts = plan.judged_on[0].samples if plan.judged_on else 0
        if not texts or _may_keep(figure, value, texts):
            return ""
        # Half as many orders as texts were seen; the model is asked last, as it may be read for it.
        few = math.ceil(texts / 2)
        if together_in(run.choosing.model) > 1 and _may_keep(figure, value, few):
            return ""
    return figure.useless_words.format(
        value=value,
        factor=1 + figure.held(value),
        limit=figure.useless,
        several=several,
    )


def _may_keep(figure: PlanFigure, same: float, number: int) -> bool:
    """Whether a share of so many that stay the same may stand for a useful one."""
    kept = np.arange(number) < round(same * number)
    interval = share_interval(kept.astype(np.float64), np.ones(number))
    return interval is None or interval.ci95[1] >= figure.useless


def refuse_foreign_results(run: Run) -> None:
    """Refuses to write over results that are none of ours."""
    out, ours = run.request.out, not run.ledger.is_new
    names = () if ours else _RESULTS
    if run.request.engines is not None:
        names = (*names, ENGINES)
    if run.request.quantize is not None:
        names = (*names, *QUANTIZED.values())
    for name in names:
        if (out / name).exists() and not run.ledger.owns(name):
            raise UsageError(
                f"{out / name} is there and was not written by depthcut export.",
                "Use another output folder.",
                code="not-ours",
            )


def refuse_reserved_replacements(plan: PruningPlan, path: Path) -> None:
    """Refuses a plan whose file of replacements would stand where a result is to stand."""
    name = "" if plan.replacements is None else Path(plan.replacements.path).parts[0]
    if name in {*_RESULTS, *QUANTIZED.values(), ENGINES, HEALING, FOLDER}:
        raise PlanError(
            f"{path}: $.replacements.path: {name} is the name of a result in the output folder.",
            "Give the file of replacements another name, in the plan too.",
            code="same-file",
        )


_SESSION_SPARE = 1.2  # what a session takes, by its weights
_LEAVE_OUT = "leave one of the two out."


def refuse_unstreamable(request: ExportRequest) -> None:
    """Refuses what needs the whole model in memory."""
    if not request.stream:
        return
    budget, search = request.drops.budget, request.search.search
    for option, item in (
        ("--heal", request.heal is not None),
        ("a budget", budget is not None and not budget.only_counts),
        (f"--search {search}", search not in (None, "one-shot")),
        ("--exporter optimum", request.exporter == "optimum"),
    ):
        if item:
            raise UsageError(
                f"{option} needs the whole model in memory, and --stream never has it there.",
                "Make the plan on a machine that holds the model and give it with --plan, or "
                + _LEAVE_OUT,
                code="needs-whole-model",
            )


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
