"""Asks the parser whether it takes a graph, and says what is in the way and how around it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from exporter.engine.attention import FILLED_INPUT
from exporter.engine.child import run_job
from exporter.engine.driver import ask_driver
from exporter.engine.flavours import FLAVOURS, Backend, Flavour
from exporter.engine.graph import graph_facts
from exporter.errors import EngineError
from exporter.progress import QUIET, Progress

_LAYER = re.compile(r"(?:layers?|h|blocks?)[._/](\d+)")
_FUSED = (
    "an operator of ONNX Runtime: build from the graph before it was fused or quantised for "
    "ONNX Runtime (depthcut export, or optimum without optimisation)"
)
_DOMAINLESS = frozenset({"SimplifiedLayerNormalization"})
_MANY_OUTPUTS = (
    "the cache goes through the Attention operator: export with the cache outside of it, as "
    "depthcut export does"
)
_NOT_FILLED = (
    "say what is filled in the mask instead, as depthcut export --target tensorrt-rtx does"
)
_BF16 = "bf16 needs compute capability 8.0: export in fp16, or build for newer cards"


@dataclass(frozen=True)
class Finding:
    """Something in a graph that will not parse.

    Attributes:
        layer: The layer's number, if the node's name tells it.
        node: The node's name.
        operator: Its operator.
        reason: The parser's words.
        way_out: What to do; empty where nothing is known.
    """

    layer: int | None
    node: str
    operator: str
    reason: str
    way_out: str


@dataclass(frozen=True)
class EngineCheck:
    """What the parser says of a graph.

    Attributes:
        backend: Which library was asked.
        version: Its version.
        findings: What is in the way; none where the graph parses.
    """

    backend: str
    version: str
    findings: tuple[Finding, ...]


def check_engine(
    onnx: Path, *, backend: Backend = "tensorrt-rtx", progress: Progress = QUIET
) -> EngineCheck:
    """Asks a library's parser about a graph; nothing is built.

    Args:
        onnx: The ONNX file.
        backend: Which library to ask.
        progress: Who is told.

    Raises:
        OnnxFileError: The file can't be read.
        EngineError: The library is not usable here.
        MissingDependencyError: It is not installed.
    """
    flavour = FLAVOURS[backend]
    refuse_without_driver(flavour)
    operators = graph_facts(onnx).operators
    request = {
        "job": "check",
        "onnx": str(onnx.absolute()),
        "operators": sorted(set(map(_without_domain, operators))),
    }
    result = run_job(flavour, request, progress, f"check for {backend}")
    domains = {_without_domain(name): name for name in operators if "." in name}
    told = [
        _finding(each["node"], domains.get(each["operator"], each["operator"]), each["reason"])
        for each in result["obstacles"]
    ]
    if told:  # the parser stops at the first: list the rest of the same sort
        told += _further(told, operators, result["unknown_operators"])
    return EngineCheck(backend, result["version"], tuple(sorted(told, key=_place)))


def refuse_without_driver(flavour: Flavour) -> None:
    """Keeps a library that needs a driver from being touched where there is none.

    Raises:
        EngineError: There is none.
    """
    driver = ask_driver()
    if not flavour.builds_without_gpu and driver.problem:
        raise EngineError(
            f"{flavour.backend} can't be used here: {driver.problem}.",
            "Take tensorrt-rtx instead: it builds without a GPU.",
        )


def _further(
    told: Sequence[Finding], operators: Mapping[str, Sequence[str]], unknown: Sequence[str]
) -> list[Finding]:
    """Nodes whose operator is unknown, or foreign and refused at another node already."""
    known = {each.node for each in told}
    reasons = {each.operator: each.reason for each in told}
    found = []
    for operator, nodes in operators.items():
        name = _without_domain(operator)
        reason = reasons.get(name, "") if name != operator else ""
        if name in unknown:
            reason = f"the parser does not know {operator}"
        if reason:
            found += [_finding(node, operator, reason) for node in nodes if node not in known]
    return found


def _without_domain(operator: str) -> str:
    return operator.rpartition(".")[2]


def _finding(node: str, operator: str, reason: str) -> Finding:
    """A finding; the operator comes with its domain, where it has one."""
    layer = _LAYER.search(node)
    number = int(layer.group(1)) if layer else None
    name = _without_domain(operator)
    return Finding(number, node, name, reason, _way_out(operator, reason))


def _way_out(operator: str, reason: str) -> str:
    domain, _, name = operator.rpartition(".")
    # ONNX Runtime writes some of its own operators without a domain.
    if domain == "com.microsoft" or (not domain and name in _DOMAINLESS):
        return _FUSED
    if operator == "Attention":
        return _NOT_FILLED if FILLED_INPUT in reason else _MANY_OUTPUTS
    return _BF16 if "bf16" in reason.lower() or "bfloat16" in reason.lower() else ""


def _place(finding: Finding) -> tuple[int, str]:
    return (-1 if finding.layer is None else finding.layer, finding.node)
