"""Runs inside the building process: from an ONNX file to a network, or to what is in the way."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from exporter.engine.attention import let_decompose, passed_over, read_graph

if TYPE_CHECKING:
    import onnx

_ERRORS = frozenset({"ERROR", "INTERNAL_ERROR"})
_PLACE = re.compile(r"^\[[^\]]*\] *")  # such as [checkMacros.cpp::catchCudaError::250]


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


class Listener:
    """Collects what the library logs; by severity, in order.

    Args:
        module: ``tensorrt`` or ``tensorrt_rtx``.
        errors_only: Keeps nothing else: a runtime has something to say at every call.
    """

    def __init__(self, module: ModuleType, *, errors_only: bool = False) -> None:
        self.lines: list[tuple[str, str]] = []
        lines = self.lines

        class Log(module.ILogger):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                module.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if not errors_only or severity.name in _ERRORS:
                    lines.append((severity.name, message))

        self.log = Log()

    def errors(self) -> list[str]:
        """The messages of errors, without where in the library's source they arose."""
        return [_PLACE.sub("", text) for severity, text in self.lines if severity in _ERRORS]

    def last_error(self) -> str:
        """The last of them."""
        return (self.errors() or ["it gives no reason"])[-1]

    def messages(self) -> list[str]:
        """Every message."""
        return [text for _, text in self.lines]


class Builder:
    """A builder and what it has read; nothing in it survives the process.

    Args:
        module: ``tensorrt`` or ``tensorrt_rtx``.

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
        graph = read_graph(path)
        if ignored := _ignored(graph):
            return network, ignored
        if let_decompose(graph):
            parsed = parser.parse(graph.SerializeToString(), str(path))
        else:
            parsed = parser.parse_from_file(str(path))
        if parsed:
            return network, []
        return network, list(_obstacles(parser)) or [Obstacle("", "", self._last_error())]

    def check(self, path: Path) -> list[Obstacle]:
        """Everything in a file that the parser says it can't take; empty where it takes all."""
        _, parser = self._network_and_parser()
        if parser.supports_model_v2(path.read_bytes(), str(path)):
            return _ignored(read_graph(path))
        return list(_obstacles(parser)) or [Obstacle("", "", self._last_error())]

    def supports(self, operator: str) -> bool:
        """Whether an operator is known at all; one that is may still not parse."""
        _, parser = self._network_and_parser()
        return bool(parser.supports_operator(operator))

    def _network_and_parser(self) -> tuple[Any, Any]:
        flag = 1 << int(self.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        network = self.builder.create_network(flag)
        return network, self.module.OnnxParser(network, self.listener.log)

    def _last_error(self) -> str:
        return (self.listener.errors() or ["the parser gives no reason"])[-1]


def _ignored(graph: onnx.ModelProto) -> list[Obstacle]:
    return [Obstacle(name, "Attention", reason) for name, reason in passed_over(graph)]


def _obstacles(parser: Any) -> Iterator[Obstacle]:
    for number in range(parser.num_errors):
        error = parser.get_error(number)
        name = error.node_name() or (f"number {error.node()}" if error.node() >= 0 else "")
        yield Obstacle(name, error.node_operator() or "", error.desc() or error.code().name)
