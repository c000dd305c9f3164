"""Where two runs of a graph begin to differ: first the sublayer, then the node in it.

The residual stream after each sublayer is compared, then all tensors of the first sublayer that
differs. An engine that gives inner tensors is built otherwise: what is fused is taken apart. So a
fault of a fused kernel may be gone in the second run; the sublayer is then the smallest part known.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import onnx_ir as ir

from exporter.engines.explain.arms import Arm, Feed, OnnxArm
from exporter.engines.explain.polygraphy_runs import Difference, differences, save_inputs
from graph_passes.files.storage import load_model, save_model
from graph_passes.locate import survey
from graph_passes.types import SublayerRef

SUBGRAPH, SUBGRAPH_INPUTS = "differs.onnx", "differs-inputs.json"
"""What the smallest part and its inputs are called."""


@dataclass(frozen=True)
class FirstDifference:
    """The first tensor that differs, and the smallest part of the graph that gives it wrongly.

    Attributes:
        difference: The tensor, and how far it is off.
        nodes: The part's nodes, in the graph's order; all of their inputs agree.
        sublayer: Where the part is; None before, after or outside the sublayers.
        fused: Whether no inner tensor of the sublayer differs once it is an output: the part
            differs only while it is fused.
    """

    difference: Difference
    nodes: tuple[ir.Node, ...]
    sublayer: SublayerRef | None
    fused: bool = False

    @property
    def node(self) -> ir.Node:
        """The one that gives the tensor."""
        return self.nodes[-1]


@dataclass(frozen=True)
class Narrowing:
    """What is compared.

    Attributes:
        reference: What is right.
        suspect: What differs.
        feed: The inputs at which it does.
        tolerance: As of :func:`differences`.
    """

    reference: OnnxArm
    suspect: Arm
    feed: Feed
    tolerance: float

    @cached_property
    def model(self) -> ir.Model:
        """The graph."""
        return load_model(self.reference.onnx)

    def first(self, output: Difference) -> FirstDifference:
        """Finds it.

        Args:
            output: The first of the graph's outputs that differs.

        Raises:
            BackendError: A run fails.
            EngineError: A marked engine can't be built or run.
        """
        found = self._sublayer(output)
        inner = [value.name or "" for node in found.nodes for value in node.outputs]
        agreed: list[str] = []
        for each in self._compared(inner):
            if not each.passed:
                nodes = _between(found.nodes, agreed, each.tensor)
                return replace(found, difference=each, nodes=tuple(nodes))
            agreed.append(each.tensor)
        return replace(found, fused=True)

    def write(self, found: FirstDifference, folder: Path) -> None:
        """Writes the part as an ONNX file, and its inputs as ONNX Runtime computes them."""
        made = {value for node in found.nodes for value in node.outputs}
        read = dict.fromkeys(
            value
            for node in found.nodes
            for value in node.inputs
            if value is not None and value not in made and value.const_value is None
        )
        names = [value.name or "" for value in read]
        graph = ir.convenience.extract(self.model.graph, names, [found.difference.tensor])
        save_model(ir.Model(graph, ir_version=self.model.ir_version), folder / SUBGRAPH)
        marks = [name for name in names if name not in self.feed]
        given = self.reference.run(self.feed, marks)[0][1][0] if marks else {}
        inputs = {n: self.feed[n] if n in self.feed else given[n] for n in names}
        save_inputs(inputs, folder / SUBGRAPH_INPUTS)

    def _sublayer(self, output: Difference) -> FirstDifference:
        stream = dict(_stream(self.model))
        agreed: list[str] = []
        for each in self._compared(list(stream)):
            if not each.passed:
                nodes = tuple(_between(self.model.graph, agreed, each.tensor))
                return FirstDifference(each, nodes, stream[each.tensor])
            agreed.append(each.tensor)
        return FirstDifference(
            output, tuple(_between(self.model.graph, agreed, output.tensor)), None
        )

    def _compared(self, names: Sequence[str]) -> Iterator[Difference]:
        """The differences of inner tensors, in the order of their names."""
        marks = [name for name in names if self.suspect.has(name)]
        if not marks:
            return
        wanted, found = (arm.run(self.feed, marks) for arm in (self.reference, self.suspect))
        told = {each.tensor: each for each in differences(wanted, found, self.tolerance)}
        yield from (told[name] for name in marks if name in told)


def _stream(model: ir.Model) -> Iterator[tuple[str, SublayerRef]]:
    """By sublayer, the residual stream after it."""
    for site in survey(model).sites:
        yield site.tree.add.outputs[0].name or "", site.ref


def _between(
    nodes: Sequence[ir.Node] | ir.Graph, agreed: Sequence[str], end: str
) -> Iterator[ir.Node]:
    """The nodes that a tensor is computed by, but for those before tensors that agree."""
    ordered, needed = list(nodes), {end}
    found = []
    for node in reversed(ordered):
        if not needed.isdisjoint(value.name for value in node.outputs):
            found.append(node)
            needed |= {v.name or "" for v in node.inputs if v is not None} - set(agreed)
    return reversed(found)
