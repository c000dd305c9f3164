"""ONNX file and plan in, ONNX file out. Needs no PyTorch."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from exporter.artifacts import (
    FORM_KEY,
    DeletedEntry,
    EngineParse,
    FormRecord,
    GraphSizeEntry,
    PlannedDeletion,
    PruneReport,
    RefusedEntry,
    Verification,
)
from exporter.artifacts.replacement_file import Replacements
from exporter.cut.oracle.setting import DEFAULT_LIMIT_BYTES, Setting, choose
from exporter.cut.prune_files import PruneFiles, choose_report_path
from exporter.cut.source_hashes import SourceHashes
from exporter.errors import MissingDependencyError
from exporter.optional import require
from exporter.progress import QUIET, ByteCount, Progress
from graph_passes.types import (
    DeletedSublayer,
    Deletion,
    PassReport,
    Refusal,
    ResidualSite,
    SublayerRef,
)

if TYPE_CHECKING:
    import onnx_ir as ir

    from exporter.engines.build.check import ParserCheck
    from graph_passes.files.placing import Staging
    from graph_passes.files.unfinished import Unfinished
    from graph_passes.replacements import ReplacementTensors

NOT_VERIFIED = Verification(method="none", runs=0, max_abs_error=None, tolerance=None, passed=None)


def inspect_file(path: Path) -> list[ResidualSite | Refusal]:
    """Lists what could be cut out of an ONNX file, and what not, and why.

    Args:
        path: The ONNX file; its weights are not read.

    Raises:
        OnnxFileError: The file or its external data can't be read safely.
    """
    from graph_passes import find_sites
    from graph_passes.files.storage import load_model

    return find_sites(load_model(path))


def prune_file(
    source: Path,
    target: Path,
    deletions: Sequence[PlannedDeletion],
    *,
    plan_sha256: str | None = None,
    replacements: Replacements | None = None,
    verify: Literal["oracle", "none"] = "oracle",
    verify_limit_bytes: int = DEFAULT_LIMIT_BYTES,
    weights: Literal["compact", "share"] = "compact",
    renumber_kv: bool = False,
    keep_debug: bool = False,
    allow_all: bool = False,
    genai_config: Literal["rewrite", "none"] = "rewrite",
    report_path: Path | None = None,
    engine_check: ParserCheck | None = None,
    unfinished: Unfinished | None = None,
    progress: Progress = QUIET,
) -> PruneReport:
    """Cuts sublayers out of an ONNX file.

    The result, its weights and its report appear together or not at all; an earlier result
    survives every failure, Ctrl-C included, and the source is never changed. Where the source has
    a ``genai_config.json`` beside it, one for the result appears with it.

    Args:
        source: The ONNX file.
        target: The file to write, another than ``source``.
        deletions: What to delete.
        plan_sha256: The hash of the plan file that they come from, for the report.
        replacements: The numbers for the deletions that name a replacement.
        verify: ``oracle`` runs the result against the original with the branches multiplied by
            zero, plus the replacements, on ONNX Runtime; ``none`` is recorded in the report.
        verify_limit_bytes: Models with more weights, in bytes, are verified at a cheaper setting
            (see :func:`exporter.cut.oracle.verify.verify_candidate`), and so are those for which
            there isn't memory enough; the report says so.
        weights: ``compact`` writes ``<target>.data`` with the weights that are left; ``share``
            points into the source's data file, which must be in the same folder; only what
            replacements bring goes into the graph, or if it is large into ``<target>.data``.
        renumber_kv: Gives the caches that are left dense numbers.
        keep_debug: Keeps the exporter's notes, which may hold local paths.
        allow_all: Lets every sublayer go.
        genai_config: ``rewrite`` a config beside the source for the result, or ``none``.
        report_path: Where the report goes, in place of an earlier file; by default ``prune.json``
            beside the target, if no other model's report stands there.
        engine_check: Asked whether an engine's parser takes the result, before it appears.
        unfinished: Where the weights of ``compact`` grow, so that an interrupted run can be gone
            on with.
        progress: Who is told, also of how many bytes of a large model are copied.

    Returns:
        The report, as written.

    Raises:
        OnnxFileError: The source can't be read, or the target not written.
        SurgeryError: The graph can't be cut as asked, or its ``genai_config.json`` not rewritten.
        VerificationError: The result doesn't compute what it should, or too little memory is free
            to tell; or the source parses and the result doesn't.
        MissingDependencyError: Verification without ONNX Runtime.
    """
    from graph_passes import prune_graph
    from graph_passes.files.storage import load_model

    if verify == "oracle":
        _require_runtime()
    report_place = choose_report_path(target, report_path)
    model = load_model(source)
    files = PruneFiles.choose(source, model, target, report_place, weights, genai_config)
    files.refuse_harm(model, replacements, report_asked=report_path is not None)
    original = _Original(
        model,
        source.parent,
        [Deletion(d.layer, d.kind, d.replacement) for d in deletions],
        replacements.tensors if replacements else {},
        choose(model, verify_limit_bytes) if verify == "oracle" else None,
    )
    hashes = SourceHashes(source, files.data if weights == "compact" else [])
    pruned, passed = prune_graph(
        model,
        original.deletions,
        replacements=original.replacements,
        renumber_kv=renumber_kv,
        keep_debug=keep_debug,
        allow_all=allow_all,
    )
    progress.detail(f"surgery: {passed.before.nodes} -> {passed.after.nodes} nodes")
    _recount_form(pruned)

    def reported(candidate: Path, folder: Path) -> PruneReport:
        verification = original.verified(candidate, folder, passed, progress)
        parse = engine_check(source, candidate) if engine_check else None
        made_from = hashes.made_from(plan_sha256, replacements)
        return _report(target.name, passed, verification, parse, made_from)

    config = files.genai.text(model, passed) if files.genai else None
    report = _publish(files, pruned, config, reported, unfinished, progress)
    if files.genai:
        progress.say(files.genai.advice(files.all))
    return report


@dataclass(frozen=True)
class _Original:
    """The graph before the cut, and what the masked oracle makes of it.

    Attributes:
        model: The graph.
        folder: Where its external weights lie.
        deletions: Whose branches the oracle multiplies by zero.
        replacements: What it adds in their places.
        setting: How closely it looks; None leaves it out.
    """

    model: ir.Model
    folder: Path
    deletions: Sequence[Deletion]
    replacements: Mapping[SublayerRef, ReplacementTensors]
    setting: Setting | None

    def verified(
        self, result: Path, weights_folder: Path, passed: PassReport, progress: Progress
    ) -> Verification:
        """Holds the result's file, whose weights lie in a folder, against the oracle."""
        if self.setting is None:
            return NOT_VERIFIED
        from exporter.cut.oracle.verify import Candidate, verify_candidate

        return verify_candidate(
            self.model,
            self.folder,
            self.deletions,
            Candidate(result, weights_folder, passed),
            progress,
            self.replacements,
            self.setting,
        )


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


def _publish(
    files: PruneFiles,
    pruned: ir.Model,
    config: str | None,
    reported: Callable[[Path, Path], PruneReport],
    unfinished: Unfinished | None,
    progress: Progress,
) -> PruneReport:
    """Writes everything aside, has it verified, and puts it in its place, all or nothing."""
    from graph_passes.files import storage
    from graph_passes.files.placing import staging

    target = files.target
    try:
        with staging(target) as staged, _report_stage(files, staged) as report_stage:
            stage = staged.folder
            written = _written(files, pruned, stage, unfinished, progress)
            shares = files.weights == "share" and files.data
            folder = files.source.parent if shares else stage
            if shares:
                _link(files, stage)
            report = reported(stage / target.name, folder)
            graph = written.pop()
            moves = [(file, target.parent / file.name) for file in written]
            if files.genai and config is not None:
                config_file = stage / files.genai.target.name
                config_file.write_text(config, encoding="utf-8")
                moves.append((config_file, files.genai.target))
            moves.append((report.write(report_stage / files.report.name), files.report))
            moves.append((graph, target))
            staged.place(moves, storage.stale_data(target, [*written, graph], files.data))
    except OSError as error:
        raise storage.write_error(target, error) from error
    return report


@contextlib.contextmanager
def _report_stage(files: PruneFiles, staged: Staging) -> Iterator[Path]:
    """Where the report is made: on the file system that it goes to."""
    from graph_passes.files.placing import staging

    if files.report.parent.resolve() == files.target.parent.resolve():
        yield staged.folder
        return
    with staging(files.report) as other:
        yield other.folder


def _written(
    files: PruneFiles,
    pruned: ir.Model,
    stage: Path,
    unfinished: Unfinished | None,
    progress: Progress,
) -> list[Path]:
    from graph_passes.files import storage

    compact = files.weights == "compact"
    size = storage.weight_bytes(pruned) if compact else 0
    with ByteCount.large(progress, f"write the weights of {files.target.name}", size) as count:
        return storage.write_files(
            *(pruned, stage, files.target.name, files.weights),
            told=count.add,
            unfinished=unfinished if compact else None,
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


def _report(
    target: str,
    passed: PassReport,
    verification: Verification,
    parse: EngineParse | None,
    made_from: dict[str, str],
) -> PruneReport:
    return PruneReport(
        made_from=made_from,
        target=target,
        deleted=[DeletedEntry.model_validate(_listed(entry)) for entry in passed.deleted],
        refused=[RefusedEntry.model_validate(asdict(entry)) for entry in passed.refused],
        before=GraphSizeEntry.model_validate(asdict(passed.before)),
        after=GraphSizeEntry.model_validate(asdict(passed.after)),
        verification=verification,
        engine=parse,
        kv_renumbering=passed.kv_renumbering,
    )


def _listed(entry: DeletedSublayer) -> dict[str, object]:
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in asdict(entry).items()
    }
