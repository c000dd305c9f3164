"""Runs inside the building process: from an ONNX file to a network, or to what is in the way.

The parsers pass over an input that they don't know, without a word.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx

from exporter.engines.build.adapted import adapt, attentions, read_graph, set_lengths
from exporter.engines.build.logs import Listener
from exporter.engines.build.settings import BuildSettings, Logits, Phase
from exporter.engines.build.sidecar import AttentionRecord

FILLED_INPUT = "nonpad_kv_seqlen"
"""How many keys of each sequence are filled, where the others lie behind them."""

_DEFAULT = BuildSettings()
_FILLED = 6  # that input's place


@dataclass(frozen=True)
class Obstacle:
    """What the parser can't take.

    Attributes:
        node: The node's name, or its number where it has none.
        operator: Its operator; empty where the parser doesn't say.
        reason: The parser's own words.
    """

    node: str
    operator: str
    reason: str


@dataclass(frozen=True)
class Parsed:
    """A graph that was parsed.

    Attributes:
        network: The library's; unusable where something is in the way.
        obstacles: What the parser could not take.
        attention: How caches of fixed length are told; None where there are none.
        logits: Of which positions there are logits; None where there are none.
        seconds: That the parser took.
    """

    network: Any
    obstacles: list[Obstacle]
    attention: AttentionRecord | None = None
    logits: Logits | None = None
    seconds: float = 0.0


class Builder:
    """A builder and what it has read; nothing in it survives the process.

    Raises:
        RuntimeError: The library gives no builder, for want of a driver.
    """

    def __init__(self, module: ModuleType) -> None:
        self.module = module
        self.listener = Listener(module)
        self.builder = module.Builder(self.listener.log)
        if not self.builder:
            raise RuntimeError("the library gives no builder")
        module.init_libnvinfer_plugins(self.listener.log, "")

    def parse(
        self, path: Path, settings: BuildSettings = _DEFAULT, phases: Collection[Phase] = ()
    ) -> Parsed:
        """Reads a graph, adapts it to what is wanted, and has it parsed."""
        network, parser = self._network_and_parser()
        graph = read_graph(path)
        if ignored := _ignored(graph):
            return Parsed(network, ignored)
        adapted = adapt(graph, settings, phases, self.module)
        begin = time.perf_counter()
        if adapted.changed:
            parsed = parser.parse(adapted.model.SerializeToString(), str(path))
        else:
            parsed = parser.parse_from_file(str(path))
        seconds = time.perf_counter() - begin
        if not parsed:
            return Parsed(network, self._obstacles(parser))
        attention = adapted.attention
        if attention is not None and attention.told_by == "lengths":
            set_lengths(network, self.module)
        return Parsed(network, [], attention, adapted.logits, seconds)

    def check(self, path: Path) -> list[Obstacle]:
        """Everything in a file that the parser says it can't take; empty where it takes all."""
        _, parser = self._network_and_parser()
        if parser.supports_model_v2(path.read_bytes(), str(path)):
            return _ignored(read_graph(path))
        return self._obstacles(parser)

    def supports(self, operator: str) -> bool:
        """Whether an operator is known at all; one that is may still not parse."""
        _, parser = self._network_and_parser()
        return bool(parser.supports_operator(operator))

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


def _ignored(model: onnx.ModelProto) -> list[Obstacle]:
    """The nodes of which a parser would take a part only.

    An engine of such a graph would attend to what is not filled yet.
    """
    reason = f"the parser passes over its input {FILLED_INPUT}, without a word"
    return [
        Obstacle(node.name, "Attention", reason)
        for node in attentions(model.graph)
        if len(node.input) > _FILLED and node.input[_FILLED]
    ]
