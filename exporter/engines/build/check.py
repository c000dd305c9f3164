"""Asks the parser whether it takes a graph, before and after a cut."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from exporter.artifacts import EngineParse
from exporter.engines.build.build import ignored_inputs
from exporter.engines.build.child import run_job
from exporter.engines.build.libraries import LIBRARIES, Backend, refuse_unbuildable
from exporter.engines.build.network import Obstacle
from exporter.errors import EngineError, VerificationError
from exporter.progress import QUIET, Progress
from graph_passes.files.storage import load_model

_TOLD = 5

ParserCheck = Callable[[Path, Path], EngineParse | None]
"""Is given source and result; raises where the source parses and the result does not."""


@dataclass(frozen=True)
class EngineCheck:
    """What the parser says of a graph."""

    backend: str
    version: str
    obstacles: tuple[Obstacle, ...]

    @property
    def name(self) -> str:
        """The library and its version."""
        return f"{self.backend} {self.version}"


def check_engine(
    onnx: Path, *, backend: Backend = "tensorrt-rtx", progress: Progress = QUIET
) -> EngineCheck:
    """Asks a library's parser about a graph; nothing is built."""
    refuse_unbuildable(backend)
    library = LIBRARIES[backend]
    request = {"job": "check", "onnx": str(onnx.absolute())}
    result = run_job(library, request, progress, f"check for {backend}")
    obstacles = [Obstacle(**obstacle) for obstacle in result["obstacles"]]
    obstacles = obstacles or ignored_inputs(load_model(onnx))
    return EngineCheck(backend, result["version"], tuple(obstacles))


def engine_gate(backend: Backend = "tensorrt-rtx", progress: Progress = QUIET) -> ParserCheck:
    """What :func:`exporter.cut.surgery.prune_file` takes as ``engine_check``.

    The graph before the cut is asked about only where the cut one does not parse: a cut that broke
    it is a failure, a graph that never parsed is told.
    """

    def asked(source: Path, candidate: Path) -> EngineParse:
        after = check_engine(candidate, backend=backend, progress=progress)
        if not after.obstacles:
            return EngineParse(backend=backend, version=after.version, parsed=True)
        before = check_engine(source, backend=backend, progress=progress)
        if not before.obstacles:
            raise VerificationError(
                f"{after.name} parses {source.name}, but not the pruned graph: "
                f"{after.obstacles[0]}. The result is not kept.",
                "The graph may be cut in a way that its engine can't take: leave that sublayer.",
                code="not-parsed",
            )
        progress.say(
            f"{after.name} takes the graph neither before the cut nor after: {after.obstacles[0]}"
        )
        return EngineParse(
            backend=backend,
            version=after.version,
            parsed=False,
            reasons=[str(obstacle) for obstacle in after.obstacles[:_TOLD]],
        )

    return asked


def gate_where_installed(progress: Progress) -> ParserCheck | None:
    """The same with TensorRT-RTX, for whom nobody asked: None where it is not installed.

    Where it is but can't be asked, that is told and no reason to fail.
    """
    if importlib.util.find_spec(LIBRARIES["tensorrt-rtx"].module) is None:
        return None
    gate = engine_gate("tensorrt-rtx", progress)

    def asked(source: Path, candidate: Path) -> EngineParse | None:
        try:
            return gate(source, candidate)
        except EngineError as error:
            progress.say(f"tensorrt-rtx was not asked about the result: {error.message}")
            return None

    return asked
