"""From an ONNX file to an engine and the record beside it."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from exporter.engine.check import refuse_without_driver
from exporter.engine.child import run_job
from exporter.engine.driver import ask_driver
from exporter.engine.flavours import FLAVOURS, Backend, Flavour
from exporter.engine.graph import GraphFacts, graph_facts
from exporter.engine.profiles import (
    Profile,
    Ranges,
    graph_inputs,
    phases_of,
    profile,
    refuse_unknown_axes,
)
from exporter.engine.settings import BuildSettings, ProfileEntry
from exporter.engine.sidecar import EngineRecord, EngineTensor, sidecar_path
from exporter.errors import EngineError, UsageError
from exporter.files import refuse_overwriting, sha256_file, sha256_files
from exporter.progress import QUIET, Progress
from graph_passes.files.placing import place, staging

_DEFAULT = BuildSettings()
_RANGES = Ranges()
_NEW_CACHE = "timing.cache"
_SHORT = {"attention": "attn", "cross_attention": "cross"}


def build_engine(
    onnx: Path,
    target: Path,
    profiles: Sequence[Profile],
    *,
    backend: Backend = "tensorrt-rtx",
    settings: BuildSettings = _DEFAULT,
    timing_cache: Path | None = None,
    label: str = "",
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
        label: Goes into the file's name, to tell the engines of one graph apart.
        progress: Who is told.

    Returns:
        The engine's path and its record.

    Raises:
        OnnxFileError: The graph can't be read.
        EngineError: The graph does not parse, or the builder refuses.
        UsageError: An option that this library has not, or the result would replace its source.
        MissingDependencyError: The library is not installed.
    """
    begin = time.perf_counter()
    flavour = FLAVOURS[backend]
    _refuse_foreign_options(flavour, settings, timing_cache)
    refuse_without_driver(flavour)
    _refuse_refit_without_driver(flavour, settings)
    facts = graph_facts(onnx)
    entries = [ProfileEntry.of(profile) for profile in profiles]
    in_folder = is_folder(target)
    sources = [onnx, *_weights(onnx)]
    if not in_folder:  # a build takes long: what can be refused is refused before it
        refuse_overwriting(_labelled(target, label), sources)
    with staging(target / "engine" if in_folder else target) as stage:
        built = stage / "engine"
        request = _request(onnx, built, settings, entries, timing_cache)
        with ThreadPoolExecutor(1) as pool:
            parents = pool.submit(_made_from, onnx)  # while the builder is at work
            result = run_job(flavour, request, progress, f"build with {backend}")
        _refuse_obstacles(onnx, flavour, result)
        path = _labelled(target, label)
        if in_folder:
            path = target / engine_name(onnx, flavour, result["version"], facts, settings, label)
        for each in (path, sidecar_path(path)):
            refuse_overwriting(each, sources)
        record = EngineRecord(
            made_from=parents.result(),
            engine=path.name,
            engine_bytes=built.stat().st_size,
            backend=backend,
            built_on=_this_card(),
            settings=settings,
            precision=facts.precision,
            plan=facts.plan,
            profiles=entries,
            timing_cache_sha256=_hash_of(stage / _NEW_CACHE),
            total_s=time.perf_counter() - begin,
            **_told(flavour, result),
        )
        sidecar = record.write(stage / "engine.json")
        moves = [(built, path), (sidecar, sidecar_path(path))]
        if timing_cache is not None:  # first: a cache without an engine does no harm
            _keep_cache(stage / _NEW_CACHE, timing_cache)
        place(moves)
    return path, record


def _request(
    onnx: Path,
    built: Path,
    settings: BuildSettings,
    entries: Sequence[ProfileEntry],
    timing_cache: Path | None,
) -> dict[str, Any]:
    """What the building process is asked for."""
    return {
        "job": "build",
        "onnx": str(onnx.absolute()),
        "engine": str(built.resolve()),
        "settings": settings.model_dump(),
        "profiles": [entry.model_dump() for entry in entries],
        "timing_cache": _cache_request(timing_cache, built.parent),
    }


def _told(flavour: Flavour, result: dict[str, Any]) -> dict[str, Any]:
    """What the building process says of the engine, as the record has it."""
    same = ("engine_sha256", "network_layers", "layers", "memory_bytes", "parse_s", "build_s")
    return {
        **{name: result[name] for name in same},
        "backend_version": result["version"],
        "inputs": [EngineTensor.model_validate(each) for each in result["inputs"]],
        "outputs": [EngineTensor.model_validate(each) for each in result["outputs"]],
        "reproducible": flavour.builds_without_gpu and result["fixed_addresses"],
    }


def build_engines(
    onnx: Path,
    target: Path,
    *,
    phases: Sequence[str] | None = None,
    split: bool = False,
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
        ranges: The sizes to serve.
        backend: Which library builds.
        settings: How.
        timing_cache: TensorRT's timing cache: read if it is there, written afterwards.
        progress: Who is told.

    Returns:
        Path and record of each engine.

    Raises:
        UsageError: The graph has no such phase or axis, or a size is not given.
        EngineError: As :func:`build_engine`.
    """
    inputs = graph_inputs(onnx)
    names = list(phases or phases_of(inputs))
    if len(set(names)) < len(names):
        raise UsageError(f"A phase is named twice: {', '.join(names)}.")
    refuse_unknown_axes(inputs, ranges)
    wanted = [profile(inputs, phase, ranges) for phase in names]
    groups = [[each] for each in wanted] if split else [wanted]
    return [
        build_engine(
            onnx,
            target,
            group,
            backend=backend,
            settings=settings,
            timing_cache=timing_cache,
            label=_label(target, group, split=split, whole=len(group) == len(phases_of(inputs))),
            progress=progress,
        )
        for group in groups
    ]


def _label(target: Path, group: Sequence[Profile], *, split: bool, whole: bool) -> str:
    """The phases, where an engine's name has to tell them; a name that was given stays."""
    tells = split or (is_folder(target) and not whole)
    return "+".join(profile.phase for profile in group) if tells else ""


def is_folder(target: Path) -> bool:
    """Whether an engine is to be named after what it is, in a folder."""
    return target.is_dir() or not target.suffix


def engine_name(
    onnx: Path,
    flavour: Flavour,
    version: str,
    facts: GraphFacts,
    settings: BuildSettings,
    label: str = "",
) -> str:
    """A file name that says what an engine is: ``smollm2-attn8-fp16-sm80-rtx1.7.1.engine``.

    Args:
        onnx: The graph's file; one that is called ``model.onnx`` gives its folder's name.
        flavour: The library.
        version: Its version, of which three numbers are told.
        facts: What the graph tells.
        settings: How it was built.
        label: What tells it from other engines of the graph.
    """
    stem = onnx.stem if onnx.stem != "model" else onnx.parent.resolve().name
    cuts = Counter(_SHORT.get(entry["kind"], entry["kind"]) for entry in facts.plan)
    cards = "+".join(settings.compute_capabilities) or _this_card().get("compute_capability", "")
    library = flavour.short + ".".join(version.split(".")[:3])
    parts = [stem, *(f"{kind}{count}" for kind, count in cuts.items()), facts.precision, label]
    return "-".join(filter(None, [*parts, cards, library])) + ".engine"


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
    for option, given in asked.items():
        if given:
            raise UsageError(
                f"{flavour.backend} has no {option}.", "Leave it out, or take the other --backend."
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


def _labelled(path: Path, label: str) -> Path:
    return path.with_name(f"{path.stem}-{label}{path.suffix}") if label else path


def _cache_request(timing_cache: Path | None, stage: Path) -> dict[str, str] | None:
    if timing_cache is None:
        return None
    return {"read": str(timing_cache.resolve()), "write": str((stage / _NEW_CACHE).resolve())}


def _keep_cache(new: Path, timing_cache: Path) -> None:
    """It may lie on another file system than the engine."""
    with staging(timing_cache) as stage:
        place([(shutil.copyfile(new, stage / "cache"), timing_cache)])


def _hash_of(path: Path) -> str | None:
    return sha256_file(path) if path.is_file() else None


def _weights(onnx: Path) -> list[Path]:
    from graph_passes.files.storage import data_files, load_model

    return data_files(load_model(onnx))


def _made_from(onnx: Path) -> dict[str, str]:
    hashes = {"model": sha256_file(onnx)}
    if weights := _weights(onnx):
        hashes["weights"] = sha256_files(weights, onnx.parent)
    return hashes


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
