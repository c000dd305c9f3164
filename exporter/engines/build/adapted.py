"""A graph as a builder is given it; the file stays as it is.

A builder refuses an Attention for which it has no kernel of its own, in float32 for one any with
more than one new token, unless it may write the operator out in basic ones. ONNX has no attribute
for that; the parsers read one of their own, ``TRT_decomposable``. Where there is a kernel the
engine is the same with it.

An engine for one phase reads no more of caches in place than is filled, where its library and the
graph allow it, see :mod:`graph_passes.fusing.one_phase`; with a mask it reads all the room. The
parsers pass over lengths, so they are set on the layers that a parser makes.

A decoder gives the logits of the last position alone, unless all are wanted.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import onnx_ir as ir

from exporter.engines.build.settings import BuildSettings, Logits, Phase
from exporter.engines.build.sidecar import AttentionRecord
from graph_passes.fusing.cache_in_place import SCATTER
from graph_passes.fusing.logits_to_keep import LogitsToKeepPass
from graph_passes.fusing.one_phase import LENGTHS, OnePhasePass

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


def read_graph(path: Path) -> onnx.ModelProto:
    """A graph without the weights that lie in files of their own."""
    return onnx.load(path, load_external_data=False)


def adapt(
    model: onnx.ModelProto, settings: BuildSettings, phases: Collection[Phase], module: ModuleType
) -> Adapted:
    """Changes a graph for an engine.

    Args:
        model: As it was read; it may be changed.
        settings: What is wanted.
        phases: What the engine serves.
        module: The library that builds it.
    """
    graph = ir.serde.deserialize_model(model)
    attention = _for_one_phase(graph, settings, phases, module)
    logits = _keep_logits(graph, settings, phases)
    unmasked = attention is not None and attention.reads != "room"
    changed = unmasked or (logits == "last" and "prefill" in phases)
    if changed:
        model = ir.serde.serialize_model(graph)
    return Adapted(model, let_decompose(model) or changed, attention, logits)


def _for_one_phase(
    graph: ir.Model, settings: BuildSettings, phases: Collection[Phase], module: ModuleType
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
    elif not has_lengths(module):
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


def has_lengths(module: ModuleType) -> bool:
    """Whether a library's attentions can be told lengths: TensorRT 11 and TensorRT-RTX 1.7 do."""
    return hasattr(module, "IAttentionInputLayer") and hasattr(
        getattr(module, "IAttention", None), "key_value_lengths"
    )


def set_lengths(network: Any, module: ModuleType) -> int:
    """Tells the attentions of a parsed decode step the lengths that the parser has passed over.

    Args:
        network: Parsed from a graph that :class:`OnePhasePass` has changed.
        module: The library.

    Returns:
        How many there are.

    Raises:
        RuntimeError: The network has no lengths.
    """
    layers = [network.get_layer(number) for number in range(network.num_layers)]
    outputs = (layer.get_output(0) for layer in layers if layer.num_outputs)
    lengths = next((tensor for tensor in outputs if tensor.name == LENGTHS), None)
    if lengths is None:
        raise RuntimeError(f"the parsed network has no tensor {LENGTHS}")
    told = network.add_cast(lengths, module.DataType.INT32).get_output(0)
    found = [each for each in layers if each.type == module.LayerType.ATTENTION_INPUT]
    for layer in found:
        layer.__class__ = module.IAttentionInputLayer  # the bindings give the base class alone
        layer.attention.key_value_lengths = told
        layer.attention.causal_kind = module.CausalMaskKind.NONE
    return len(found)


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
