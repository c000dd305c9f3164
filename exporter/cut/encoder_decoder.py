"""Cuts sublayers out of an encoder-decoder's three graphs."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from exporter.artifacts import GraphSizeEntry, PlannedDeletion, PruneReport, Verification
from exporter.artifacts.plans.loaded import LoadedPlan
from exporter.artifacts.plans.stacks import Stack, Stacks
from exporter.cut.options import CutOptions
from exporter.cut.surgery import NOT_VERIFIED, prune_file
from exporter.models.encoder_decoder_folder import ENCODER, FIRST_STEP, GRAPHS, Graph, graph_file
from exporter.progress import QUIET, Progress
from graph_passes.files.reading import copy_file
from graph_passes.files.storage import data_files, load_model
from graph_passes.fusing.paired_caches import pair_caches
from graph_passes.pipeline import graph_size
from graph_passes.types import SublayerRef


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

    Args:
        source: The folder of the whole graphs.
        target: The folder for the cut ones; there, and the caller's to drop when this fails.
        plan: What goes, by the numbers of both stacks, with the numbers of replacements.
        stacks: How many layers they have.
        options: How; there is one report for all graphs, which isn't written here.
        progress: Told what goes on.

    Returns:
        What was done to all three; parameters count those of the encoder and of the first step,
        since both graphs of the decoder hold the same.

    Raises:
        OnnxFileError: A graph can't be read.
        SurgeryError: A graph can't be cut as asked.
        VerificationError: A result doesn't compute what it should.
    """
    options = options or CutOptions()
    plan = plan if isinstance(plan, LoadedPlan) else LoadedPlan.of(plan)
    reports: dict[Graph, PruneReport] = {}
    for graph in GRAPHS:
        own = _part(plan, stacks, _stack(graph))
        before, after = graph_file(source, graph), graph_file(target, graph)
        if own.deletions:
            report = _pruned(before, after, own, options, progress)
            if graph != ENCODER:
                report = report.model_copy(update={"after": _pair_caches(after)})
            reports[graph] = report
        else:
            reports[graph] = _copied(before, after)
    return _joined(reports, stacks)


def _part(plan: LoadedPlan, stacks: Stacks, stack: Stack) -> LoadedPlan:
    """What of a plan is about one stack, by the numbers of its own graph."""
    told = {"deletions": stacks.within(plan.plan.deletions, stack), "encoder_layers": None}
    given, first = plan.replacements, stacks.first(stack)
    if given is not None:
        tensors = {
            SublayerRef(ref.layer - first, ref.kind): numbers
            for ref, numbers in given.tensors.items()
            if stacks.stack(ref.layer) == stack
        }
        given = replace(given, tensors=tensors)
    return replace(plan, plan=plan.plan.model_copy(update=told), replacements=given)


def _stack(graph: Graph) -> Stack:
    return "encoder" if graph == ENCODER else "decoder"


def _pruned(
    source: Path,
    target: Path,
    plan: LoadedPlan,
    options: CutOptions,
    progress: Progress,
) -> PruneReport:
    with tempfile.TemporaryDirectory(prefix=".report.", dir=target.parent) as place:
        report = Path(place) / "prune.json"
        asked = replace(options, report_path=report, companions=False, genai_config="none")
        return prune_file(source, target, plan, asked, model_checked=True, progress=progress)


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
            told = {"layer": entry.layer + first, "graph": f"{graph}.onnx"}
            deleted.append(entry.model_copy(update=told))
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
