"""Puts a graph's weights into an engine that was built without them, or for exchanging them.

Only a machine with a GPU can do it: both libraries deserialise the engine first. So what stands
here has not run in this project's CI; ``tests/gpu`` runs it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from exporter.engines.build.adapted import Adapted, adapt, read_graph
from exporter.engines.build.child import run_job
from exporter.engines.build.engine_set import EngineSet
from exporter.engines.build.graph import EngineSource, graph_hashes, read_source
from exporter.engines.build.libraries import LIBRARIES
from exporter.engines.build.logs import Listener
from exporter.engines.build.session import allow_host_code, deserialised, refuse_unready
from exporter.engines.build.sidecar import EngineRecord, read_sidecar, sidecar_path
from exporter.errors import EngineError, UsageError
from exporter.files import refuse_overwriting, sha256_file, write_through
from exporter.progress import QUIET, Progress
from graph_passes.files.placing import staging


def refit_engine(
    engine: Path, onnx: Path, target: Path, *, progress: Progress = QUIET
) -> tuple[Path, EngineRecord]:
    """Writes an engine with the weights of a graph; it appears with its record, or not at all.

    A refit that leaves weights out can succeed without a word (pytorch/TensorRT #3255 tells of
    zeros): so what is missing is asked for, and the result is to be held against ONNX Runtime, as
    ``depthcut compare`` does with every engine that runs.

    Args:
        engine: Built with ``--refittable``; or with ``--strip-weights`` alone, whose weights must
            then be those that it was built from: others are undefined behaviour.
        onnx: A graph with the engine's structure.
        target: The new engine's file.
        progress: Where progress is shown.

    Returns:
        The new engine's path and its record.

    Raises:
        EngineError: The engine takes no weights, or not this graph's.
        BackendError: There is no driver or no GPU.
        OnnxFileError: The graph can't be read.
        UsageError: The result would replace what it is made from.
        MissingDependencyError: The library is not installed.
    """
    record, source = read_sidecar(engine), read_source(onnx)
    _refuse_foreign_weights(engine, record, onnx, source)
    engines = EngineSet((engine,), (record,))
    if target.is_dir():
        raise UsageError(f"{target} is a folder.", "Name the new engine's file.")
    for each in (target, sidecar_path(target)):
        refuse_overwriting(each, [engine, sidecar_path(engine), onnx, *source.weights])
    refuse_unready(engines)
    with staging(target) as staged:
        built = staged.folder / "engine"
        graph = _as_built(onnx, record).write(staged.folder / "graph.onnx")
        paths = {"engine": engine, "onnx": onnx, "graph": graph or onnx, "target": built}
        request = {"job": "refit", **{name: str(path.absolute()) for name, path in paths.items()}}
        run_job(engines.library, request, progress, f"refit with {record.backend}")
        changes = {"engine": target.name, "made_from": graph_hashes(onnx, source)}
        refitted = record.model_copy(update={**changes, **_filled(record, built)})
        record_file = refitted.write(staged.folder / "engine.json")
        staged.place([(record_file, sidecar_path(target)), (built, target)])
    return target, refitted


def _filled(record: EngineRecord, engine: Path) -> dict[str, object]:
    """What a record says of an engine that has its weights."""
    return {
        "engine_sha256": sha256_file(engine),
        "engine_bytes": engine.stat().st_size,
        "settings": replace(record.settings, strip_weights=False),
    }


def _as_built(onnx: Path, record: EngineRecord) -> Adapted:
    """The graph as it was changed for an engine."""
    has_lengths = LIBRARIES[record.backend].has_lengths(record.backend_version)
    return adapt(read_graph(onnx), record.settings, record.phases, has_lengths=has_lengths)


def write_refitted(engine: Path, onnx: Path, graph: Path, target: Path) -> None:
    """What the child process does. The engine was held against its record before.

    Args:
        engine: The engine.
        onnx: The ONNX file, beside which its weights lie.
        graph: The graph that is read in its place.
        target: The new engine.

    Raises:
        BackendError: There is no driver or no GPU.
        EngineError: The engine doesn't load, or doesn't take the weights.
    """
    record = EngineRecord.read(sidecar_path(engine), named=False)
    module, _ = refuse_unready(EngineSet((engine,), (record,)))
    listener = Listener(module)
    runtime = module.Runtime(listener.log)
    allow_host_code(runtime, record)
    loaded = deserialised(module, runtime, listener, engine)
    refitter = module.Refitter(loaded, listener.log)
    parser = module.OnnxParserRefitter(refitter, listener.log)
    if not parser.refit_from_bytes(graph.read_bytes(), str(onnx)):
        raise _not_taken(engine, onnx, _first_error(parser) or listener.last_error())
    if missing := refitter.get_missing_weights():
        raise _not_taken(
            engine, onnx, f"{len(missing)} weights are not in it, {missing[0]!r} first"
        )
    if not refitter.refit_cuda_engine():
        raise _not_taken(engine, onnx, listener.last_error())
    saving = loaded.create_serialization_config()
    saving.clear_flag(module.SerializationFlag.EXCLUDE_WEIGHTS)  # set for a stripped engine
    if record.settings.refittable:  # or it were so no longer, and its record untrue
        saving.set_flag(module.SerializationFlag.INCLUDE_REFIT)
    content = loaded.serialize_with_config(saving)
    if content is None:
        raise _not_taken(engine, onnx, listener.last_error())
    write_through(target, memoryview(content))


def _first_error(parser: Any) -> str:
    return str(parser.get_error(0).desc()) if parser.num_errors else ""


def _not_taken(engine: Path, onnx: Path, reason: str) -> EngineError:
    return EngineError(
        f"{engine} does not take the weights of {onnx}: {reason}.",
        "Build an engine from that graph.",
    )


def _refuse_foreign_weights(
    engine: Path, record: EngineRecord, onnx: Path, source: EngineSource
) -> None:
    if not (record.settings.refittable or record.settings.strip_weights):
        raise EngineError(
            f"{engine} was built with its weights fixed.",
            "Build it with --refittable or --strip-weights.",
            code="weights-fixed",
        )
    if not record.settings.refittable and graph_hashes(onnx, source) != record.made_from:
        raise EngineError(
            f"{engine} was built with --strip-weights alone: it takes back the weights that it was "
            f"built from, and {onnx} is another graph or has other weights.",
            "Refit it with the graph that it was built from, or build it with --refittable.",
            code="other-weights",
        )
    if source.plan != record.plan:
        raise EngineError(
            f"Other sublayers were cut from {onnx} than from the graph of {engine}.",
            "Refit it with the graph that it was built from, or one cut by the same plan.",
            code="other-sublayers",
        )
