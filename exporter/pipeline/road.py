"""The stages, and the order in which they are walked."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from exporter.artifacts import CalibrationRef, ComparisonReport, PruneReport
from exporter.artifacts.store import FOLDER, locked
from exporter.checkpoint.pruned_model import refuse_tokenless
from exporter.checkpoint.streamed import layers_of
from exporter.choose.budgets.planner import refuse_more_than_scores
from exporter.compare.evaluation import questions
from exporter.compare.kept import decided_on, evaluation_texts, read_source, refuse_deciding
from exporter.compare.sequences import refuse_unread
from exporter.compare.tasks.choosing import local_tasks
from exporter.engines.build.libraries import LIBRARIES, cards_of, load, refuse_unbuildable
from exporter.engines.runners.sessions import check_provider
from exporter.errors import PlanError, UsageError
from exporter.export.onnx_output import pooling_for
from exporter.heal.healed import refuse_other_ways
from exporter.models.loading.sources import classifies_images
from exporter.models.model_folder import find_model
from exporter.models.texts.pairs import read_pairs
from exporter.models.texts.self_text import SAMPLED
from exporter.models.texts.sources import PYDOC, Part, TextSource
from exporter.optional import require
from exporter.pipeline import planning, stages
from exporter.pipeline.quantizing import quantize, quantize_key, with_method
from exporter.pipeline.request import EngineRequest, ExportRequest
from exporter.pipeline.run import (
    ARMS,
    CHECKPOINT,
    ENGINES,
    GRAPHS,
    HEALING,
    MODEL,
    QUANTIZE,
    QUANTIZED,
    Run,
    Stage,
)
from exporter.progress import QUIET, Progress
from exporter.report.files import REPORTS
from exporter.score.options import refuse_idle_of_pairs

_SCORE = Stage(
    "score", stages.score_key, stages.score_sublayers, (MODEL,), lambda request: request.scored
)
_EXPORT = Stage("export", stages.export_key, stages.export, (MODEL,))
_PLAN = Stage("plan", planning.plan_key, planning.plan, (MODEL, "score", "export"))
_HEAL = Stage(
    HEALING, planning.heal_key, planning.heal, (MODEL, "plan"), lambda request: request.heals_plan
)
_PRUNE = Stage("prune", lambda _: {}, stages.prune, ("export", "plan", HEALING))
_AFTER = (
    *(
        Stage(
            name,
            quantize_key,
            partial(quantize, arm=arm),
            (ARMS[arm],),
            lambda request: request.quantize is not None,
        )
        for arm, name in QUANTIZE.items()
    ),
    Stage(
        ENGINES,
        stages.engines_key,
        stages.build,
        GRAPHS,
        lambda request: request.engines is not None,
        shared=False,
    ),
    Stage(
        "measure",
        stages.measure_key,
        stages.measure,
        ("score", "plan", HEALING, *GRAPHS, ENGINES),
        lambda request: request.compared,
        shared=False,
    ),
    Stage(
        CHECKPOINT,
        stages.checkpoint_key,
        stages.write_pruned_checkpoint,
        (MODEL, "score", "plan", HEALING, "prune", "measure"),
        lambda request: request.checkpoint,
        shared=False,
    ),
)


def export_model(request: ExportRequest, progress: Progress = QUIET) -> ComparisonReport:
    """Walks the whole road and returns the comparison.

    Afterwards ``request.out`` holds importance.json, plan.json, baseline/, candidate/, prune.json,
    report.json, report.md and report.html, and where they were asked for checkpoint/, healing/,
    baseline-quantized/, candidate-quantized/ and engines/, all of this run.
    In a new folder each appears as soon as it is finished. Results of another request stand until
    all new ones are there. The next run goes on where this one fails or is cut short.

    Args:
        request: The model, the folder, what to drop, and how the rest is done.
        progress: Hears of each step.

    Raises:
        DepthcutError: Of the stage that failed, such as ScoringError or ExportError.
    """
    _walk(request, progress)
    return ComparisonReport.read(request.out / "report.json")


def write_models(request: ExportRequest, progress: Progress = QUIET) -> PruneReport:
    """Walks the same road up to the comparison, for models that this machine can't run.

    There is no report then; one of an earlier run goes where it speaks of other models.

    Args:
        request: As :func:`export_model` takes it.
        progress: Hears of each step.

    Raises:
        DepthcutError: Of the stage that failed.
    """
    _walk(replace(request, compared=False), progress)
    return PruneReport.read(request.out / "prune.json")


def _walk(request: ExportRequest, progress: Progress) -> None:
    check_request(request)
    with locked(request.out):
        run = _started(request, progress)
        for stage in order(run):
            if stage is _PLAN and run.given_plan is not None:
                planning.check_plan(run, run.given_plan)
            run.finish(stage)
            if stage is _PLAN and run.given_plan is None:
                planning.check_plan(run, run.chosen_plan)
            elif stage is _HEAL:
                planning.refuse_useless(run)
            elif stage is _PRUNE:
                run.free_model()  # before anything is built or timed
        for name in run.ledger.publish():
            progress.say(f"{name}: its results are removed, they were made from others")


def order(run: Run) -> tuple[Stage, ...]:
    """What depends on the graph is planned on it; else a plan that fails costs no export."""
    on_graph = run.request.plans_on_graph
    first = (_EXPORT, _PLAN, _HEAL) if on_graph else (_PLAN, _HEAL, _EXPORT)
    return (_SCORE, *first, _PRUNE, *_AFTER)


def _started(request: ExportRequest, progress: Progress) -> Run:
    run = Run(request, progress)
    if run.is_encoder_decoder:
        run = Run(in_stacks(request, progress), progress)
    refuse_deciding_text(run)
    run.request = with_method(run.request, progress)
    refuse_foreign_results(run)
    if request.checkpoint and not run.ledger.has(CHECKPOINT):
        refuse_tokenless(run.choosing.model)
        if request.stream:
            layers_of(run.choosing.model)
    if request.pooling and not run.ledger.has("export"):
        pooling_for(run.choosing)
    return run


def check_request(request: ExportRequest) -> None:
    """Looks whether this machine can do it, as far as that can be told without the model."""
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


def in_stacks(request: ExportRequest, progress: Progress) -> ExportRequest:
    """The request for an encoder-decoder, where no kept weight is changed; it says so."""
    request = replace(request, in_stacks=True)
    if request.drops.budget is not None:
        refuse_more_than_scores(request.drops.budget, request.search)
    heal = request.heal
    if heal is not None and heal.kind == "auto":
        heal = replace(heal, kind="best", replacements="none")
    elif heal is not None and heal.kind == "fold" and heal.replacements != "none":
        heal = replace(heal, kind=heal.replacements, replacements="none")
    if heal is not None:
        refuse_other_ways(heal)
    refuse_unread(request.compare)
    refuse_idle_of_pairs(request.score, "sequence_length", "seed")
    if heal != request.heal:
        progress.say("heal: by biases and linear maps; kept weights stay as they are")
    return replace(request, heal=heal)


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


_RESULTS: tuple[str, ...] = (
    "importance.json", "plan.json", "baseline", "candidate", "prune.json", *REPORTS,
)  # fmt: skip
_OTHERS = (CHECKPOINT, HEALING, ENGINES, *QUANTIZED.values())


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
