"""From an ONNX file to an engine and the record beside it."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from exporter.engine.check import refuse_without_driver
from exporter.engine.child import Job
from exporter.engine.driver import ask_driver
from exporter.engine.flavours import FLAVOURS, Backend, Flavour
from exporter.engine.graph import GraphFacts, graph_facts, graph_hashes
from exporter.engine.naming import Marks, engine_name, is_folder, phase_mark, with_marks
from exporter.engine.profiles import (
    GraphTensor,
    Profile,
    Ranges,
    phases_of,
    profile,
    refuse_unknown_axes,
)
from exporter.engine.settings import BuildSettings, ProfileEntry
from exporter.engine.sidecar import EngineRecord, EngineTensor, sidecar_path
from exporter.errors import EngineError, UsageError
from exporter.files import refuse_overwriting, sha256_file
from exporter.progress import QUIET, Progress
from exporter.scratch import scratch_folder
from graph_passes.files.placing import staging

_DEFAULT = BuildSettings()
_RANGES = Ranges()
_UNMARKED = Marks()
_NEW_CACHE = "timing.cache"


def build_engine(
    onnx: Path,
    target: Path,
    profiles: Sequence[Profile],
    *,
    backend: Backend = "tensorrt-rtx",
    settings: BuildSettings = _DEFAULT,
    timing_cache: Path | None = None,
    marks: Marks = _UNMARKED,
    progress: Progress = QUIET,
) -> tuple[Path, EngineRecord]:
    """Builds an engine. It appears with its record, or not at all.

    The builder runs in a process of its own. Precision comes from the graph: the network is
    strongly typed.

    Args:
        onnx: The ONNX file.
        target: The engine's file; a folder gets one that is named after what it is.
        profiles: The shapes to serve, one optimisation profile each.
        backend: Which library builds it.
        settings: How.
        timing_cache: TensorRT's timing cache: read if it is there, written afterwards.
        marks: Go into the file's name, to tell the engines of one graph apart.
        progress: Who is told.

    Returns:
        The engine's path and its record.

    Raises:
        OnnxFileError: The graph can't be read.
        EngineError: The graph does not parse, or the builder refuses.
        UsageError: An option that this library has not, or the result would replace its source.
        MissingDependencyError: The library is not installed.
    """
    order = _Order(onnx, FLAVOURS[backend], settings, timing_cache, progress)
    refuse_unbuildable(backend, settings, timing_cache)
    with order.job() as job:
        return _build(order, job, target, profiles, marks)


def refuse_unbuildable(
    backend: Backend, settings: BuildSettings, timing_cache: Path | None = None
) -> None:
    """Refuses what can be told without a graph: a build takes long.

    Args:
        backend: Which library is to build.
        settings: How.
        timing_cache: TensorRT's timing cache.

    Raises:
        EngineError: It can't build here.
        UsageError: An option that this library has not.
    """
    flavour = FLAVOURS[backend]
    _refuse_foreign_options(flavour, settings, timing_cache)
    refuse_without_driver(flavour)
    _refuse_refit_without_driver(flavour, settings)


@dataclass(frozen=True)
class _Order:
    """What the builds of one graph have in common; the graph is read and hashed once."""

    onnx: Path
    flavour: Flavour
    settings: BuildSettings
    timing_cache: Path | None
    progress: Progress

    @cached_property
    def facts(self) -> GraphFacts:
        return graph_facts(self.onnx)

    @cached_property
    def sources(self) -> list[Path]:
        return [self.onnx, *self.facts.weights]

    @cached_property
    def made_from(self) -> dict[str, str]:
        return graph_hashes(self.onnx, self.facts)

    def job(self) -> Job:
        """A process that begins with reading the graph, while it is read here too."""
        return Job(self.flavour, {"job": "build", "onnx": str(self.onnx.absolute())})


def _build(
    order: _Order, job: Job, target: Path, profiles: Sequence[Profile], marks: Marks
) -> tuple[Path, EngineRecord]:
    """What :func:`build_engine` does, by a process that has begun."""
    onnx, flavour, settings = order.onnx, order.flavour, order.settings
    entries = [ProfileEntry.of(profile) for profile in profiles]
    in_folder = is_folder(target)
    if not in_folder:
        refuse_overwriting(with_marks(target, marks), order.sources)
    with staging(with_marks(target / "engine" if in_folder else target, marks)) as staged:
        stage = staged.folder
        built = stage / "engine"
        request = _request(built, settings, entries, order.timing_cache)
        with ThreadPoolExecutor(1) as pool:
            parents = pool.submit(lambda: order.made_from)  # while the builder is at work
            phases = " and ".join(entry.phase for entry in entries)
            result = job.finish(request, order.progress, f"build {phases} with {flavour.backend}")
        _refuse_obstacles(onnx, flavour, result)
        path = with_marks(target, marks)
        if in_folder:
            name = engine_name(onnx, flavour, result["version"], order.facts, settings, marks)
            path = target / name
        for each in (path, sidecar_path(path)):
            refuse_overwriting(each, order.sources)
        record = EngineRecord(
            made_from=parents.result(),
            engine=path.name,
            engine_bytes=built.stat().st_size,
            backend=flavour.backend,
            built_on=_this_card(),
            settings=settings,
            precision=order.facts.precision,
            plan=order.facts.plan,
            profiles=entries,
            timing_cache_sha256=_hash_of(stage / _NEW_CACHE),
            total_s=time.perf_counter() - job.begin,
            **_told(result),
        )
        sidecar = record.write(stage / "engine.json")
        moves = [(sidecar, sidecar_path(path)), (built, path)]
        if order.timing_cache is not None:  # first: a cache without an engine does no harm
            _keep_cache(stage / _NEW_CACHE, order.timing_cache)
        staged.place(moves)
    return path, record


def _request(
    built: Path,
    settings: BuildSettings,
    entries: Sequence[ProfileEntry],
    timing_cache: Path | None,
) -> dict[str, Any]:
    """What the building process is told when the graph was read here."""
    return {
        "engine": str(built.resolve()),
        "settings": settings.model_dump(),
        "profiles": [entry.model_dump() for entry in entries],
        "timing_cache": _cache_request(timing_cache, built.parent),
    }


def _told(result: dict[str, Any]) -> dict[str, Any]:
    """What the building process says of the engine, as the record has it."""
    same = (
        "engine_sha256", "network_layers", "layers", "memory_bytes", "fixed_addresses", "parse_s",
        "build_s",
    )  # fmt: skip
    return {
        **{name: result[name] for name in same},
        "backend_version": result["version"],
        "inputs": [EngineTensor.model_validate(each) for each in result["inputs"]],
        "outputs": [EngineTensor.model_validate(each) for each in result["outputs"]],
    }


def build_engines(
    onnx: Path,
    target: Path,
    *,
    phases: Sequence[str] | None = None,
    split: bool = False,
    builds: int = 1,
    ranges: Ranges = _RANGES,
    backend: Backend = "tensorrt-rtx",
    settings: BuildSettings = _DEFAULT,
    timing_cache: Path | None = None,
    progress: Progress = QUIET,
) -> list[tuple[Path, EngineRecord]]:
    """Builds one engine with a profile for each phase, or an engine for each.

    Args:
        onnx: The ONNX file.
        target: The engine's file or folder; with ``split``, the phase's name is put in.
        phases: Which of ``prefill``, ``decode`` and ``encode``; all that the graph has when None.
        split: An engine for each phase.
        builds: How many of each, named ``-b1``, ``-b2`` and so on when several: builds may differ,
            so one build of each arm is a thin ground for a comparison. TensorRT's share a timing
            cache, ``timing_cache`` or one for the occasion.
        ranges: The sizes to serve.
        backend: Which library builds.
        settings: How.
        timing_cache: TensorRT's timing cache: read if it is there, written afterwards.
        progress: Who is told.

    Returns:
        Path and record of each engine, the builds of one beside each other.

    Raises:
        UsageError: The graph has no such phase or axis, or a size is not given.
        EngineError: As :func:`build_engine`.
    """
    order = _Order(onnx, FLAVOURS[backend], settings, timing_cache, progress)
    refuse_unbuildable(backend, settings, timing_cache)
    numbers = [f"b{number + 1}" for number in range(builds)] if builds > 1 else [""]
    done: list[tuple[Path, EngineRecord]] = []
    with _pinned(order, builds) as pinned, contextlib.ExitStack() as jobs:
        job = jobs.enter_context(order.job())
        groups = _groups(order.facts.inputs, phases, ranges, split=split)
        whole = len(groups[0]) == len(phases_of(order.facts.inputs))
        for group, number in itertools.product(groups, numbers):
            marks = Marks(phase_mark(target, group, split=split, whole=whole), number)
            if done:
                jobs.close()
                job = jobs.enter_context(order.job())
            done.append(_build(pinned, job, target, group, marks))
    return done


def _groups(
    inputs: Sequence[GraphTensor], phases: Sequence[str] | None, ranges: Ranges, *, split: bool
) -> list[list[Profile]]:
    """The profiles of each engine."""
    names = list(phases or phases_of(inputs))
    if len(set(names)) < len(names):
        raise UsageError(f"A phase is named twice: {', '.join(names)}.")
    refuse_unknown_axes(inputs, ranges)
    wanted = [profile(inputs, phase, ranges) for phase in names]
    return [[each] for each in wanted] if split else [wanted]


@contextlib.contextmanager
def _pinned(order: _Order, builds: int) -> Iterator[_Order]:
    """The order with a timing cache, where several builds need one to be alike."""
    if builds < 2 or order.timing_cache is not None or not order.flavour.has_timing_cache:
        yield order
        return
    with scratch_folder("timing-cache") as folder:
        yield replace(order, timing_cache=folder / _NEW_CACHE)


def _refuse_foreign_options(
    flavour: Flavour, settings: BuildSettings, timing_cache: Path | None
) -> None:
    if flavour.builds_without_gpu:
        # Measured with 1.7: the builder fails deep inside, for want of a driver or a lean runtime.
        asked = {
            "--hardware-compatibility": settings.hardware_compatibility != "none",
            "--version-compatible": settings.version_compatible,
            "--timing-cache": timing_cache is not None,
        }
    else:
        asked = {"--compute-capability": bool(settings.compute_capabilities)}
    other = next(name for name in FLAVOURS if name != flavour.backend)
    for option, given in asked.items():
        if given:
            raise UsageError(
                f"{flavour.backend} has no {option}.", f"Leave it out, or build with {other}."
            )


def _refuse_refit_without_driver(flavour: Flavour, settings: BuildSettings) -> None:
    """Measured with 1.7: the builder dies inside where a refittable engine needs a driver."""
    asked = {"--strip-weights": settings.strip_weights, "--refittable": settings.refittable}
    option = next((name for name, given in asked.items() if given), None)
    if option and (problem := ask_driver().problem):
        raise EngineError(
            f"{flavour.backend} builds with {option} only where a GPU is: {problem}.",
            "Leave it out, or build on a machine with a card.",
        )


def _refuse_obstacles(onnx: Path, flavour: Flavour, result: dict[str, Any]) -> None:
    if result["obstacles"]:
        first = result["obstacles"][0]
        where = f"at node {first['node']!r} ({first['operator']}): " if first["node"] else ""
        raise EngineError(
            f"{onnx} does not parse in {flavour.backend} {result['version']}: "
            f"{where}{first['reason']}.",
            f"depthcut check-engine {onnx} lists what else is in the way, and ways out.",
        )


def _cache_request(timing_cache: Path | None, stage: Path) -> dict[str, str] | None:
    if timing_cache is None:
        return None
    return {"read": str(timing_cache.resolve()), "write": str((stage / _NEW_CACHE).resolve())}


def _keep_cache(new: Path, timing_cache: Path) -> None:
    """It may lie on another file system than the engine."""
    with staging(timing_cache) as staged:
        staged.place([(shutil.copyfile(new, staged.folder / "cache"), timing_cache)])


def _hash_of(path: Path) -> str | None:
    return sha256_file(path) if path.is_file() else None


def _this_card() -> dict[str, str]:
    driver = ask_driver()
    if driver.problem:
        return {}
    card = driver.devices[0]
    return {
        "gpu": card.name,
        "compute_capability": card.compute_capability,
        "driver_cuda": driver.cuda_version,
    }
