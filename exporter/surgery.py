"""ONNX file and plan in, ONNX file out. Needs no PyTorch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from threading import Thread
from typing import Literal

from exporter.artifacts import (
    DeletedEntry,
    GraphSizeEntry,
    PlannedDeletion,
    PruneReport,
    RefusedEntry,
    Verification,
)
from exporter.errors import ArtifactError, MissingDependencyError, SurgeryError
from exporter.files import sha256_file, sha256_files
from exporter.genai_result import GenaiResult
from exporter.optional import require
from exporter.oracle_setting import DEFAULT_LIMIT_BYTES, choose
from exporter.progress import QUIET, Progress
from exporter.replacement_file import Replacements
from graph_passes.types import (
    DeletedSublayer,
    Deletion,
    PassReport,
    Refusal,
    ResidualSite,
)

NOT_VERIFIED = Verification(method="none", runs=0, max_abs_error=None, tolerance=None, passed=None)


def inspect_file(path: Path) -> list[ResidualSite | Refusal]:
    """Lists what could be cut out of an ONNX file, and what not, and why.

    Args:
        path: The ONNX file; its weights are not read.

    Raises:
        OnnxFileError: The file or its external data can't be read safely.
    """
    from graph_passes import find_sites
    from graph_passes.storage import load_model

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
    genai_config: Literal["rewrite", "none"] = "rewrite",
    report_path: Path | None = None,
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
            (see :func:`exporter.oracle.verify_candidate`), and so are those for which there isn't
            memory enough; the report says so.
        weights: ``compact`` writes ``<target>.data`` with the weights that are left; ``share``
            points into the source's data file, which must be in the same folder; only what
            replacements bring goes into the graph, or if it is large into ``<target>.data``.
        renumber_kv: Gives the caches that are left dense numbers.
        keep_debug: Keeps the exporter's notes, which may hold local paths.
        genai_config: ``rewrite`` a config beside the source for the result, or ``none``.
        report_path: Where the report goes, in place of an earlier file; by default ``prune.json``
            beside the target, if no other model's report stands there.
        progress: Who is told.

    Returns:
        The report, as written.

    Raises:
        OnnxFileError: The source can't be read, or the target not written.
        SurgeryError: The graph can't be cut as asked, or its ``genai_config.json`` not rewritten.
        VerificationError: The result doesn't compute what it should, or too little memory is free
            to tell.
        MissingDependencyError: Verification without ONNX Runtime.
    """
    from graph_passes import prune_graph, storage
    from graph_passes.placing import place, staging

    if verify == "oracle":
        _require_runtime()
    report_path = _report_path(target, report_path)
    model = storage.load_model(source)
    data = storage.data_files(model)
    brings_weights = replacements is not None
    own_weights = [storage.data_path(target)] if weights == "compact" or brings_weights else []
    parents = [source, *data, *([replacements.path] if replacements else [])]
    genai = GenaiResult.beside(source, target) if genai_config == "rewrite" else None
    configs = [genai.target] if genai else []
    _refuse_overwriting(parents, [target, report_path, *own_weights, *configs])
    storage.refuse_collision(model, target, weights, brings_weights=brings_weights)
    numbers = replacements.tensors if replacements else {}
    setting = choose(model, verify_limit_bytes) if verify == "oracle" else None
    hashes = _SourceHashes(source, data if weights == "compact" else [])
    asked = [Deletion(d.layer, d.kind, d.replacement) for d in deletions]
    pruned, passed = prune_graph(
        model, asked, replacements=numbers, renumber_kv=renumber_kv, keep_debug=keep_debug
    )
    progress.detail(f"surgery: {passed.before.nodes} -> {passed.after.nodes} nodes")
    config_text = genai.text(model, passed) if genai else None
    try:
        with staging(target) as stage, staging(report_path) as report_stage:
            files = storage.write_files(pruned, stage, target.name, weights)
            verification = NOT_VERIFIED
            if setting is not None:
                from exporter.oracle import Candidate, verify_candidate

                folder = stage if weights == "compact" else source.parent
                candidate = Candidate(stage / target.name, folder, passed)
                verification = verify_candidate(
                    model, source.parent, asked, candidate, progress, numbers, setting
                )
            made_from = hashes.made_from(plan_sha256, replacements)
            report = _report(target.name, passed, verification, made_from)
            staged = report.write(report_stage / report_path.name)
            moves = [(file, target.parent / file.name) for file in files]
            if genai and config_text is not None:
                (stage / genai.target.name).write_text(config_text, encoding="utf-8")
                moves.append((stage / genai.target.name, genai.target))
            stale = storage.stale_data(pruned, target, files)
            place([*moves, (staged, report_path)], [(file, stage) for file in stale])
    except OSError as error:
        raise storage.write_error(target, error) from error
    if genai:
        progress.say(genai.advice([source, *data, target, *own_weights, report_path]))
    return report


def _require_runtime() -> None:
    """Looks for ONNX Runtime before any work is done."""
    try:
        require("onnxruntime", extra="cpu")
    except MissingDependencyError as error:
        hint = f"{error.hint}; or leave the check of the result out: --verify none"
        raise MissingDependencyError(error.message, hint) from error


def _report_path(target: Path, asked: Path | None) -> Path:
    for file in (target, asked):
        if file is not None and (not file.name or file.is_dir()):
            raise SurgeryError(f"{file} is a folder.", "Name a file in it, such as pruned.onnx.")
    if asked is not None:
        return asked
    path = target.with_name("prune.json")
    if path.exists():
        _refuse_foreign_report(path, target.name)
    return path


def _refuse_foreign_report(path: Path, target: str) -> None:
    hint = "Name another file for the report (--report), or write the result to another folder."
    try:
        described = PruneReport.read(path).target
    except ArtifactError as error:
        raise SurgeryError(f"{path} is there already and is no report of a cut.", hint) from error
    if described not in ("", target) and (path.parent / described).exists():
        raise SurgeryError(f"{path} is the report of {described}.", hint)


def _refuse_overwriting(sources: Sequence[Path], targets: Sequence[Path]) -> None:
    for target in targets:
        if any(_same_file(target, source) for source in sources):
            raise SurgeryError(
                f"{target} is the source or holds its weights; the source is never changed.",
                "Write the result under another name.",
            )
    for one, other in itertools.combinations(targets, 2):
        if _same_file(one, other):
            raise SurgeryError(
                f"The result, its weights and its report need a file each, but two are {one}.",
                "Write the result or the report under another name.",
            )


def _same_file(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve() or (
        one.exists() and other.exists() and one.samefile(other)
    )


class _SourceHashes:
    """Hashes the source's files while the surgery goes on; abandoned when it fails.

    With shared weights the data files aren't hashed: the result points to the very same ones,
    and reading them would take longer than everything else.
    """

    def __init__(self, source: Path, data: Sequence[Path]) -> None:
        self._graph = sha256_file(source)
        self._weights: Future[str] | None = None
        if data:
            self._weights = Future()
            arguments = (self._weights, data, source.parent)
            Thread(target=_hash_into, args=arguments, daemon=True).start()

    def made_from(
        self, plan_sha256: str | None, replacements: Replacements | None
    ) -> dict[str, str]:
        """Role to hash; waits for the weights' hash."""
        parents = {"model": self._graph}
        if self._weights is not None:
            parents["weights"] = self._weights.result()
        if plan_sha256 is not None:
            parents["plan"] = plan_sha256
        if replacements is not None:
            parents["replacements"] = replacements.sha256
        return parents


def _hash_into(future: Future[str], files: Sequence[Path], root: Path) -> None:
    try:
        future.set_result(sha256_files(files, root))
    except BaseException as error:  # handed to the one who waits
        future.set_exception(error)


def _report(
    target: str, passed: PassReport, verification: Verification, made_from: dict[str, str]
) -> PruneReport:
    return PruneReport(
        made_from=made_from,
        target=target,
        deleted=[DeletedEntry.model_validate(_listed(entry)) for entry in passed.deleted],
        refused=[RefusedEntry.model_validate(asdict(entry)) for entry in passed.refused],
        before=GraphSizeEntry.model_validate(asdict(passed.before)),
        after=GraphSizeEntry.model_validate(asdict(passed.after)),
        verification=verification,
        kv_renumbering=passed.kv_renumbering,
    )


def _listed(entry: DeletedSublayer) -> dict[str, object]:
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in asdict(entry).items()
    }
