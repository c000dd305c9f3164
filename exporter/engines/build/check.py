"""Asks the parser whether it takes a graph, and says what is in the way and how around it."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from exporter.artifacts import EngineParse
from exporter.engines.build.build import FILLED_INPUT, PASSED_OVER, ignored_inputs, read_graph
from exporter.engines.build.child import run_job
from exporter.engines.build.libraries import LIBRARIES, Backend, refuse_without_driver
from exporter.engines.build.profiles import read_source
from exporter.errors import EngineError, VerificationError
from exporter.progress import QUIET, Progress

_LAYER = re.compile(r"(?:layers?|h|blocks?)[._/]([0-9]{1,4})")
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
_TOLD = 5

ParserCheck = Callable[[Path, Path], EngineParse | None]
"""Is given source and result; raises where the source parses and the result does not."""


@dataclass(frozen=True)
class Finding:
    """Something in a graph that will not parse."""

    layer: int | None
    node: str
    operator: str
    reason: str
    way_out: str


@dataclass(frozen=True)
class EngineCheck:
    """What the parser says of a graph."""

    backend: str
    version: str
    findings: tuple[Finding, ...]


def check_engine(
    onnx: Path, *, backend: Backend = "tensorrt-rtx", progress: Progress = QUIET
) -> EngineCheck:
    """Asks a library's parser about a graph; nothing is built."""
    library = LIBRARIES[backend]
    refuse_without_driver(library)
    operators = read_source(onnx).operators
    request = {
        "job": "check",
        "onnx": str(onnx.absolute()),
        "operators": sorted(set(map(_without_domain, operators))),
    }
    result = run_job(library, request, progress, f"check for {backend}")
    domains = {_without_domain(name): name for name in operators if "." in name}
    findings = [
        _finding(
            obstacle["node"],
            domains.get(obstacle["operator"], obstacle["operator"]),
            obstacle["reason"],
        )
        for obstacle in result["obstacles"]
    ]
    if findings:  # the parser stops at the first: list the rest of the same sort
        findings += _further(findings, operators, result["unknown_operators"])
    else:
        ignored = ignored_inputs(read_graph(onnx))
        findings = [_finding(node.name, node.op_type, PASSED_OVER) for node in ignored]
    return EngineCheck(backend, result["version"], tuple(sorted(findings, key=_place)))


def _further(
    items: Sequence[Finding], operators: Mapping[str, Sequence[str]], unknown: Sequence[str]
) -> list[Finding]:
    """Nodes whose operator is unknown, or foreign and refused at another node already."""
    known = {finding.node for finding in items}
    reasons = {finding.operator: finding.reason for finding in items}
    findings = []
    for operator, nodes in operators.items():
        name = _without_domain(operator)
        reason = reasons.get(name, "") if name != operator else ""
        if name in unknown:
            reason = f"the parser does not know {operator}"
        if reason:
            findings += [_finding(node, operator, reason) for node in nodes if node not in known]
    return findings


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


def engine_gate(backend: Backend = "tensorrt-rtx", progress: Progress = QUIET) -> ParserCheck:
    """What :func:`exporter.cut.surgery.prune_file` takes as ``engine_check``.

    The graph before the cut is asked about only where the cut one does not parse: a cut that broke
    it is a failure, a graph that never parsed is told.
    """

    def asked(source: Path, candidate: Path) -> EngineParse:
        after = check_engine(candidate, backend=backend, progress=progress)
        if not after.findings:
            return EngineParse(backend=backend, version=after.version, parsed=True)
        before = check_engine(source, backend=backend, progress=progress)
        if not before.findings:
            raise VerificationError(
                f"{_name(after)} parses {source.name}, but not the pruned graph: "
                f"{_told(after.findings[0])}. The result is not kept.",
                "The graph may be cut in a way that its engine can't take: leave that sublayer.",
                code="not-parsed",
            )
        progress.say(
            f"{_name(after)} takes the graph neither before the cut nor after: "
            f"{_told(after.findings[0])}; depthcut check-engine lists all."
        )
        return EngineParse(
            backend=backend,
            version=after.version,
            parsed=False,
            parsed_before=False,
            reasons=[_told(finding) for finding in after.findings[:_TOLD]],
        )

    return asked


def gate_where_installed(progress: Progress) -> ParserCheck | None:
    """The same with TensorRT-RTX, for whom nobody asked: None where it is not installed.

    Where it is but can't be asked, that is told and no reason to fail.
    """
    if importlib.util.find_spec(LIBRARIES["tensorrt-rtx"].module) is None:
        return None
    gate = engine_gate("tensorrt-rtx", progress)

    def asked(source: Path, candidate: Path) -> EngineParse | None:
        try:
            return gate(source, candidate)
        except EngineError as error:
            progress.say(f"tensorrt-rtx was not asked about the result: {error.message}")
            return None

    return asked


def _name(check: EngineCheck) -> str:
    return f"{check.backend} {check.version}"


def _told(finding: Finding) -> str:
    where = f"node {finding.node!r} ({finding.operator}): " if finding.node else ""
    return f"{where}{finding.reason.rstrip('.')}"
