"""Runs inside the building process: from an ONNX file to a network, or to what is in the way.

It is given graphs that are ready to be parsed, see :mod:`exporter.engines.build.adapted`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from exporter.engines.build.logs import Listener


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
        seconds: That the parser took.
    """

    network: Any
    obstacles: list[Obstacle]
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

    def parse(self, path: Path, graph: Path | None = None, lengths: str = "") -> Parsed:
        """Has a graph parsed.

        Args:
            path: The ONNX file, beside which its weights lie.
            graph: The graph that is read in its place; None for that file.
            lengths: The tensor that attentions are told lengths by; empty without one.
        """
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


def set_lengths(network: Any, module: ModuleType, name: str) -> int:
    """Tells the attentions of a parsed decode step the lengths that the parser has passed over.

    Args:
        network: Parsed from a graph for decode, see :mod:`graph_passes.fusing.one_phase`.
        module: The library.
        name: The tensor with the lengths.

    Returns:
        How many there are.

    Raises:
        RuntimeError: The network has no lengths.
    """
    layers = [network.get_layer(number) for number in range(network.num_layers)]
    outputs = (layer.get_output(0) for layer in layers if layer.num_outputs)
    lengths = next((tensor for tensor in outputs if tensor.name == name), None)
    if lengths is None:
        raise RuntimeError(f"the parsed network has no tensor {name}")
    told = network.add_cast(lengths, module.DataType.INT32).get_output(0)
    found = [each for each in layers if each.type == module.LayerType.ATTENTION_INPUT]
    for layer in found:
        layer.__class__ = module.IAttentionInputLayer  # the bindings give the base class alone
        layer.attention.key_value_lengths = told
        layer.attention.causal_kind = module.CausalMaskKind.NONE
    return len(found)
