"""Asks the parser whether it takes a graph, before and after a cut."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

from exporter.artifacts import EngineParse
from exporter.engines.build.build import ignored_inputs
from exporter.engines.build.child import run_job
from exporter.engines.build.libraries import LIBRARIES, Backend, refuse_unbuildable
from exporter.engines.build.logs import Obstacle
from exporter.errors import EngineError, VerificationError
from exporter.progress import QUIET, Progress
from graph_passes.files.storage import load_model

_MOST_REASONS = 5

ParserCheck = Callable[[Path, Path], EngineParse | None]
"""Is given source and result; raises where the source parses and the result does not."""


def check_engine(
    onnx: Path, *, backend: Backend = "tensorrt-rtx", progress: Progress = QUIET
) -> EngineParse:
    """Asks a library's parser about a graph; nothing is built."""
    refuse_unbuildable(backend)
    request = {"job": "check", "onnx": str(onnx.absolute())}
    result = run_job(LIBRARIES[backend], request, progress, f"check for {backend}")
    obstacles = [Obstacle(**obstacle) for obstacle in result["obstacles"]]
    obstacles = obstacles or ignored_inputs(load_model(onnx))
    return EngineParse(
        backend=backend,
        version=result["version"],
        parsed=not obstacles,
        reasons=[str(obstacle) for obstacle in obstacles[:_MOST_REASONS]],
    )


def engine_gate(backend: Backend = "tensorrt-rtx", progress: Progress = QUIET) -> ParserCheck:
    """What :func:`exporter.cut.surgery.prune_file` takes as ``engine_check``.

    The graph before the cut is asked about only where the cut one does not parse: a cut that broke
    it is a failure, a graph that never parsed is told.
    """

    def gate(source: Path, candidate: Path) -> EngineParse:
        after = check_engine(candidate, backend=backend, progress=progress)
        if after.parsed:
            return after
        name = f"{backend} {after.version}"
        if check_engine(source, backend=backend, progress=progress).parsed:
            raise VerificationError(
                f"{name} parses {source.name}, but not the pruned graph: {after.reasons[0]}. The "
                "result is not kept.",
                "The graph may be cut in a way that its engine can't take: leave that sublayer.",
                code="not-parsed",
            )
        progress.say(f"{name} takes the graph neither before the cut nor after: {after.reasons[0]}")
        return after

    return gate


def gate_where_installed(progress: Progress) -> ParserCheck | None:
    """The same with TensorRT-RTX, for whom nobody asked: None where it is not installed.

    Where it is but can't be asked, that is told and no reason to fail.
    """
    if importlib.util.find_spec(LIBRARIES["tensorrt-rtx"].module) is None:
        return None
    gate = engine_gate("tensorrt-rtx", progress)

    def lenient(source: Path, candidate: Path) -> EngineParse | None:
        try:
            return gate(source, candidate)
        except EngineError as error:
            progress.say(f"tensorrt-rtx was not asked about the result: {error.message}")
            return None

    return lenient
