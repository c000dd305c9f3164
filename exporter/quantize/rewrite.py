"""Packed weights in a graph: MatMulNBits for products, GatherBlockQuantized for the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from exporter.quantize.products import Product, Table
from exporter.quantize.rounding import Blocks, pack_bits

if TYPE_CHECKING:
    from graph_passes.files.weight_file import WeightWriter

DOMAIN = "com.microsoft"


@dataclass(frozen=True, eq=False)
class StoredWeight:
    """A packed matrix as a graph's initializers: blocks, scales and, where there are any, zeros."""

    quants: ir.Value
    scales: ir.Value
    zeros: ir.Value | None


class PackedWeights:
    """Packed matrices, which go to a file of their own at once; the graph only points there.

    Args:
        model: The graph that they are for.
        writer: The file.
    """

    def __init__(self, model: ir.Model, writer: WeightWriter) -> None:
        self._graph = model.graph
        self._writer = writer

    def store(self, blocks: Blocks, weight: ir.Value, name: str | None = None) -> StoredWeight:
        """Writes a matrix that takes a weight's place; scales are of the weight's type.

        Args:
            blocks: The matrix; its offsets are whole.
            weight: The weight.
            name: Of the blocks; after the weight's where none is said.
        """
        tensor = weight.const_value
        assert tensor is not None
        base, bits = name or f"{weight.name}_Q{blocks.bits}", blocks.bits
        quants = self._added(base, pack_bits(blocks.quants, bits))
        scales = self._added(f"{base}_scales", blocks.scales.astype(tensor.dtype.numpy()))
        if (blocks.offsets == 1 << (bits - 1)).all():
            return StoredWeight(quants, scales, None)
        zeros = pack_bits(blocks.offsets.astype(np.uint8), bits)
        return StoredWeight(quants, scales, self._added(f"{base}_zero_points", zeros))

    def flat(self, stored: StoredWeight) -> ir.Value:
        """The same blocks as ``[N, bytes]``, in the same place of the file, as a table has them."""
        tensor = stored.quants.const_value
        assert isinstance(tensor, ir.ExternalTensor)
        rows = int(tensor.shape.numpy()[0])
        name = self._free_name(f"{stored.quants.name}_rows")
        shape = ir.Shape((rows, tensor.nbytes // rows))
        return self._registered(
            ir.ExternalTensor(
                tensor.location, tensor.offset, tensor.nbytes, tensor.dtype,
                shape=shape, name=name, base_dir=tensor.base_dir,
            )
        )  # fmt: skip

    def _added(self, name: str, array: NDArray[Any]) -> ir.Value:
        tensor = ir.tensor(np.ascontiguousarray(array), name=self._free_name(name))
        return self._registered(self._writer.add_passing(tensor))

    def _registered(self, tensor: ir.ExternalTensor) -> ir.Value:
        value = ir.Value(
            name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )  # fmt: skip
        self._graph.register_initializer(value)
        return value

    def _free_name(self, name: str) -> str:
        free, number = name, 1
        while free in self._graph.initializers:
            free, number = f"{name}.{number}", number + 1
        return free


def use_in_product(
    product: Product,
    stored: StoredWeight,
    bits: int,
    block: int,
    level: int,
    follow: tuple[ir.Value, int] | None = None,
) -> None:
    """Puts a MatMulNBits in a product's place, under the same names.

    Args:
        product: The product; its node is taken out of the graph.
        stored: Its weight.
        bits: 4 or 8.
        block: Weights that share a scale.
        level: ONNX Runtime's accuracy level; 0 leaves it open.
        follow: What it reads instead of its input, and how many columns that has.
    """
    source, depth = follow or (product.node.inputs[0], product.depth)
    inputs = [source, stored.quants, stored.scales, stored.zeros]
    if product.bias is not None:
        inputs += [None, product.bias]
    name, size = product.node.name, (depth, product.width)
    _replace(product.node, matmul_nbits(inputs, name, size, bits, block, level))


def use_in_table(table: Table, rows: ir.Value, stored: StoredWeight, bits: int, block: int) -> None:
    """Puts a GatherBlockQuantized in the place of the Gather from the tokens' table.

    Args:
        table: The table; its node is taken out of the graph.
        rows: The blocks as ``[N, bytes]``.
        stored: Their scales and zero points.
        bits: 4 or 8.
        block: Weights that share a scale.
    """
    numbers = {"gather_axis": 0, "quantize_axis": 1, "bits": bits, "block_size": block}
    inputs = [rows, table.node.inputs[1], stored.scales]
    if stored.zeros is not None:
        inputs.append(stored.zeros)
    _replace(table.node, _node("GatherBlockQuantized", inputs, numbers, table.node.name))


def matmul_nbits(
    inputs: Sequence[ir.Value | None],
    name: str | None,
    size: tuple[int, int],
    bits: int,
    block: int,
    level: int,
) -> ir.Node:
    """A product with a weight in blocks.

    Args:
        inputs: ``x``, blocks, scales, zero points, groups, bias; those at the end may be None.
        name: The node's.
        size: ``K`` and ``N``.
        bits: Of the weight.
        block: Weights that share a scale.
        level: ONNX Runtime's accuracy level; 0 leaves it open.
    """
    given = list(inputs)
    while given[-1] is None:
        given.pop()
    numbers = {"K": size[0], "N": size[1], "bits": bits, "block_size": block}
    if level:
        numbers["accuracy_level"] = level
    return _node("MatMulNBits", given, numbers, name)


def drop_unused(model: ir.Model, weights: Sequence[ir.Value]) -> None:
    """Takes float weights out of the graph that nothing reads any more, and what turned them."""
    outputs = set(model.graph.outputs)
    for weight in weights:
        for node, _ in list(weight.uses()):
            if node.op_type == "Transpose" and not _is_read(node.outputs[0], outputs):
                model.graph.remove(node, safe=True)
        name = weight.name or ""
        if not _is_read(weight, outputs) and name in model.graph.initializers:
            del model.graph.initializers[name]


def _is_read(value: ir.Value, outputs: set[ir.Value]) -> bool:
    return bool(list(value.uses())) or value in outputs


def _node(
    operator: str, inputs: Sequence[ir.Value | None], numbers: Mapping[str, int], name: str | None
) -> ir.Node:
    attributes = [ir.AttrInt64(key, number) for key, number in numbers.items()]
    return ir.Node(DOMAIN, operator, inputs, attributes, name=name, version=1)


def _replace(old: ir.Node, node: ir.Node) -> None:
    """Puts a node in another one's place, under the same names."""
    graph = old.graph
    assert graph is not None
    before, after = old.outputs[0], node.outputs[0]
    after.name, after.shape, after.type = before.name, before.shape, before.type
    after.metadata_props.update(before.metadata_props)
    node.metadata_props.update(old.metadata_props)
    graph.insert_after(old, node)
    before.replace_all_uses_with(after, replace_graph_outputs=True)
    graph.remove(old, safe=True)
    graph.opset_imports.setdefault(DOMAIN, 1)
