"""The stages, and the order in which they are walked."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from exporter.artifacts import ComparisonReport, PruneReport
from exporter.artifacts.store import locked
from exporter.checkpoint.pruned_model import refuse_tokenless
from exporter.checkpoint.streamed import layers_of
from exporter.export.onnx_output import pooling_for
from exporter.pipeline import planning, stages
from exporter.pipeline.quantizing import quantize, quantize_key, with_method
from exporter.pipeline.refusals import (
    refuse_bad_options,
    refuse_deciding_text,
    refuse_foreign_results,
    refuse_of_stacks,
    refuse_too_large,
    refuse_useless,
    settled,
)
from exporter.pipeline.request import ExportRequest
from exporter.pipeline.run import (
    ARMS,
    CHECKPOINT,
    ENGINES,
    GRAPHS,
    HEALING,
    MODEL,
    QUANTIZE,
    Run,
    Stage,
)
from exporter.progress import QUIET, Progress

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
    refuse_bad_options(request)
    with locked(request.out):
        run = _started(request, progress)
        for stage in order(run):
            if stage is _PLAN and run.given_plan is not None:
                planning.check_plan(run, run.given_plan)
            run.finish(stage)
            if stage is _PLAN and run.given_plan is None:
                planning.check_plan(run, run.chosen_plan)
            elif stage is _HEAL:
                refuse_useless(run)
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
        refuse_of_stacks(request)
        run = Run(settled(request, progress), progress)
    refuse_deciding_text(run)
    run.request = with_method(run.request, progress)
    refuse_foreign_results(run)
    refuse_too_large(run)
    if request.checkpoint and not run.ledger.has(CHECKPOINT):
        refuse_tokenless(run.choosing.model)
        if request.stream:
            layers_of(run.choosing.model)
    if request.pooling and not run.ledger.has("export"):
        pooling_for(run.choosing)
    return run
