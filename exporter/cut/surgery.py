"""ONNX file and plan in, ONNX file out. Needs no PyTorch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

import graph_passes
from exporter.artifacts import (
    FORM_KEY,
    DeletedEntry,
    FormRecord,
    GraphSizeEntry,
    PlannedDeletion,
    PruneReport,
    PruningPlan,
    RefusedEntry,
    Verification,
)
from exporter.artifacts.loaded_plan import LoadedPlan
from exporter.artifacts.plans import MODEL_KEY, note_texts
from exporter.artifacts.stacks import Stack, Stacks, refuse_other_stacks
from exporter.cut.options import CutOptions
from exporter.cut.prune_files import PruneFiles, SourceHashes
from exporter.cut.verify import PrunedFile, UncutGraph, thrifty_because, verify_candidate
from exporter.errors import MissingDependencyError, PlanError
from exporter.models.genai_config import rewritten
from exporter.models.model_folder import ENCODER, FIRST_STEP, GRAPHS, Graph, graph_file
from exporter.optional import require
from exporter.progress import QUIET, ByteCount, Progress
from graph_passes.files import storage
from graph_passes.files.placing import staging
from graph_passes.files.reading import copy_file
from graph_passes.files.storage import data_files, load_model
from graph_passes.fusing.cache_in_place import pair_caches
from graph_passes.pipeline import graph_size
from graph_passes.types import DeletedSublayer, PassReport, Refusal, ResidualSite, SublayerRef

if TYPE_CHECKING:
    import onnx_ir as ir

    from exporter.engines.build.check import ParserCheck

NOT_VERIFIED = Verification(method="none", runs=0, max_abs_error=None, tolerance=None, passed=None)


def inspect_file(path: Path | str) -> list[ResidualSite | Refusal]:
    """Lists what could be cut out of an ONNX file, and what not, and why.

    The result is in the order of the residual stream; a :class:`graph_passes.Refusal` stands for
    what can't be cut. No weight is read.

    Raises:
        OnnxFileError: The file can't be read.
    """
    return graph_passes.find_sites(storage.load_model(Path(path)))


def prune_file(
    source: Path | str,
    target: Path | str,
    plan: LoadedPlan | PruningPlan | Sequence[PlannedDeletion],
    options: CutOptions | None = None,
    *,
    engine_check: ParserCheck | None = None,
    model_checked: bool = False,
    weights_changed: bool = False,
    progress: Progress = QUIET,
) -> PruneReport:
    """Cuts sublayers out of an ONNX file.

    The result, its weights and its report appear together or not at all; an earlier result
    survives every failure, Ctrl-C included, and the source is never changed. Where the source has
    a ``genai_config.json`` beside it, one for the result appears with it; so do config and
    tokenizer.

    Args:
        source: The ONNX file, of any exporter.
        target: The new file; its weights stand beside it.
        plan: What to drop. Of a plan with replacements the numbers are needed, too:
            :meth:`LoadedPlan.read`.
        options: How the result is verified and written.
        engine_check: Asks TensorRT's parser about the result.
        model_checked: Doesn't compare the plan's model with the graph's.
        weights_changed: The graph has the weights that healing changed.
        progress: Hears of each step, and of how many bytes of a large model are copied.

    Returns:
        What was deleted, nodes and parameters before and after, and by how much the result's
        answers differ from the original's with these branches multiplied by zero.

    Raises:
        OnnxFileError: The file can't be read.
        SurgeryError: A sublayer isn't there, or can't be cut without changing others.
        PlanError: The plan's numbers are of another model. A bare plan of one is warned of.
        VerificationError: The answers differ; nothing is written.
    """
    source, target, options = Path(source), Path(target), options or CutOptions()
    plan = plan if isinstance(plan, LoadedPlan) else LoadedPlan.of(plan)
    refuse_other_stacks(plan.plan, None, f"{source}: ", "one graph")
    if plan.changed_weights and not weights_changed:
        raise PlanError(
            f"The plan changes {len(plan.changed_weights)} weights of the PyTorch model, which "
            f"{source} holds as they were.",
            "Export the healed model: depthcut export MODEL --plan PLAN.",
            code="changed-weights",
        )
    if options.verify == "oracle":
        _require_runtime()
    model = storage.load_model(source)
    if not model_checked:
        plan.hold_against(model.metadata_props.get(MODEL_KEY), str(source), progress)
    files = PruneFiles.choose(source, model, target, plan, options)
    is_checked = options.verify == "oracle"
    thrifty = thrifty_because(model, options.verify_limit_bytes) if is_checked else None
    hashes = SourceHashes(source, files.data if options.weights == "compact" else ())
    pruned, passed = _pruned(model, plan, options)
    progress.detail(f"surgery: {passed.before.nodes} -> {passed.after.nodes} nodes")
    cut = _Cut(files, plan, model, pruned, passed, thrifty, hashes, engine_check, progress)
    return _publish(cut)


def _pruned(model: ir.Model, plan: LoadedPlan, options: CutOptions) -> tuple[ir.Model, PassReport]:
    pruned, passed = graph_passes.prune_graph(
        model,
        plan.deletions,
        replacements=plan.tensors,
        renumber_kv=options.renumber_kv,
        keep_debug=options.keep_debug,
        allow_all=options.allow_all,
    )
    _recount_form(pruned)
    note_texts(pruned.metadata_props, plan.plan.decided)
    return pruned, passed


@dataclass(frozen=True)
class _Cut:
    """A cut that is done in memory."""

    files: PruneFiles
    plan: LoadedPlan
    model: ir.Model
    pruned: ir.Model
    passed: PassReport
    thrifty_because: str | None  # of the oracle's check; None leaves it out
    hashes: SourceHashes
    engine_check: ParserCheck | None  # asked about the result; None: nobody is
    progress: Progress

    def report(self, result: Path, weights_folder: Path) -> PruneReport:
        """Verifies the result's file, whose weights lie in a folder, and tells what was done."""
        passed, source = self.passed, self.files.source
        verification = self._verified(result, weights_folder)
        parse = self.engine_check(source, result) if self.engine_check else None
        return PruneReport(
            made_from=self.hashes.wait() | self.plan.hashes,
            target=self.files.target.name,
            deleted=[DeletedEntry.model_validate(_listed(entry)) for entry in passed.deleted],
            refused=[
                RefusedEntry(layer=one.layer, kind=one.kind, node=one.node, reason=one.reason)
                for one in passed.refused
            ],
            before=GraphSizeEntry.model_validate(asdict(passed.before)),
            after=GraphSizeEntry.model_validate(asdict(passed.after)),
            verification=verification,
            engine=parse,
            kv_renumbering=passed.kv_renumbering,
        )

    def _verified(self, result: Path, weights_folder: Path) -> Verification:
        if self.thrifty_because is None:
            return NOT_VERIFIED
        folder, plan = self.files.source.parent, self.plan
        original = UncutGraph(self.model, folder, plan.deletions, plan.tensors)
        pruned = PrunedFile(result, weights_folder, self.passed)
        return verify_candidate(original, pruned, self.progress, self.thrifty_because)


def _recount_form(pruned: ir.Model) -> None:
    """Has a graph's note of its form count the fused operators that are left."""
    note = pruned.metadata_props.get(FORM_KEY)
    if note is None:
        return
    try:
        record = FormRecord.model_validate_json(note)
    except ValueError:  # of another version: whoever reads it tells
        return
    counts = Counter(node.op_type for node in pruned.graph.all_nodes())
    fused = {name: counts[name] for name in record.fused if counts[name]}
    pruned.metadata_props[FORM_KEY] = record.model_copy(update={"fused": fused}).model_dump_json()


def _publish(cut: _Cut) -> PruneReport:
    """Writes everything aside, has it verified, and puts it in its place, all or nothing."""
    files, target, config = cut.files, cut.files.target, cut.files.genai_target
    text = _genai_config(cut)
    try:
        with staging(target) as staged:
            stage = staged.folder
            *data, graph = _written(cut, stage)
            if files.shares_data:
                _link(files, stage)
            report = cut.report(graph, files.source.parent if files.shares_data else stage)
            moves = [(file, target.parent / file.name) for file in data]
            if config is not None:
                (stage / config.name).write_text(text, encoding="utf-8")
                moves.append((stage / config.name, config))
            moves += files.stage_companions(stage)
            if files.report is not None:
                moves.append((report.write(stage / files.report.name), files.report))
            moves.append((graph, target))
            stale = storage.stale_data(target, [*data, graph], files.data)
            staged.place(moves, [*stale, *files.stale_reports])
    except OSError as error:
        raise storage.write_error(target, error) from error
    if config is not None:
        cut.progress.say(files.genai_advice)
    return report


def _genai_config(cut: _Cut) -> str:
    """onnxruntime-genai's config for the result; empty where the source has none."""
    if cut.files.genai is None:
        return ""
    names = [value.name or "" for value in cut.model.graph.inputs]
    gone = [name for entry in cut.passed.deleted for name in entry.inputs_removed]
    return rewritten(cut.files.genai, cut.files.target.name, names, gone, cut.passed.kv_renumbering)


def _written(cut: _Cut, stage: Path) -> list[Path]:
    """The result's files, written aside; the graph comes last."""
    name, weights = cut.files.target.name, cut.files.weights
    size = storage.weight_bytes(cut.pruned) if weights == "compact" else 0
    with ByteCount.large(cut.progress, f"write the weights of {name}", size) as count:
        return storage.write_files(
            *(cut.pruned, stage, name, weights),
            told=count.add,
        )


def _link(files: PruneFiles, stage: Path) -> None:
    """Gives the data files that the result shares names beside it, where its readers look."""
    for data in files.data:
        name = stage / data.relative_to(files.source.parent)
        name.parent.mkdir(parents=True, exist_ok=True)
        if not name.exists():
            name.hardlink_to(data.resolve())


def _require_runtime() -> None:
    """Looks for ONNX Runtime before any work is done."""
    try:
        require("onnxruntime", extra="cpu")
    except MissingDependencyError as error:
        hint = f"{error.hint}; or leave the check of the result out: --verify none"
        raise MissingDependencyError(error.message, hint) from error


def _listed(entry: DeletedSublayer) -> dict[str, object]:
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in asdict(entry).items()
    }


def prune_stacks(
    source: Path,
    target: Path,
    plan: LoadedPlan | Sequence[PlannedDeletion],
    stacks: Stacks,
    options: CutOptions | None = None,
    *,
    progress: Progress = QUIET,
) -> PruneReport:
    """Cuts an encoder-decoder's graphs; a graph that nothing goes of is copied.

    Both graphs of the decoder lose the same sublayers, and with them their caches: those of
    self-attention, or of cross-attention.
    """
    options = options or CutOptions()
    plan = plan if isinstance(plan, LoadedPlan) else LoadedPlan.of(plan)
    reports: dict[Graph, PruneReport] = {}
    for graph in GRAPHS:
        own = _part(plan, stacks, _stack(graph))
        before, after = graph_file(source, graph), graph_file(target, graph)
        if own.deletions:
            report = _encoder_decoder_pruned(before, after, own, options, progress)
            if graph != ENCODER:
                report = report.model_copy(update={"after": _pair_caches(after)})
            reports[graph] = report
        else:
            reports[graph] = _copied(before, after)
    return _joined(reports, stacks)


def _part(plan: LoadedPlan, stacks: Stacks, stack: Stack) -> LoadedPlan:
    """What of a plan is about one stack, by the numbers of its own graph."""
    deletions = {"deletions": stacks.within(plan.plan.deletions, stack), "encoder_layers": None}
    given, first = plan.replacements, stacks.first(stack)
    if given is not None:
        tensors = {
            SublayerRef(ref.layer - first, ref.kind): numbers
            for ref, numbers in given.tensors.items()
            if stacks.stack(ref.layer) == stack
        }
        given = replace(given, tensors=tensors)
    return replace(plan, plan=plan.plan.model_copy(update=deletions), replacements=given)


def _stack(graph: Graph) -> Stack:
    return "encoder" if graph == ENCODER else "decoder"


def _encoder_decoder_pruned(
    source: Path,
    target: Path,
    plan: LoadedPlan,
    options: CutOptions,
    progress: Progress,
) -> PruneReport:
    changed = replace(options, reports=False, companions=False, genai_config="none")
    return prune_file(source, target, plan, changed, model_checked=True, progress=progress)


def _copied(source: Path, target: Path) -> PruneReport:
    model = load_model(source)
    for file in (source, *data_files(model)):
        copy_file(file, target.parent / file.name)
    entry = _size(model)
    return PruneReport(
        target=target.name,
        deleted=[],
        refused=[],
        before=entry,
        after=entry,
        verification=NOT_VERIFIED,
    )


def _size(model: ir.Model) -> GraphSizeEntry:
    size = graph_size(model)
    return GraphSizeEntry(nodes=size.nodes, parameters=size.parameters, bytes=size.bytes)


def _pair_caches(path: Path) -> GraphSizeEntry:
    """Has a decoder's caches be such that optimum's runtime keeps them; its size with these."""
    model = load_model(path)
    pair_caches(model)
    ir.save(model, path)
    return _size(model)


def _joined(reports: dict[Graph, PruneReport], stacks: Stacks) -> PruneReport:
    deleted, refused, parents = [], [], dict[str, str]()
    for graph, report in reports.items():
        first = stacks.first(_stack(graph))
        for entry in report.deleted:
            result = {"layer": entry.layer + first, "graph": f"{graph}.onnx"}
            deleted.append(entry.model_copy(update=result))
        refused += report.refused
        parents |= {f"{graph}.{role}": digest for role, digest in report.made_from.items()}
    return PruneReport(
        made_from=parents,
        deleted=deleted,
        refused=refused,
        before=_together({graph: report.before for graph, report in reports.items()}),
        after=_together({graph: report.after for graph, report in reports.items()}),
        verification=_weakest([r.verification for r in reports.values() if r.deleted]),
    )


def _together(sizes: dict[Graph, GraphSizeEntry]) -> GraphSizeEntry:
    return GraphSizeEntry(
        nodes=sum(size.nodes for size in sizes.values()),
        parameters=sizes[ENCODER].parameters + sizes[FIRST_STEP].parameters,
        bytes=sum(size.bytes for size in sizes.values()),
    )


def _weakest(checks: Sequence[Verification]) -> Verification:
    """The check that came nearest to failing, with the runs of all."""
    known = [check for check in checks if check.max_abs_error is not None and check.tolerance]
    if not known:
        return NOT_VERIFIED
    worst = max(known, key=lambda check: (check.max_abs_error or 0.0) / (check.tolerance or 1.0))
    return worst.model_copy(update={"runs": sum(check.runs for check in known)})
