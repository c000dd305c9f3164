"""Runs inside the building process: from an ONNX file to a network, or to what is in the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from exporter.engines.build.logs import Listener
from exporter.errors import EngineError


@dataclass(frozen=True)
class Obstacle:
    """What the parser can't take."""

    node: str
    operator: str
    reason: str

    def __str__(self) -> str:
        where = f"node {self.node!r} ({self.operator}): " if self.node else ""
        return f"{where}{self.reason.rstrip('.')}"


Parsed = tuple[Any, list[Obstacle]]
"""A network, and what kept the parser from making it."""


class Builder:
    """A builder and what it has read; nothing in it survives the process."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module
        self.listener = Listener(module)
        self.builder = module.Builder(self.listener.log)
        if not self.builder:
            raise RuntimeError("the library gives no builder")
        module.init_libnvinfer_plugins(self.listener.log, "")

    def parse(self, path: Path, graph: Path | None = None) -> Parsed:
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


def cards_of(module: ModuleType, names: Sequence[str]) -> list[Any]:
    """The library's own names of cards; those that it doesn't build for are refused."""
    if not names:  # only one of the libraries has these classes
        return []
    known = {name.lower(): card for name, card in module.ComputeCapability.__members__.items()}
    cards = {name: card for name, card in known.items() if name.startswith("sm")}
    if wrong := [name for name in names if name not in cards]:
        raise EngineError(
            f"{module.__name__} {module.__version__} does not build for {', '.join(wrong)}.",
            f"It knows {', '.join(sorted(cards, key=lambda name: (len(name), name)))}.",
            code="other-card",
        )
    return [cards[name] for name in names]
