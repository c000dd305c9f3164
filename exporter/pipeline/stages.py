"""The stages of `depthcut export` that score the model, make both graphs and compare them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.artifacts import Arm, Arms, ComparisonReport, ParityCheck, PruneReport
from exporter.artifacts.stacks import Stacks
from exporter.checkpoint.model_card import CardSources, model_card
from exporter.checkpoint.pruned_model import load_pruned
from exporter.checkpoint.write import write_checkpoint
from exporter.choose.budgets.budget import Budget
from exporter.choose.budgets.options import groups_of, refuse_number
from exporter.compare.kept import forget
from exporter.compare.session import compare
from exporter.cut.options import CutOptions
from exporter.cut.surgery import prune_file, prune_stacks
from exporter.engines.build.build import build_engines
from exporter.engines.build.check import gate_where_installed
from exporter.engines.build.engine_set import find_builds
from exporter.engines.build.libraries import ask_driver
from exporter.engines.build.profiles import Ranges, Span, fitting, graph_inputs
from exporter.engines.decoding.verify import believed
from exporter.engines.environment import default_threads, gpu_name, processor_name
from exporter.engines.usage import write_graph_use
from exporter.errors import VerificationError
from exporter.export.forms.targets import TARGETS, write_form, write_onnx
from exporter.files import sha256_file
from exporter.models.graph_facts import read_facts
from exporter.models.loading.meta_model import load_meta
from exporter.models.model_folder import GRAPHS, find_model
from exporter.models.sentence_folder import longest_text
from exporter.models.tasks import task_of
from exporter.pipeline.quantizing import WRITTEN_ANEW
from exporter.pipeline.run import ARMS, CHECKPOINT, ENGINES, Key, Run, question_hashes, text_hashes
from exporter.report.files import REPORTS, write_reports
from exporter.score.scoring import score
from graph_passes.files.placing import remove_tree

if TYPE_CHECKING:
    from exporter.models.loading.model_source import LoadedModel

_GRAPHS = tuple(f"{graph}.onnx*" for graph in GRAPHS)


def score_key(run: Run) -> Key:
    """How the model is loaded, and the text."""
    score = run.request.score
    return {
        "load": vars(run.request.choosing),
        "score": vars(score),
        "texts": text_hashes(run, score.calibration, "calibration"),
    }


def score_sublayers(run: Run, folder: Path) -> None:
    """Measures how redundant each sublayer is."""
    request = run.request
    if request.stream:
        model, stream_dir = run.choosing, request.stream_dir
        report = score(model, request.score, stream_dir=stream_dir, progress=run.progress)
    else:
        check_goals(request.drops.budget, run.choosing)
        if request.target == "portable":
            missing = find_spec("onnxruntime_genai") is None
            genai = " (with the extra genai)" if missing else ""
            run.progress.say(
                f"export: the graphs are portable; --target onnxruntime-cpu{genai} writes faster "
                "ones, as an export without a number does: speeds differ between the two"
            )
        report = score(run.choosing, request.score, progress=run.progress)
    report.write(folder / "importance.json")


def check_goals(budget: Budget | None, loaded: LoadedModel) -> None:
    """Holds goals against the model before it is scored."""
    if budget is None:
        return
    budget.floors.of_task(task_of(loaded.model))
    for group, number in groups_of(budget.counts):
        if number > (most := loaded.ref.num_layers * (2 if group == "joint" else 1)):
            refuse_number(group, number, most, loaded.ref.source)


def export_key(run: Run) -> Key:
    """How the model is loaded and written."""
    return {"load": vars(run.request.load), "form": _form(run)}


def export(run: Run, folder: Path) -> list[dict[str, Any]]:
    """Writes the baseline for its target, and holds it against PyTorch."""
    checks = write_onnx(run.loaded, folder / "baseline", progress=run.progress, **_form(run))
    judge(run, "baseline against PyTorch", checks)
    return [check.model_dump() for check in checks]


def prune(run: Run, folder: Path) -> list[dict[str, Any]]:
    """Cuts the candidate out of the baseline, and holds it against PyTorch and the oracle."""
    from exporter.export.parity import check_export

    target, plan = folder / "candidate", run.plan
    target.mkdir()
    report, loaded = (_prune_stacks if run.is_encoder_decoder else _prune_graph)(run, target)
    before, after = report.before, report.after
    run.progress.say(
        f"prune: {before.nodes} -> {after.nodes} nodes, "
        f"{before.parameters / 1e6:,.2f} -> {after.parameters / 1e6:,.2f} million parameters"
    )
    checks = check_export(
        loaded,
        target / "model.onnx",
        deletions=plan.plan.deletions,
        replacements=plan.replacements,
        provider=parity_provider(run),
        progress=run.progress,
    )
    judge(run, f"candidate against PyTorch with the same modules {_done(run)}", checks)
    if not run.is_encoder_decoder:
        write_graph_use(target / "model.onnx")
    report.write(folder / "prune.json")
    return [check.model_dump() for check in checks]


def _prune_stacks(run: Run, target: Path) -> tuple[PruneReport, LoadedModel]:
    run.ledger.copy("export", "baseline", target, leave_out=_GRAPHS)
    options = CutOptions(allow_all=run.request.allow_empty)
    stacks = Stacks.numbered(run.num_layers, run.encoder_layers)
    baseline = run.ledger.path("baseline")
    report = prune_stacks(baseline, target, run.plan, stacks, options, progress=run.progress)
    return report, run.loaded


def _prune_graph(run: Run, target: Path) -> tuple[PruneReport, LoadedModel]:
    """Also gives the model that the whole graph was exported from."""
    run.ledger.copy("export", "baseline", target, leave_out=WRITTEN_ANEW)
    for_engines = bool(TARGETS[run.request.target].engines)
    with _whole_graph(run, run.ledger.path("baseline") / "model.onnx", target) as (whole, loaded):
        report = prune_file(
            whole,
            target / "model.onnx",
            run.plan,
            CutOptions(allow_all=run.request.allow_empty),
            engine_check=gate_where_installed(run.progress) if for_engines else None,
            model_checked=True,
            weights_changed=True,
            progress=run.progress,
        )
    return report, loaded


def _done(run: Run) -> str:
    return "skipped" if run.plan.replacements is None else "skipped or replaced"


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
            "Try another opset or exporter.",
            code="wrong-results",
        )


def measure_key(run: Run) -> Key:
    """The text, how the graphs are compared, and the machine."""
    longest = longest_text(run.ledger.path("baseline"))
    compare = run.request.compare.for_texts(longest)
    return {
        "longest_text": longest,
        "writes": REPORTS,
        "options": vars(compare) | {"prefill_lengths": compare.prompt_lengths},
        "texts": text_hashes(run, run.request.compare.texts, "evaluation"),
        "also": [read_facts(find_model(path).onnx).sha256 for path in run.request.also],
        "tasks": question_hashes(run.request.compare.quality),
        "machine": [processor_name(), default_threads(), gpu_name()],
    }


def measure(run: Run, folder: Path) -> None:
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
    write_reports(published(run, report.model_copy(update={"healing": run.healing})), folder)
    forget(run.request.out)


def published(run: Run, report: ComparisonReport) -> ComparisonReport:
    """The report with its arms' paths as they will be once everything is in its place."""

    def moved(arm: Arm) -> Arm:
        engines = [e.model_copy(update={"path": placed(e.path)}) for e in arm.engines]
        return arm.model_copy(update={"path": placed(arm.path), "engines": engines})

    def placed(path: str) -> str:
        return str(run.ledger.final(Path(path)))

    arms = Arms(
        baseline=moved(report.arms.baseline),
        candidate=moved(report.arms.candidate),
        references={name: moved(arm) for name, arm in report.arms.references.items()},
    )
    return report.model_copy(update={"arms": arms})


def parity_notes(run: Run, stage: str) -> list[ParityCheck]:
    """What a stage's check against PyTorch gave, named after the model that was checked."""
    arm = {"export": "baseline", "prune": f"candidate, modules {_done(run)}"}[stage]
    checks = [ParityCheck.model_validate(note) for note in run.ledger.notes(stage)]
    return [check.model_copy(update={"name": f"{check.name} ({arm})"}) for check in checks]


def checkpoint_key(run: Run) -> Key:
    """How the model is loaded, and which reports there are."""
    return {"load": vars(run.request.load), "reports": REPORTS}


def write_pruned_checkpoint(run: Run, folder: Path) -> None:
    """Writes the checkpoint with its card, and holds what is read back against the candidate."""
    from exporter.export.parity import check_export

    request, plan, target = run.request, run.plan, folder / CHECKPOINT
    rests = request.scored and plan.plan.importance_sha256 == sha256_file(
        run.ledger.path("importance.json")
    )  # a plan that was given may rest on other scores than this run's, or on none
    sources = CardSources(
        plan=plan.plan,
        importance=run.importance if rests else None,
        healing=run.healing,
        report=ComparisonReport.read(run.ledger.path("report.json")) if request.compared else None,
    )
    loaded = run.loaded
    run.free_model()  # It is pruned in place: whoever wants the whole model loads it again.
    facts = write_checkpoint(
        loaded,
        plan.plan,
        target,
        replacements=plan.replacements,
        card=lambda facts: model_card(facts, sources),
        progress=run.progress,
    )
    del loaded
    dtype = request.load.dtype
    checks = check_export(
        load_meta(str(target), dtype=dtype, pruned=True)
        if request.stream
        else load_pruned(target, dtype=dtype),
        run.ledger.path("candidate") / "model.onnx",
        layers=facts.kept,
        provider=parity_provider(run),
        progress=run.progress,
    )
    judge(run, "candidate against the checkpoint", checks)


_USUAL = 2048  # what an engine serves at least, as exporter.engines.build.profiles has it
_USUAL_CONTEXT = 4096


def engines_key(run: Run) -> Key:
    """How engines are built, and for which card where that is the one that is here."""
    wanted = run.request.engines
    assert wanted is not None
    return {
        "wanted": asdict(wanted),
        "devices": [str(device) for device in ask_driver().devices],
        "ranges": str(_ranges(run)),
    }


def build(run: Run, folder: Path) -> None:
    """Builds the engines of both models."""
    wanted = run.request.engines
    assert wanted is not None
    for arm, source in run.built_from().items():
        target, graph = folder / ENGINES / arm, source / "model.onnx"
        target.mkdir(parents=True)
        built = build_engines(
            graph,
            target,
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
        for engines in find_builds(target):
            believed(engines, graph, run.progress)


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
