"""The building process: ``python -m exporter.engines.build.worker``.

It is told whose child it is, and its job in one line of JSON on standard input. What it has to say
goes to standard output, one JSON object with a ``result`` or an ``error``. Everything that
libraries print goes to standard error.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from exporter.engines.build.child import has_fixed_addresses
from exporter.engines.build.libraries import LIBRARIES, cards_of, load
from exporter.engines.build.logs import Listener, Obstacle, inspected, no_engine, read_layers
from exporter.errors import DepthcutError, EngineError, first_line
from exporter.files import write_through
from exporter.processes import end_with_parent


class Builder:
    """A builder and what it has read; nothing in it survives the process."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module
        self.listener = Listener(module)
        self.builder = module.Builder(self.listener.log)
        if not self.builder:
            raise RuntimeError("the library gives no builder")
        module.init_libnvinfer_plugins(self.listener.log, "")

    def parse(self, path: Path, graph: Path | None = None) -> tuple[Any, list[Obstacle]]:
        """The network of a graph that lies in ``path``'s folder, and what is in its way."""
        network, parser = self._network_and_parser()
        if graph is None:
            parsed = parser.parse_from_file(str(path))
        else:
            parsed = parser.parse(graph.read_bytes(), str(path))
        return network, [] if parsed else self._obstacles(parser)

    def check(self, path: Path) -> list[Obstacle]:
        """Everything in a file that the parser says it can't take; empty where it takes all."""
        _, parser = self._network_and_parser()
        if parser.supports_model_v2(path.read_bytes(), str(path)):
            return []
        return self._obstacles(parser)

    def _network_and_parser(self) -> tuple[Any, Any]:
        flag = 1 << int(self.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        network = self.builder.create_network(flag)
        return network, self.module.OnnxParser(network, self.listener.log)

    def _obstacles(self, parser: Any) -> list[Obstacle]:
        return [
            Obstacle(
                error.node_name() or (f"number {error.node()}" if error.node() >= 0 else ""),
                error.node_operator() or "",
                error.desc() or error.code().name,
            )
            for error in map(parser.get_error, range(parser.num_errors))
        ] or [Obstacle("", "", self.listener.last_error())]

    def config(self, settings: Mapping[str, Any], profiles: Sequence[Mapping[str, Any]]) -> Any:
        """How to build: settings and profiles as they are on record."""
        module, config = self.module, self.builder.create_builder_config()
        # Without it neither the builder's log nor an inspector says which layers it made.
        config.profiling_verbosity = module.ProfilingVerbosity.DETAILED
        config.clear_flag(module.BuilderFlag.TF32)  # on by default
        if (level := settings["optimization_level"]) is not None:
            config.builder_optimization_level = level
        if (workspace := settings["workspace_bytes"]) is not None:
            config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, workspace)
        if names := settings["compute_capabilities"]:
            config.num_compute_capabilities = len(names)
            for place, card in enumerate(cards_of(module, names)):
                config.set_compute_capability(card, place)
        for entry in profiles:
            profile = self.builder.create_optimization_profile()
            for name, span in entry["shapes"].items():
                profile.set_shape(name, span["low"], span["usual"], span["high"])
            if not profile or config.add_optimization_profile(profile) < 0:
                reason = self.listener.last_error()
                raise EngineError(f"The {entry['phase']} profile is refused: {reason}")
        return config


def main() -> int:
    """Does what the request says, and tells the outcome."""
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever libraries print is not for the one who listens
    request = json.loads(sys.stdin.readline())
    results: dict[str, Any]
    try:
        result = _JOBS[request["job"]](request)
        results = {"result": {**result, "fixed_addresses": has_fixed_addresses()}}
    except DepthcutError as error:
        results = {"error": {"message": error.message, "hint": error.hint, "code": error.code}}
    except Exception as error:  # whatever the library's bindings raise
        traceback.print_exc()
        line = f"{request['backend']} failed: {type(error).__name__}: {first_line(error)}."
        hint = "-v shows the traceback."
        results = {"error": {"message": line, "hint": hint, "code": "library-failed"}}
    events.write(json.dumps(results) + "\n")
    events.flush()
    return int("error" in results)


def _check(request: dict[str, Any]) -> dict[str, Any]:
    builder = Builder(load(LIBRARIES[request["backend"]]))
    obstacles = [vars(obstacle) for obstacle in builder.check(Path(request["onnx"]))]
    return {"version": builder.module.__version__, "obstacles": obstacles}


def _build(request: dict[str, Any]) -> dict[str, Any]:
    library = LIBRARIES[request["backend"]]
    module = load(library)
    builder = Builder(module)
    graph, loaded = request["graph"] and Path(request["graph"]), time.perf_counter()
    network, obstacles = builder.parse(Path(request["onnx"]), graph)
    if obstacles:
        reasons = [vars(obstacle) for obstacle in obstacles]
        return {"obstacles": reasons, "backend_version": module.__version__}
    config, parsed = builder.config(request["settings"], request["profiles"]), time.perf_counter()
    engine = builder.builder.build_serialized_network(network, config)
    built = time.perf_counter()
    if engine is None:
        raise no_engine(builder.listener.errors)
    content = memoryview(engine)
    write_through(Path(request["engine"]), content)
    table = read_layers(builder.listener.messages)
    if not library.builds_without_gpu:  # the card is here, and the log has no table
        table = inspected(module, builder.listener, content, table)
    return {
        "obstacles": [],
        "backend_version": module.__version__,
        "engine_sha256": hashlib.sha256(content).hexdigest(),
        "inputs": _tensors(network.get_input, network.num_inputs),
        "outputs": _tensors(network.get_output, network.num_outputs),
        "network_layers": network.num_layers,
        **table._asdict(),
        "parse_s": parsed - loaded,
        "build_s": built - parsed,
    }


def _tensors(get: Callable[[int], Any], count: int) -> list[dict[str, Any]]:
    return [
        {"name": tensor.name, "dtype": tensor.dtype.name.lower(), "shape": list(tensor.shape)}
        for tensor in map(get, range(count))
    ]


def _try(request: dict[str, Any]) -> dict[str, Any]:
    from exporter.engines.build.session import run_once

    run_once([Path(path) for path in request["engines"]])
    return {}


_JOBS = {"check": _check, "build": _build, "try": _try}


if __name__ == "__main__":
    end_with_parent(int(sys.argv[1]))
    CODE = main()
    sys.stderr.flush()
    os._exit(CODE)  # at once: taking a builder's gigabytes apart is for no one
