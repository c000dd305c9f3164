"""Loads and runs engines once in a process of its own, where a crash can be caught."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from exporter.engine.buffers import plan_buffers
from exporter.engine.child import run_job
from exporter.engine.engine_set import EngineSet
from exporter.engine.guard import refuse_unready
from exporter.engine.session import Lane, Session
from exporter.engine.sidecar import EngineRecord, sidecar_path
from exporter.engine.tensors import byte_count, numpy_dtype
from exporter.errors import EngineError
from exporter.progress import QUIET


def try_engines(engines: EngineSet) -> None:
    """Runs each profile once at its smallest shapes, in a child process.

    An engine that is broken inside, or a card that the library doesn't serve, can end the process
    that loads it. Then it is this one.

    Raises:
        BackendError: There is no driver or no GPU.
        EngineError: The engines don't load or run; also when that process crashes.
    """
    refuse_unready(engines)
    request = {"job": "try", "engines": [str(path.resolve()) for path in engines.paths]}
    try:
        run_job(engines.flavour, request, QUIET, "try the engine")
    except EngineError as error:
        raise EngineError(f"{engines.name} can't be run: {error.message}", error.hint) from error


def run_once(paths: list[Path]) -> dict[str, Any]:
    """What the child process does. The files were held against their records before.

    Raises:
        BackendError: As :class:`exporter.engine.session.Session`.
        EngineError: Likewise.
    """
    records = tuple(EngineRecord.read(sidecar_path(path)) for path in paths)
    engines = EngineSet(tuple(paths), records)
    with Session(engines, fixed_shapes=False) as session:
        for lane in session.lanes:
            _run_smallest(session, lane)
        return {"card": session.card}


def _run_smallest(session: Session, lane: Lane) -> None:
    shapes = session.engines.shapes(lane.slot, "low")
    lane.set_shapes(shapes)
    every = {
        **shapes,
        **{each.name: lane.output_shape(each.name) for each in session.engines.outputs},
    }
    buffers = {}
    for name, size in plan_buffers([_sizes(session.engines, every)]).items():
        if name not in lane.aliases:
            buffers[name] = session.cuda.allocate(size, name)
            session.cuda.upload(buffers[name], np.zeros(size, np.uint8))
    for name in every:
        lane.bind(name, buffers[lane.aliases.get(name, name)])
    lane.enqueue()
    session.cuda.wait()


def _sizes(engines: EngineSet, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    tensors = (*engines.inputs, *engines.outputs)
    return {each.name: byte_count(numpy_dtype(each.dtype), shapes[each.name]) for each in tensors}
