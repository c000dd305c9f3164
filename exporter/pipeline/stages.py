"""The stages of `depthcut export` that score the model, make both graphs and compare them.

Each returns its files, in the workplace, and what is worth remembering.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.artifacts import Arm, Arms, ComparisonReport, ParityCheck, PruneReport
from exporter.compare.kept import forget
from exporter.compare.session import compare
from exporter.cut.options import CutOptions
from exporter.cut.surgery import prune_file
from exporter.engines.build.check import gate_where_installed
from exporter.engines.usage import USE_FILE, write_graph_use
from exporter.errors import VerificationError
from exporter.export.forms.targets import TARGETS, write_form
from exporter.files import staged_directory
from exporter.models.companions import copy_processor_files, copy_sentence_files
from exporter.models.loading.model_files import save_pretrained_files
from exporter.models.texts.image_reader import reads_images
from exporter.pipeline import streaming
from exporter.pipeline.keys import export_key, prune_key
from exporter.pipeline.refusals import refuse_lost_caches
from exporter.pipeline.run import ENGINES, QUANTIZED, Run, files_below
from exporter.pipeline.uses import folder_uses
from exporter.report.files import write_reports
from exporter.score import score
from graph_passes.files.placing import remove_tree

if TYPE_CHECKING:
    from exporter.models.loading.model_source import LoadedModel
    from graph_passes.files.unfinished import Unfinished

WRITTEN_ANEW = ("model.onnx", "model.onnx*.data", USE_FILE)
"""Patterns of what of a model's folder is written anew for another form of it."""


def score_sublayers(run: Run) -> tuple[list[Path], None]:
    """Measures how redundant each sublayer is."""
    if run.request.stream:
        report = streaming.score(run)
    else:
        report = score(run.choosing, run.request.score, progress=run.progress)
    return [report.write(run.ledger.work / "importance.json")], None


def export(run: Run) -> tuple[list[Path], list[dict[str, Any]]]:
    """Writes the baseline for its target, and holds it against PyTorch."""
    from exporter.export.parity import check_export

    folder = run.ledger.work / "baseline"
    with (
        staged_directory(folder) as stage,
        streaming.going_on(run, "baseline", export_key(run), stage) as unfinished,
    ):
        model, _ = _written_form(run, run.loaded, stage, unfinished)
        save_pretrained_files(run.loaded, stage)
        checks = check_export(
            run.loaded, model, provider=parity_provider(run), progress=run.progress
        )
        judge(run, "baseline against PyTorch", checks)
        copy_sentence_files(run.loaded.path, stage)
        if reads_images(run.loaded.model):
            copy_processor_files(run.loaded.path, stage)
        write_graph_use(stage / "model.onnx")
    return files_below(folder), [check.model_dump() for check in checks]


def prune(run: Run) -> tuple[list[Path], list[dict[str, Any]]]:
    """Cuts the candidate out of the baseline, and holds it against PyTorch and the oracle."""
    from exporter.export.parity import check_export

    refuse_lost_caches(run)
    baseline, folder = run.ledger.path("baseline"), run.ledger.work / "candidate"
    plan = run.plan
    for_engines = bool(TARGETS[run.request.target].engines)
    with (
        staged_directory(folder) as stage,
        streaming.going_on(run, "candidate", prune_key(run), stage) as unfinished,
    ):
        run.ledger.copy("export", "baseline", stage, leave_out=WRITTEN_ANEW)
        with _whole_graph(run, baseline / "model.onnx", stage) as (whole, loaded):
            report = prune_file(
                whole,
                stage / "model.onnx",
                plan,
                CutOptions(allow_all=run.request.allow_empty),
                unfinished=unfinished,
                engine_check=gate_where_installed(run.progress) if for_engines else None,
                model_checked=True,
                weights_changed=True,
                progress=run.progress,
            )
        say_pruned(run, report)
        checks = check_export(
            loaded,
            stage / "model.onnx",
            deletions=plan.plan.deletions,
            replacements=plan.replacements,
            provider=parity_provider(run),
            progress=run.progress,
        )
        done = "skipped" if plan.replacements is None else "skipped or replaced"
        judge(run, f"candidate against PyTorch with the same modules {done}", checks)
        write_graph_use(stage / "model.onnx")
    files = [*files_below(folder), report.write(run.ledger.work / "prune.json")]
    return files, [check.model_dump() for check in checks]


@contextlib.contextmanager
def _whole_graph(run: Run, baseline: Path, stage: Path) -> Iterator[tuple[Path, LoadedModel]]:
    """The graph that the candidate is cut out of, and the model that it was exported from.

    Healing that changed weights wants a whole graph with those, of the baseline's form. It is not
    kept.
    """
    changes, folder = run.plan.changed_weights, stage / "whole"
    if not changes:
        yield baseline, run.loaded
        return
    from exporter.export.new_weights import weight_places, write_with_weights

    places = weight_places(baseline, run.loaded.model, changes.keys())
    loaded = run.healed_model()
    folder.mkdir()
    if places is None:
        model, _ = _written_form(run, loaded, folder)
    else:
        run.ledger.copy("export", "baseline", folder, leave_out=WRITTEN_ANEW)
        model = write_with_weights(baseline, folder, loaded.model, places, run.progress)
    yield model, loaded
    remove_tree(folder)


def _written_form(
    run: Run, loaded: LoadedModel, folder: Path, unfinished: Unfinished | None = None
) -> tuple[Path, Any]:
    """Writes a model for the target that was asked for."""
    request = run.request
    return write_form(
        loaded,
        folder,
        target=request.target,
        exporter=request.exporter,
        opset=request.opset,
        room=request.cache_room,
        pooling=request.pooling,
        unfinished=unfinished,
        progress=run.progress,
    )


def parity_provider(run: Run) -> str:
    """A graph that is written for one provider may have operators that no other has."""
    return TARGETS[run.request.target].provider or "cpu"


def judge(run: Run, what: str, checks: list[ParityCheck]) -> None:
    """Tells how the checks went, and raises when one did not hold."""
    for check in checks:
        verdict = "holds" if check.passed else "DOES NOT HOLD"
        run.progress.say(
            f"{what}, {check.phase}, {check.name.replace(' against PyTorch', '')}: {verdict}, "
            f"max error {check.max_abs_error:.1e} (tolerance {check.tolerance:.1e})"
        )
    failed = [check for check in checks if not check.passed]
    if failed:
        raise VerificationError(
            f"{what}: {failed[0].name} differs by {failed[0].max_abs_error:.2e}, "
            f"more than {failed[0].tolerance:.2e}. The result is not kept.",
            "Try another --opset or --exporter.",
            code="wrong-results",
        )


def say_pruned(run: Run, report: PruneReport) -> None:
    """Tells what a cut left."""
    before, after = report.before, report.after
    run.progress.say(
        f"prune: {before.nodes} -> {after.nodes} nodes, "
        f"{before.parameters / 1e6:,.2f} -> {after.parameters / 1e6:,.2f} million parameters"
    )


def measure(run: Run) -> tuple[list[Path], None]:
    """Compares both models and writes the report."""
    importance, plan = run.importance, run.plan.plan
    graphs = run.ledger.path("baseline"), run.ledger.path("candidate")
    arms, floats, built_from = graphs, None, None
    if run.request.engines is not None:
        arms = run.ledger.path(ENGINES) / "baseline", run.ledger.path(ENGINES) / "candidate"
        sources = run.built_from()
        built_from = sources["baseline"], sources["candidate"]
    elif run.request.quantize is not None:
        arms = run.ledger.path(QUANTIZED["baseline"]), run.ledger.path(QUANTIZED["candidate"])
        floats = graphs
    report = compare(
        *arms,
        run.request.compare,
        also=run.request.also,
        floats=floats,
        onnx=built_from,
        parity=[*parity_notes(run, "export"), *parity_notes(run, "prune")],
        plan=plan.deletions,
        calibration=importance.calibration,
        parts=plan.parts,
        resume=run.request.out,
        progress=run.progress,
    )
    told = {"healing": run.healing, "uses": folder_uses(run)}
    report = published(run, report.model_copy(update=told))
    paths = write_reports(report, run.ledger.work, importance)
    forget(run.request.out, report)
    return paths, None


def published(run: Run, report: ComparisonReport) -> ComparisonReport:
    """The report with its arms' paths as they will be once everything is in its place."""

    def placed(path: str) -> str:
        at = Path(path)
        inside = at.is_relative_to(run.ledger.work)
        return str(run.request.out / at.relative_to(run.ledger.work)) if inside else path

    def moved(arm: Arm) -> Arm:
        engines = [e.model_copy(update={"path": placed(e.path)}) for e in arm.engines]
        return arm.model_copy(update={"path": placed(arm.path), "engines": engines})

    arms = Arms(
        baseline=moved(report.arms.baseline),
        candidate=moved(report.arms.candidate),
        references={name: moved(arm) for name, arm in report.arms.references.items()},
    )
    return report.model_copy(update={"arms": arms})


def parity_notes(run: Run, stage: str) -> list[ParityCheck]:
    """What a stage's check against PyTorch gave, named after the model that was checked."""
    done = "skipped" if run.plan.replacements is None else "skipped or replaced"
    arm = {"export": "baseline", "prune": f"candidate, modules {done}"}[stage]
    checks = [ParityCheck.model_validate(note) for note in run.ledger.notes(stage)]
    return [check.model_copy(update={"name": f"{check.name} ({arm})"}) for check in checks]
