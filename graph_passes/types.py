"""What the surgery finds, what it is asked to do, and what it did. Plain data, no logic."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

SublayerKind = Literal["attention", "mlp", "cross_attention", "mixer"]
DeletionKind = Literal["attention", "mlp", "block", "cross_attention", "mixer"]
Replacement = Literal["none", "bias", "linear"]

MOST_LAYERS = 4096
"""Of any model: a file that says more, or numbers a layer so, is broken or a stranger's trick."""
BLOCK_KINDS: tuple[SublayerKind, ...] = ("attention", "mlp")
"""What a block of a PyTorch model consists of; a block of an ONNX graph may hold other kinds."""

_NUMBER = re.compile("[0-9]{1,18}")


def number_in(text: str) -> int | None:
    """The whole number that a text is; None: it is none, or has more digits than any count."""
    return int(text) if _NUMBER.fullmatch(text) else None


class SublayerRef(NamedTuple):
    """Names one sublayer: the layer's number from 0 and the sublayer's kind.

    The one identity of a sublayer in every part of depthcut: in tables it is the key, in words
    ``attention 25``, in JSON ``[25, "attention"]`` or two fields of an entry.
    """

    layer: int
    kind: SublayerKind

    def __str__(self) -> str:
        return f"{self.kind} {self.layer}"


def sublayer_kinds(kind: DeletionKind) -> tuple[SublayerKind, ...]:
    """What goes with a deletion of this kind in a PyTorch model: of a block both sublayers."""
    return BLOCK_KINDS if kind == "block" else (kind,)


@dataclass(frozen=True)
class Deletion:
    """One thing to remove. A ``block`` stands for every sublayer of its layer."""

    layer: int
    kind: DeletionKind
    replacement: Replacement = "none"

    def names(self, ref: SublayerRef) -> bool:
        """Whether it removes this sublayer, alone or with its block."""
        return ref.layer == self.layer and self.kind in (ref.kind, "block")


@dataclass(frozen=True)
class ResidualSite:
    """The place where a sublayer joins the residual stream.

    Attributes:
        layer: The layer's number, from 0, counted along the residual stream.
        kind: What the branch is, decided by its operators.
        residual_add: The name of the node that adds the branch to the stream.
        skip: The name of the value that carries the stream past the branch.
        branches: The names of the branch operands; several where one sublayer adds in parts.
        parameters: How many weights only this branch uses.
        kv_inputs: The graph inputs of its KV cache (read only by this branch, shapes aside).
        kv_outputs: The graph outputs that only this branch feeds.
        branch_input: The name of the value ``[..., hidden]`` that all of the branch's work is
            computed from, which a linear replacement reads: the output of the norm before it, or
            the stream where there is none. None where no value is that.
    """

    layer: int
    kind: SublayerKind
    residual_add: str
    skip: str
    branches: tuple[str, ...]
    parameters: int
    kv_inputs: tuple[str, ...] = ()
    kv_outputs: tuple[str, ...] = ()
    branch_input: str | None = None

    @property
    def ref(self) -> SublayerRef:
        """The sublayer that this site belongs to."""
        return SublayerRef(self.layer, self.kind)


@dataclass(frozen=True)
class Refusal:
    """A sublayer, or a whole graph, that can't be cut safely, and why.

    ``layer`` and ``kind`` are None where not even that could be told. ``code`` is a short name
    for the reason, such as ``shared-output``, that stays when the sentence is edited.
    """

    layer: int | None
    kind: SublayerKind | None
    node: str
    reason: str
    code: str


@dataclass(frozen=True)
class GraphSize:
    """Nodes, weights and the weights' bytes of a graph (subgraphs included)."""

    nodes: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class DeletedSublayer:
    """What one deletion took out of the graph, and what came in its place.

    ``parameters_added`` counts the numbers of the replacement that the graph holds for it: those
    of a bias that could be added to one that is there already are none.
    """

    layer: int
    kind: SublayerKind
    replacement: Replacement
    residual_add: str
    nodes_removed: int
    parameters_removed: int
    inputs_removed: tuple[str, ...]
    outputs_removed: tuple[str, ...]
    parameters_added: int = 0


@dataclass(frozen=True)
class PassReport:
    """The result of :func:`graph_passes.prune_graph`.

    Attributes:
        deleted: One entry per sublayer, in graph order (a block gives several).
        refused: Sites of the graph that the finder would not have cut, asked for or not.
        before: The graph's size before the cut.
        after: The graph's size after it.
        kv_renumbering: Old name to new name of cache inputs and outputs; empty when kept.
    """

    deleted: tuple[DeletedSublayer, ...]
    refused: tuple[Refusal, ...]
    before: GraphSize
    after: GraphSize
    kv_renumbering: dict[str, str] = field(default_factory=dict)
