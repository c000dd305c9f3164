"""Runs inside the building process: from an ONNX file to a network, or to what is in the way."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from exporter.engines.build.logs import Listener
from exporter.errors import EngineError

if TYPE_CHECKING:
    from exporter.engines.build.settings import BuildSettings, Profile


@dataclass(frozen=True)
class Obstacle:
    """What the parser can't take."""

    node: str
    operator: str
    reason: str

    def __str__(self) -> str:
        where = f"node {self.node!r} ({self.operator}): " if self.node else ""
        return f"{where}{self.reason.rstrip('.')}"


@dataclass(frozen=True)
class Parsed:
    """A graph that was parsed."""

    network: Any
    obstacles: list[Obstacle]
    seconds: float = 0.0


class Builder:
    """A builder and what it has read; nothing in it survives the process."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module
        self.listener = Listener(module)
        self.builder = module.Builder(self.listener.log)
        if not self.builder:
            raise RuntimeError("the library gives no builder")
        module.init_libnvinfer_plugins(self.listener.log, "")

    def parse(self, path: Path, graph: Path | None = None, lengths: str = "") -> Parsed:
        """Has a graph parsed."""
        network, parser = self._network_and_parser()
        begin = time.perf_counter()
        if graph is None:
            parsed = parser.parse_from_file(str(path))
        else:
            parsed = parser.parse(graph.read_bytes(), str(path))
        seconds = time.perf_counter() - begin
        if not parsed:
            return Parsed(network, self._obstacles(parser))
        if lengths:
            set_lengths(network, self.module, lengths)
        return Parsed(network, [], seconds)

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
        return list(_obstacles(parser)) or [Obstacle("", "", self.listener.last_error())]


def _obstacles(parser: Any) -> Iterator[Obstacle]:
    for number in range(parser.num_errors):
        error = parser.get_error(number)
        name = error.node_name() or (f"number {error.node()}" if error.node() >= 0 else "")
        yield Obstacle(name, error.node_operator() or "", error.desc() or error.code().name)


def set_lengths(network: Any, module: ModuleType, name: str) -> int:
    """Tells the attentions of a parsed decode step the lengths that the parser has passed over."""
    layers = [network.get_layer(number) for number in range(network.num_layers)]
    outputs = (layer.get_output(0) for layer in layers if layer.num_outputs)
    lengths = next((tensor for tensor in outputs if tensor.name == name), None)
    if lengths is None:
        raise RuntimeError(f"the parsed network has no tensor {name}")
    output = network.add_cast(lengths, module.DataType.INT32).get_output(0)
    result = [item for item in layers if item.type == module.LayerType.ATTENTION_INPUT]
    for layer in result:
        layer.__class__ = module.IAttentionInputLayer  # the bindings give the base class alone
        layer.attention.key_value_lengths = output
        layer.attention.causal_kind = module.CausalMaskKind.NONE
    return len(result)


_NO_CARD = frozenset({"NONE", "CURRENT"})


def builder_config(
    builder: Builder,
    settings: BuildSettings,
    profiles: Sequence[Profile],
) -> Any:
    """Makes the configuration."""
    module = builder.module
    config = builder.builder.create_builder_config()
    # Without it neither the builder's log nor an inspector says which layers it made.
    config.profiling_verbosity = module.ProfilingVerbosity.DETAILED
    if settings.optimization_level is not None:
        config.builder_optimization_level = settings.optimization_level
    if settings.workspace_bytes is not None:
        config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, settings.workspace_bytes)
    config.clear_flag(module.BuilderFlag.TF32)  # on by default
    _set_targets(module, config, settings)
    for entry in profiles:
        profile = builder.builder.create_optimization_profile()
        for name, span in entry.shapes.items():
            profile.set_shape(name, span.low, span.usual, span.high)
        if not profile or config.add_optimization_profile(profile) < 0:
            reason = builder.listener.last_error()
            raise EngineError(f"The {entry.phase} profile is refused: {reason}")
    return config


def _set_targets(module: Any, config: Any, settings: BuildSettings) -> None:
    names = settings.compute_capabilities
    if not names:
        return
    config.num_compute_capabilities = len(names)
    refuse_unknown_targets(module, names, config.set_compute_capability)


def refuse_unknown_targets(
    module: ModuleType,
    names: Sequence[str],
    takes: Callable[[Any, int], bool] = lambda *_: True,  # what sets a card at a place
) -> None:
    """Refuses cards that a library doesn't build for."""
    if not names:  # only one of the libraries has these classes
        return
    cards = {
        name.lower(): card
        for name, card in module.ComputeCapability.__members__.items()
        if name not in _NO_CARD
    }
    wrong = [
        name
        for place, name in enumerate(names)
        if name.lower() not in cards or not takes(cards[name.lower()], place)
    ]
    if wrong:
        raise EngineError(
            f"{module.__name__} {module.__version__} does not build for {', '.join(wrong)}.",
            f"It knows {', '.join(sorted(cards, key=lambda name: (len(name), name)))}.",
            code="other-card",
        )
