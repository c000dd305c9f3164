"""The order of the stages, and which of them are still valid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from exporter.artifacts import ComparisonReport, PruneReport
from exporter.artifacts.store import locked
from exporter.export.onnx_output import pooling_for
from exporter.heal.options import HealOptions
from exporter.pipeline import encoder_decoder, planning, stages
from exporter.pipeline import run as keys
from exporter.pipeline import stages as checkpoint
from exporter.pipeline.quantizing import quantize, quantize_key, with_method
from exporter.pipeline.refusals import (
    refuse_bad_options,
    refuse_foreign_goals,
    refuse_foreign_results,
    refuse_too_large,
    refuse_useless,
)
from exporter.pipeline.request import ExportRequest
from exporter.pipeline.run import CHECKPOINT, ENGINES, HEALING, QUANTIZE, Run
from exporter.pipeline.stages import build, engines_key
from exporter.progress import QUIET, Progress

_Made = tuple[list[Path], Any]
Stage = Callable[[Run], _Made]
_SHARED = {"score", "plan", HEALING, "export", "prune", *QUANTIZE.values()}
"""The stages whose results don't depend on who asks; times are always a folder's own."""


class _Graphs(Protocol):
    """The stages that make graphs: one of each model, or three."""

    def export(self, run: Run) -> _Made: ...
    def prune(self, run: Run) -> _Made: ...


class _Healing(Protocol):
    def heal_key(self, run: Run, wanted: HealOptions) -> keys.Key: ...
    def heal(self, run: Run, wanted: HealOptions) -> _Made: ...


def export_model(request: ExportRequest, progress: Progress = QUIET) -> ComparisonReport:
    """Walks the whole road and returns the comparison.

    Afterwards ``request.out`` holds importance.json, plan.json, baseline/, candidate/, prune.json,
    report.json, report.md and report.html, and where they were asked for candidate/hf/, healing/,
    baseline-quantized/, candidate-quantized/ and engines/, all of this run.
    When it fails or is cut short, the folder holds what it held before, and the next run finds the
    stages that were finished.

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
        checkpoint.refuse_early(run)
        if run.request.pooling and not run.ledger.has("export"):
            pooling_for(run.choosing)  # or it isn't told how before it is scored and exported
        _score(run)
        _plan_and_export(run)
        _stage(run, "prune", keys.prune_key(run), _of_kind(run).prune)
        if run.request.checkpoint:
            _stage(run, CHECKPOINT, checkpoint.checkpoint_key(run), checkpoint.write)
            checkpoint.keep_with_candidate(run)
        run.free_model()
        _quantize(run)
        _engines(run)
        if run.request.compared:
            _stage(run, "measure", keys.measure_key(run), stages.measure)
        elif run.ledger.has("measure") and not run.ledger.valid("measure", keys.measure_key(run)):
            progress.say("report: it compares something else than is asked for now, and is removed")
            run.ledger.forget("measure")
        if request.checkpoint:
            _stage(run, checkpoint.CARD_STAGE, checkpoint.card_key(run), checkpoint.write_card)
        run.ledger.publish()


def _started(request: ExportRequest, progress: Progress) -> Run:
    run = Run(request, progress)
    if run.is_encoder_decoder:
        request = encoder_decoder.without_presets(request)
        encoder_decoder.refuse_unfit(request)
        run = Run(encoder_decoder.settled(request, progress), progress)
        encoder_decoder.refuse_other_pairs(run)
    refuse_foreign_results(run)
    refuse_too_large(run)
    return run


def _of_kind(run: Run) -> _Graphs:
    """The stages that make and compare the graphs, as the model has one or three."""
    return encoder_decoder if run.is_encoder_decoder else stages


def _score(run: Run) -> None:
    if run.request.scored:
        if not run.request.stream and not run.ledger.valid("score", keys.score_key(run)):
            refuse_foreign_goals(run)
            if run.request.target == "portable":
                missing = find_spec("onnxruntime_genai") is None
                genai = " (with the extra genai)" if missing else ""
                run.progress.say(
                    f"export: the graphs are portable; --target onnxruntime-cpu{genai} writes "
                    "faster ones, as an export without a number does: speeds differ between the two"
                )
        _stage(run, "score", keys.score_key(run), stages.score_sublayers)
    elif run.ledger.has("score") and not run.ledger.valid("score", keys.score_key(run)):
        run.ledger.forget("score")


def _plan_and_export(run: Run) -> None:
    """What depends on the graph is planned on it; else a plan that fails costs no export."""
    if run.request.plans_on_graph:
        _stage(run, "export", keys.export_key(run), _of_kind(run).export)
    given = run.given_plan
    if given is not None:
        planning.check_plan(run, given)
    _stage(run, "plan", planning.plan_key(run), planning.plan)
    if given is None:
        planning.check_plan(run, run.chosen_plan)
    _heal(run)
    refuse_useless(run)
    if not run.request.plans_on_graph:
        _stage(run, "export", keys.export_key(run), _of_kind(run).export)


def _heal(run: Run) -> None:
    wanted = run.request.heal
    if wanted is not None and run.request.heals_plan:
        module: _Healing = encoder_decoder if run.is_encoder_decoder else planning
        key = module.heal_key(run, wanted)
        _stage(run, HEALING, key, partial(module.heal, wanted=wanted))
    elif run.ledger.has(HEALING):
        run.ledger.forget(HEALING)


def _quantize(run: Run) -> None:
    wanted = run.request.quantize
    if wanted is not None:
        wanted = with_method(run, wanted)
    for arm, name in QUANTIZE.items():
        if wanted is None:
            run.forget_others(name, run.sources()[arm])
        else:
            make = partial(quantize, arm=arm, settings=wanted)
            _stage(run, name, quantize_key(run, arm, wanted), make)


def _engines(run: Run) -> None:
    wanted = run.request.engines
    if wanted is None:
        run.forget_others(ENGINES, run.sources())
    else:
        _stage(run, ENGINES, engines_key(run, wanted), partial(build, wanted=wanted))


def _stage(run: Run, name: str, key: keys.Key, make: Stage) -> None:
    def begin() -> _Made:
        run.progress.detail(f"{name}: begins")
        return make(run)

    how = run.ledger.once(name, key, begin, run.request.shared if name in _SHARED else None)
    if how == "reused":
        run.progress.say(f"{name}: reused, nothing it depends on has changed")
    elif how == "shared":
        run.progress.say(f"{name}: shared, it was made from the same before")
