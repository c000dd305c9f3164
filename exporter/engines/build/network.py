"""Runs inside the building process: from an ONNX file to a network, or to what is in the way.

A builder refuses an Attention for which it has no kernel of its own, in float32 for one any with
more than one new token, unless it may write the operator out in basic ones. ONNX has no attribute
for that; the parsers read one of their own, ``TRT_decomposable``. It is added to the graph as it is
handed over: the file stays ONNX. Where there is a kernel the engine is the same with it.

The parsers also pass over an input that they don't know, without a word.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx

from exporter.engines.build.logs import Listener

FILLED_INPUT = "nonpad_kv_seqlen"
"""How many keys of each sequence are filled, where the others lie behind them."""

_DECOMPOSABLE = "TRT_decomposable"
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

    def parse(self, path: Path) -> tuple[Any, list[Obstacle]]:
        """The network, and what the parser could not take; an obstacle makes it unusable."""
        network, parser = self._network_and_parser()
        graph = _read_graph(path)
        if ignored := _ignored(graph):
            return network, ignored
        if let_decompose(graph):
            parsed = parser.parse(graph.SerializeToString(), str(path))
        else:
            parsed = parser.parse_from_file(str(path))
        return network, [] if parsed else self._obstacles(parser)

    def check(self, path: Path) -> list[Obstacle]:
        """Everything in a file that the parser says it can't take; empty where it takes all."""
        _, parser = self._network_and_parser()
        if parser.supports_model_v2(path.read_bytes(), str(path)):
            return _ignored(_read_graph(path))
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


def _read_graph(path: Path) -> onnx.ModelProto:
    """A graph without the weights that lie in files of their own."""
    return onnx.load(path, load_external_data=False)


def let_decompose(model: onnx.ModelProto) -> bool:
    """Lets a builder write out each Attention that it has no kernel for; the model is changed.

    Returns:
        Whether there is any.
    """
    found = list(_attentions(model.graph))
    for node in found:
        if all(attribute.name != _DECOMPOSABLE for attribute in node.attribute):
            attribute = onnx.AttributeProto(name=_DECOMPOSABLE, type=onnx.AttributeProto.INT, i=1)
            node.attribute.append(attribute)
    return bool(found)


def _ignored(model: onnx.ModelProto) -> list[Obstacle]:
    """The nodes of which a parser would take a part only.

    An engine of such a graph would attend to what is not filled yet.
    """
    reason = f"the parser passes over its input {FILLED_INPUT}, without a word"
    return [
        Obstacle(node.name, "Attention", reason)
        for node in _attentions(model.graph)
        if len(node.input) > _FILLED and node.input[_FILLED]
    ]


def _attentions(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        if node.op_type == "Attention" and node.domain in ("", "ai.onnx"):
            yield node
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                yield from _attentions(body)
