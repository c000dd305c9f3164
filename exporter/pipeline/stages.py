"""The stages of `depthcut export` that score the model, make both graphs and compare them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.artifacts import Arm, Arms, ComparisonReport, ParityCheck, PruneReport, PruningPlan
from exporter.checkpoint.facts import CheckpointFacts
from exporter.checkpoint.model_card import CardSources, model_card
from exporter.checkpoint.pruned_model import load_pruned, refuse_tokenless
from exporter.checkpoint.streamed import layers_of
from exporter.checkpoint.write import CARD, write_checkpoint
from exporter.compare.kept import forget
from exporter.compare.session import compare
from exporter.cut.options import CutOptions
from exporter.cut.surgery import prune_file
from exporter.engines.build.build import build_engines
from exporter.engines.build.check import gate_where_installed
from exporter.engines.build.engine_set import find_builds
from exporter.engines.build.libraries import ask_driver
from exporter.engines.build.profiles import Ranges, Span, fitting, graph_inputs
from exporter.engines.decoding.verify import believed
from exporter.engines.usage import USE_FILE, write_graph_use
from exporter.errors import VerificationError
from exporter.export.forms.targets import TARGETS, write_form, write_onnx
from exporter.files import sha256_file, staged_directory, write_text
from exporter.models.loading.meta_model import load_meta
from exporter.models.sentence_folder import longest_text
from exporter.pipeline.refusals import hollow, refuse_lost_caches
from exporter.pipeline.request import EngineRequest
from exporter.pipeline.run import ARMS, CHECKPOINT, ENGINES, GRAPHS, Key, Run, files_below
from exporter.report.files import REPORTS, write_reports
from exporter.score.scoring import score
from graph_passes.files.placing import remove_tree

if TYPE_CHECKING:
    from exporter.models.loading.model_source import LoadedModel

_CANDIDATE = "candidate"
CARD_STAGE = "card"


def refuse_early(run: Run) -> None:
    """Refuses a model that has no such checkpoint before it is scored and exported."""
    if run.request.checkpoint and not run.ledger.has(CHECKPOINT):
        refuse_tokenless(run.choosing.model)
        if run.request.stream:
            layers_of(run.choosing.model)


def checkpoint_key(run: Run) -> Key:
    """The model, the plan, and the graph that the checkpoint is held against."""
    return {
        "model": run.source_sha256,
        "load": vars(run.request.load),
        "candidate": run.ledger.files_hash("prune"),
        "plan": run.plan.sha256,
        "versions": run.versions,
    }


def card_key(run: Run) -> Key:
    """The checkpoint, and what was measured."""
    return {
        "checkpoint": run.ledger.files_hash(CHECKPOINT),
        "measured": run.ledger.files_hash("measure") if run.request.compared else None,
        "reports": REPORTS,
    }


def write(run: Run) -> tuple[list[Path], dict[str, Any]]:
    """Writes the checkpoint, reads it back, and holds it against the candidate's graph."""
    loaded, plan = run.loaded, run.plan
    run.free_model()  # It is pruned in place: whoever wants the whole model loads it again.
    folder = _candidate_in_work(run) / CHECKPOINT
    remove_tree(folder)
    facts = write_checkpoint(
        loaded, plan.plan, folder, replacements=plan.replacements, progress=run.progress
    )
    del loaded
    _check(run, folder, facts)
    return files_below(folder), facts.model_dump(mode="json")


def _check(run: Run, folder: Path, facts: CheckpointFacts) -> None:
    from exporter.export.parity import check_export

    dtype = run.request.load.dtype
    checks = check_export(
        load_meta(str(folder), dtype=dtype, pruned=True)
        if run.request.stream
        else load_pruned(folder, dtype=dtype),
        folder.parent / "model.onnx",
        layers=facts.kept,
        provider=parity_provider(run),
        progress=run.progress,
    )
    judge(run, "candidate against the checkpoint", checks)


def write_card(run: Run) -> tuple[list[Path], None]:
    """Writes the model card, with what was measured."""
    facts = CheckpointFacts.model_validate(run.ledger.notes(CHECKPOINT))
    plan = run.plan.plan
    sources = CardSources(
        plan=plan,
        importance=run.importance if _rests_on_scores(run, plan) else None,
        healing=run.healing,
        report=_report(run),
    )
    path = _candidate_in_work(run) / CHECKPOINT / CARD
    write_text(path, model_card(facts, sources))
    return [path], None


def _rests_on_scores(run: Run, plan: PruningPlan) -> bool:
    """A plan that was given may rest on other scores than this run's, or on none."""
    scored = run.request.scored
    return scored and plan.importance_sha256 == sha256_file(run.ledger.path("importance.json"))


def _report(run: Run) -> ComparisonReport | None:
    if not run.request.compared:
        return None
    return ComparisonReport.read(run.ledger.path("report.json"))


def keep_with_candidate(run: Run) -> None:
    """Takes a checkpoint that is still valid along, where the candidate was made anew."""
    if (run.ledger.work / _CANDIDATE).is_dir():
        _candidate_in_work(run)


def _candidate_in_work(run: Run) -> Path:
    """The candidate's folder in the workplace, whole; what is not new in it is linked."""
    for stage in ("prune", CHECKPOINT, CARD_STAGE):
        run.ledger.take_along(stage, _CANDIDATE)
    return run.ledger.work / _CANDIDATE


WRITTEN_ANEW = ("model.onnx", "model.onnx*.data", USE_FILE)
"""Patterns of what of a model's folder is written anew for another form of it."""


def score_sublayers(run: Run) -> tuple[list[Path], None]:
    """Measures how redundant each sublayer is."""
    if run.request.stream:
        report = score(
            hollow(run.choosing),
            run.request.score,
            stream_dir=run.request.stream_dir,
            progress=run.progress,
        )
    else:
        report = score(run.choosing, run.request.score, progress=run.progress)
    return [report.write(run.ledger.work / "importance.json")], None


def export(run: Run) -> tuple[list[Path], list[dict[str, Any]]]:
    """Writes the baseline for its target, and holds it against PyTorch."""
    folder = run.ledger.work / "baseline"
    remove_tree(folder)  # of a run that was killed
    checks = write_onnx(run.loaded, folder, progress=run.progress, **_form(run))
    judge(run, "baseline against PyTorch", checks)
    return files_below(folder), [check.model_dump() for check in checks]


def prune(run: Run) -> tuple[list[Path], list[dict[str, Any]]]:
    """Cuts the candidate out of the baseline, and holds it against PyTorch and the oracle."""
    from exporter.export.parity import check_export

    refuse_lost_caches(run)
    baseline, folder = run.ledger.path("baseline"), run.ledger.work / "candidate"
    plan = run.plan
    for_engines = bool(TARGETS[run.request.target].engines)
    with staged_directory(folder) as stage:
        run.ledger.copy("export", "baseline", stage, leave_out=WRITTEN_ANEW)
        with _whole_graph(run, baseline / "model.onnx", stage) as (whole, loaded):
            report = prune_file(
                whole,
                stage / "model.onnx",
                plan,
                CutOptions(allow_all=run.request.allow_empty),
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
    folder = stage / "whole"
    if not run.plan.changed_weights:
        yield baseline, run.loaded
        return
    loaded = run.healed_model()
    folder.mkdir()
    model, _ = write_form(loaded, folder, progress=run.progress, **_form(run))
    yield model, loaded
    remove_tree(folder)


def _form(run: Run) -> dict[str, Any]:
    """What is asked for of the graph's form."""
    request = run.request
    return {
        "target": request.target,
        "exporter": request.exporter,
        "opset": request.opset,
        "room": request.cache_room if TARGETS[request.target].fixed_caches else None,
        "pooling": request.pooling,
    }


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
    plan, engines = run.plan.plan, run.ledger.path(ENGINES)
    (whole, cut), (baseline, candidate) = map(run.ledger.path, ARMS), run.built_from().values()
    built, quantized = run.request.engines is not None, run.request.quantize is not None
    report = compare(
        engines / "baseline" if built else baseline,
        engines / "candidate" if built else candidate,
        run.request.compare,
        also=run.request.also,
        floats=(whole, cut) if quantized and not built else None,
        onnx=(baseline, candidate) if built else None,
        parity=[*parity_notes(run, "export"), *parity_notes(run, "prune")],
        plan=plan.deletions,
        calibration=run.importance.calibration,
        parts=plan.parts,
        resume=run.request.out,
        progress=run.progress,
    )
    report = published(run, report.model_copy(update={"healing": run.healing}))
    paths = write_reports(report, run.ledger.work)
    forget(run.request.out)
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


_USUAL = 2048  # what an engine serves at least, as exporter.engines.build.profiles has it
_USUAL_CONTEXT = 4096


def engines_key(run: Run, wanted: EngineRequest) -> Key:
    """Both graphs, how they are built, and for which card where that is the one that is here."""
    return {
        "made_from": run.ledger.hashes(*GRAPHS),
        "backend": wanted.backend,
        "builds": wanted.builds,
        "split": wanted.split,
        "settings": asdict(wanted.settings),
        "devices": [str(device) for device in ask_driver().devices],
        "ranges": str(_ranges(run)),
        "versions": run.versions,
    }


def build(run: Run, wanted: EngineRequest) -> tuple[list[Path], dict[str, str]]:
    """Builds the engines of both models; what they were built from is noted."""
    folder = run.ledger.work / ENGINES
    with staged_directory(folder) as stage:
        for arm, source in run.built_from().items():
            (stage / arm).mkdir()
            graph = source / "model.onnx"
            built = build_engines(
                graph,
                stage / arm,
                split=wanted.split,
                builds=wanted.builds,
                ranges=fitting(graph_inputs(graph), _ranges(run)),
                backend=wanted.backend,
                settings=wanted.settings,
                progress=run.progress,
            )
            for path, record in built:
                layers = sum(record.layers.values())
                run.progress.say(
                    f"engines: {arm}, {path.name}: {record.engine_bytes / 1e6:.1f} MB, "
                    f"{layers} layers, in {record.total_s:.1f} s"
                )
            for engines in find_builds(stage / arm):
                believed(engines, graph, run.progress)
    return files_below(folder), run.sources()


def _ranges(run: Run) -> Ranges:
    """Usual ranges, widened to what is measured."""
    options = run.request.compare.for_texts(longest_text(run.ledger.path("baseline")))
    prompts = (*options.prompt_lengths, options.eval_sequence_length)
    contexts = options.decode_past_lengths or (1,)
    return Ranges(
        batch=Span(1, min(options.batches), max(options.batches)),
        prompt=Span(1, max(options.prompt_lengths or (1,)), max(_USUAL, *prompts)),
        context=Span(1, max(contexts), max(_USUAL_CONTEXT, *contexts)),
    )
