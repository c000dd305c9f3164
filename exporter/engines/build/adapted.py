"""A graph as a builder is given it; the file stays as it is.

A builder refuses an Attention for which it has no kernel of its own, in float32 for one any with
more than one new token, unless it may write the operator out in basic ones. ONNX has no attribute
for that; the parsers read one of their own, ``TRT_decomposable``. Where there is a kernel the
engine is the same with it.

An engine for one phase reads no more of caches in place than is filled, where its library and the
graph allow it, see :mod:`graph_passes.fusing.one_phase`; with a mask it reads all the room. The
parsers pass over lengths, so the building process sets them on the layers that a parser makes.

All of it happens in the process that asks for an engine: what reads graphs takes longer to import
than the library takes to load, so the building process does without.

A decoder gives the logits of the last position alone, unless all are wanted.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from exporter.engines.build.settings import BuildSettings, Logits, Phase
from exporter.engines.build.sidecar import AttentionRecord
from graph_passes.fusing.cache_in_place import SCATTER
from graph_passes.fusing.logits_to_keep import LogitsToKeepPass
from graph_passes.fusing.one_phase import LENGTHS, OnePhasePass

FILLED_INPUT = "nonpad_kv_seqlen"
"""How many keys of each sequence are filled, where the others lie behind them."""
PASSED_OVER = f"the parser passes over its input {FILLED_INPUT}, without a word"

_FILLED_PLACE = 6
_DECOMPOSABLE = "TRT_decomposable"
_BOTH_PHASES = "one engine serves both phases"
_NO_LENGTHS = "this version of the library has no lengths"
_TELLS_MORE = "a mask tells more than the past, such as a window"


@dataclass(frozen=True)
class Adapted:
    """A graph for one engine.

    Attributes:
        model: The graph; weights that lie in files of their own stay there.
        changed: Whether it is another than the file's.
        attention: How caches of fixed length are told; None where there are none.
        logits: Of which positions there are logits; None where there are none.
    """

    model: onnx.ModelProto
    changed: bool
    attention: AttentionRecord | None
    logits: Logits | None

    @property
    def lengths(self) -> str:
        """The tensor that tells attentions how much of the caches is filled; empty without one."""
        by_lengths = self.attention is not None and self.attention.told_by == "lengths"
        return LENGTHS if by_lengths else ""

    def write(self, path: Path) -> Path | None:
        """Writes the graph for a parser; None, and no file, where it is the source's own."""
        if not self.changed:
            return None
        path.write_bytes(self.model.SerializeToString())
        return path


def read_graph(path: Path) -> onnx.ModelProto:
    """A graph without the weights that lie in files of their own."""
    return onnx.load(path, load_external_data=False)


def adapt(
    model: onnx.ModelProto,
    settings: BuildSettings,
    phases: Collection[Phase],
    *,
    has_lengths: bool,
) -> Adapted:
    """Changes a graph for an engine.

    Args:
        model: As it was read; it may be changed.
        settings: What is wanted.
        phases: What the engine serves.
        has_lengths: Whether attentions of the library that builds it can be told lengths.
    """
    graph = ir.serde.deserialize_model(model)
    attention = _for_one_phase(graph, settings, phases, has_lengths=has_lengths)
    logits = _keep_logits(graph, settings, phases)
    unmasked = attention is not None and attention.reads != "room"
    changed = unmasked or (logits == "last" and "prefill" in phases)
    if changed:
        model = ir.serde.serialize_model(graph)
    return Adapted(model, let_decompose(model) or changed, attention, logits)


def _for_one_phase(
    graph: ir.Model, settings: BuildSettings, phases: Collection[Phase], *, has_lengths: bool
) -> AttentionRecord | None:
    """Takes the masks of caches in place out, where that can be."""
    if all(node.op_type != SCATTER for node in graph.graph):
        return None
    by_mask = AttentionRecord(told_by="mask", reads="room")
    if settings.cache_reads == "room":
        return by_mask
    if set(phases) == {"prefill"}:
        if OnePhasePass("prefill")(graph).modified:
            return AttentionRecord(told_by="order", reads="new")
    elif set(phases) != {"decode"}:
        return by_mask.model_copy(update={"remark": _BOTH_PHASES})
    elif not has_lengths:
        return by_mask.model_copy(update={"remark": _NO_LENGTHS})
    elif OnePhasePass("decode")(graph).modified:
        return AttentionRecord(told_by="lengths", reads="filled")
    return by_mask.model_copy(update={"remark": _TELLS_MORE})


def _keep_logits(
    graph: ir.Model, settings: BuildSettings, phases: Collection[Phase]
) -> Logits | None:
    """Keeps the last position's where that is wanted and the head can be told."""
    if all(value.name != "logits" for value in graph.graph.outputs):
        return None
    if settings.logits == "all" or "encode" in phases:
        return "all"
    # A decode step has one position: there is nothing to keep from it.
    alone = set(phases) == {"decode"}
    return "last" if alone or LogitsToKeepPass(1)(graph).modified else "all"


def let_decompose(model: onnx.ModelProto) -> bool:
    """Lets a builder write out each Attention that it has no kernel for; the model is changed.

    Returns:
        Whether there is any.
    """
    found = list(attentions(model.graph))
    for node in found:
        if all(attribute.name != _DECOMPOSABLE for attribute in node.attribute):
            attribute = onnx.AttributeProto(name=_DECOMPOSABLE, type=onnx.AttributeProto.INT, i=1)
            node.attribute.append(attribute)
    return bool(found)


def attentions(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Every Attention of a graph and of the graphs in it."""
    for node in graph.node:
        if node.op_type == "Attention" and node.domain in ("", "ai.onnx"):
            yield node
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                yield from attentions(body)


def ignored_inputs(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The Attentions that are told how many keys are filled, which a parser passes over.

    An engine of such a graph would attend to what is not filled yet.
    """
    return [
        node
        for node in attentions(model.graph)
        if len(node.input) > _FILLED_PLACE and node.input[_FILLED_PLACE]
    ]
