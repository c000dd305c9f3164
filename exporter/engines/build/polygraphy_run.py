"""Runs an engine by Polygraphy, NVIDIA's tool for engines."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.engines.build.engine_set import EngineRecord, EngineSet, sidecar_path
from exporter.engines.build.logs import Listener
from exporter.engines.build.session import deserialised, refuse_unready
from exporter.engines.tensors import numpy_dtype
from exporter.errors import EngineError, first_line
from exporter.optional import require

ENGINE = "engine"
"""What its runner is called in Polygraphy's files."""


@contextlib.contextmanager
def polygraphy(extra: str = "rtx") -> Iterator[None]:
    """Polygraphy, quiet, with its failures as errors of depthcut."""
    require("polygraphy", extra=extra)
    from polygraphy.exception import PolygraphyException
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = {"": G_LOGGER.CRITICAL}
    with contextlib.redirect_stdout(sys.stderr):  # its log goes to standard output
        try:
            yield
        except PolygraphyException as error:
            text = f"Polygraphy: {first_line(error)}"
            raise EngineError(text, "-v shows its log.", code="run-failed") from error


def run_engine(request: Mapping[str, Any]) -> None:
    """What the child process does: runs a profile of an engine, and writes Polygraphy's results."""
    path = Path(request["engine"])
    record = EngineRecord.read(sidecar_path(path), named=False)
    engines = EngineSet((path,), (record,))
    module = refuse_unready(engines)
    rtx = engines.library.compiles_on_card
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = str(int(rtx))  # read when it is imported
    _show_cuda_runtime()
    listener = Listener(module, errors_only=True)
    runtime = module.Runtime(listener.log)
    with polygraphy(engines.library.extra):
        from polygraphy.backend.trt import TrtRunner
        from polygraphy.comparator import Comparator
        from polygraphy.json import load_json

        runner = TrtRunner(
            lambda: deserialised(module, runtime, listener, path, []),
            name=ENGINE,
            optimization_profile=request["profile"],
        )
        feed = _as_engine_takes(record, load_json(request["inputs"])[0])
        results = Comparator.run([runner], data_loader=[feed])
        _to_numpy(results)
        results.save(request["results"])


def _show_cuda_runtime() -> None:
    """Polygraphy looks for CUDA's runtime along a variable; pip puts it elsewhere."""
    pathfinder = require("cuda.pathfinder", extra="rtx")
    with contextlib.suppress(Exception):  # it then looks by itself, and tells what is missing
        abs_path = pathfinder.load_nvidia_dynamic_lib("cudart").abs_path
        before = os.environ.get("LD_LIBRARY_PATH", "")
        os.environ["LD_LIBRARY_PATH"] = os.pathsep.join([str(Path(abs_path).parent), before])


def _as_engine_takes(record: EngineRecord, feed: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """The inputs in the engine's types; Polygraphy takes bfloat16 as PyTorch's tensors alone."""
    dtypes = {tensor.name: numpy_dtype(tensor.dtype) for tensor in record.inputs}
    halves = {name for name, dtype in dtypes.items() if dtype == np.dtype("bfloat16")}
    if not halves:
        return {name: np.ascontiguousarray(feed[name], dtype) for name, dtype in dtypes.items()}
    torch = require("torch", extra="torch")
    result = {name: torch.from_numpy(np.array(feed[name])) for name in dtypes}
    return {name: value.bfloat16() if name in halves else value for name, value in result.items()}


def _to_numpy(results: Any) -> None:
    for _, runs in results.items():
        for outputs in runs:
            for name, array in list(outputs.items()):
                if not isinstance(array, np.ndarray):
                    outputs[name] = array.cpu().float().numpy()
