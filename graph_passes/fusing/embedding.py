"""Makes one operator of an encoder's embeddings, their sum, and the norm behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from graph_passes.finding.dataflow import is_add
from graph_passes.finding.shapes import Dim, dims
from graph_passes.fused_norms import DOMAIN, take_over
from graph_passes.fusing.masks import IDS

_EPSILON = 1e-5  # LayerNormalization's default
_LEAST, _MOST = 2, 3  # tokens and positions; their types


@dataclass(frozen=True, eq=False)
class _Embedding:
    """A table and what is looked up in it."""

    node: ir.Node
    table: ir.Value
    numbers: ir.Value


def fuse_embedding(graph: ir.Graph) -> int:
    """Fuses the embeddings of tokens, positions and types with the norm of their sum."""
    return int(any(_fuse(graph, node) for node in graph if node.op_type == "LayerNormalization"))


def _fuse(graph: ir.Graph, norm: ir.Node) -> bool:
    leaves = _leaves(norm.inputs[0])
    embeddings = [embedding for value in leaves if (embedding := _embedding(value)) is not None]
    if (
        len(embeddings) != len(leaves)
        or not _LEAST <= len(embeddings) <= _MOST
        or len(norm.inputs) != 3
    ):
        return False
    words = [item for item in embeddings if item.numbers.name == IDS]
    rest = [item for item in embeddings if item not in words]
    whole = dims(words[0].numbers) if len(words) == 1 else None
    types = next((item for item in rest if dims(item.numbers) == whole), None)
    positions = next((item for item in rest if item is not types), types)
    if len(rest) == 1:
        types = None
    if whole is None or positions is None or not _fits(positions, whole):
        return False
    if len(rest) == 2 and types is None:
        return False
    _write(graph, norm, words[0], positions, types)
    return True


def _leaves(value: ir.Value | None) -> list[ir.Value]:
    """What a sum is made of, if nobody else reads its parts."""
    if value is None:
        return []
    add = value.producer()
    if add is None or not is_add(add) or len(list(value.uses())) != 1:
        return [value]
    return [leaf for operand in add.inputs for leaf in _leaves(operand)]


def _embedding(value: ir.Value) -> _Embedding | None:
    node = value.producer()
    if node is None or node.op_type != "Gather" or node.attributes.get_int("axis", 0) != 0:
        return None
    table, numbers = node.inputs
    if table is None or numbers is None or not table.is_initializer():
        return None
    return _Embedding(node, table, numbers) if len(dims(table) or ()) == 2 else None


def _fits(positions: _Embedding, whole: Sequence[Dim]) -> bool:
    """Whether positions are told for each row, or once for all."""
    known = dims(positions.numbers)
    return known is not None and len(known) == 2 and known[0] in (1, whole[0])


def _write(
    graph: ir.Graph,
    norm: ir.Node,
    words: _Embedding,
    positions: _Embedding,
    types: _Embedding | None,
) -> None:
    made: dict[ir.Value, ir.Node] = {}
    parts = [words, positions] if types is None else [words, types, positions]
    for part in parts:
        made[part.numbers] = ir.Node(
            "", "Cast", [part.numbers], [ir.AttrInt64("to", ir.DataType.INT32)]
        )
    segment = None if types is None else made[types.numbers].outputs[0]
    inputs = [
        made[words.numbers].outputs[0], segment, words.table, positions.table,
        None if types is None else types.table, *norm.inputs[1:], None,
        made[positions.numbers].outputs[0],
    ]  # fmt: skip
    epsilon = ir.AttrFloat32("epsilon", norm.attributes.get_float("epsilon", _EPSILON))
    fused = ir.Node(
        DOMAIN, "EmbedLayerNormalization", inputs, [epsilon], num_outputs=2, name=norm.name,
        metadata_props=dict(norm.metadata_props),
    )  # fmt: skip
    norm.name = None
    graph.insert_before(norm, [*made.values(), fused])
    take_over(fused.outputs[0], norm.outputs[0])
    graph.opset_imports.setdefault(DOMAIN, 1)
