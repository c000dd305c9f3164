"""Holds cut graphs to what an engine's parser took before the cut."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

from exporter.artifacts import EngineParse
from exporter.engine.check import EngineCheck, Finding, check_engine
from exporter.engine.flavours import FLAVOURS, Backend
from exporter.errors import EngineError, VerificationError
from exporter.progress import QUIET, Progress

_TOLD = 5

ParserCheck = Callable[[Path, Path], EngineParse | None]
"""Is given source and result; raises where the source parses and the result does not."""


def engine_gate(backend: Backend = "tensorrt-rtx", progress: Progress = QUIET) -> ParserCheck:
    """What :func:`exporter.surgery.prune_file` takes as ``engine_check``.

    The graph before the cut is asked about only where the cut one does not parse: a cut that broke
    it is a failure, a graph that never parsed is told.

    Args:
        backend: Which library to ask.
        progress: Who is told.
    """

    def asked(source: Path, candidate: Path) -> EngineParse:
        after = check_engine(candidate, backend=backend, progress=progress)
        if not after.findings:
            return EngineParse(backend=backend, version=after.version, parsed=True)
        before = check_engine(source, backend=backend, progress=progress)
        if not before.findings:
            raise VerificationError(
                f"{_name(after)} parses {source.name}, but not what the cut leaves of it: "
                f"{_told(after.findings[0])}. The result is not kept.",
                "The graph may be cut in a way that its engine can't take: leave that sublayer.",
            )
        progress.say(
            f"{_name(after)} takes the graph neither before the cut nor after: "
            f"{_told(after.findings[0])}; depthcut check-engine lists all."
        )
        return EngineParse(
            backend=backend,
            version=after.version,
            parsed=False,
            parsed_before=False,
            reasons=[_told(finding) for finding in after.findings[:_TOLD]],
        )

    return asked


def gate_where_installed(progress: Progress) -> ParserCheck | None:
    """The same with TensorRT-RTX, for whom nobody asked: None where it is not installed.

    Where it is but can't be asked, that is told and no reason to fail.

    Args:
        progress: Who is told.
    """
    if importlib.util.find_spec(FLAVOURS["tensorrt-rtx"].module) is None:
        return None
    gate = engine_gate("tensorrt-rtx", progress)

    def asked(source: Path, candidate: Path) -> EngineParse | None:
        try:
            return gate(source, candidate)
        except EngineError as error:
            progress.say(f"tensorrt-rtx was not asked about the result: {error.message}")
            return None

    return asked


def _name(check: EngineCheck) -> str:
    return f"{check.backend} {check.version}"


def _told(finding: Finding) -> str:
    where = f"node {finding.node!r} ({finding.operator}): " if finding.node else ""
    return f"{where}{finding.reason.rstrip('.')}"
