"""Packed weights in a graph: MatMulNBits for products, GatherBlockQuantized for the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from exporter.optional import require
from exporter.quantize.products import Product

if TYPE_CHECKING:
    from graph_passes.files.weight_file import WeightWriter

_QUANTIZER = "onnxruntime.quantization.matmul_nbits_quantizer"
_BESIDE_GRID = 0.05  # of a step: what rounding to bfloat16 can do, and far from what chance does

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Blocks:
    """A matrix ``[K, N]`` in blocks along ``K``; the last block may be filled up.

    Its numbers are ``scale * (q - offset)``.
    """

    quants: Bytes  # uint8 `[N, blocks, block]`
    scales: Floats  # float32 `[N, blocks]`; they may be negative
    offsets: Floats  # float32 `[N, blocks]`; without zero points the middle of the range
    bits: int

    @property
    def block(self) -> int:
        """Weights that share a scale."""
        return int(self.quants.shape[2])

    def widened(self, bits: int, block: int) -> Blocks:
        """The same numbers in smaller blocks of more bits, around the middle of these."""
        times = self.block // block
        shift = (1 << (bits - 1)) - (1 << (self.bits - 1))
        return Blocks(
            self.quants.reshape(len(self.quants), -1, block) + np.uint8(shift),
            np.repeat(self.scales, times, axis=1),
            np.repeat(self.offsets, times, axis=1) + np.float32(shift),
            bits,
        )


def round_to_nearest(matrix: Floats, bits: int, block: int, *, symmetric: bool) -> Blocks:
    """Takes each block's scale from its extremes.

    matrix: `[K, N]`.
    """
    quantizer = require(_QUANTIZER, extra="cpu")
    config = quantizer.DefaultWeightOnlyQuantConfig(
        block_size=block, is_symmetric=symmetric, bits=bits
    )
    packed, scales, zeros = quantizer.DefaultWeightOnlyQuantizer(config).qbits_block_quant(matrix)
    offsets = np.full_like(scales, 1 << (bits - 1))
    if not symmetric:
        offsets = unpack_bits(zeros, bits)[:, : scales.shape[1]].astype(np.float32)
    return Blocks(unpack_bits(packed, bits), scales, offsets, bits)


def already_rounded(matrix: Floats, bits: int, block: int) -> Blocks | None:
    """A matrix that was rounded before, as it is: steps of one size from a block's lowest number.

    Such are dequantised blocks of a scale and a minimum, Q4_1's for one. Their zero points are
    fractions, so that rounding them to whole ones would lose what the first rounding kept.

    matrix: `[K, N]`.
    """
    if len(matrix) % block:
        return None
    blocks = np.ascontiguousarray(matrix.T).reshape(matrix.shape[1], -1, block)
    lowest, highest = blocks.min(axis=2), blocks.max(axis=2)
    most = (1 << bits) - 1
    scales = (highest - lowest) / np.float32(most)
    flat = scales == 0  # its one number becomes the scale, and each q one
    scales = np.where(flat, np.where(lowest == 0, np.float32(1), lowest), scales)
    lowest = np.where(flat, np.float32(0), lowest)
    steps = (blocks - lowest[..., None]) / scales[..., None]
    whole = np.clip(np.round(steps), 0, most)
    if not np.abs(steps - whole).max(initial=0) <= _BESIDE_GRID:
        return None
    offsets = (-lowest / scales).astype(np.float32)
    return Blocks(whole.astype(np.uint8), scales.astype(np.float32), offsets, bits)


def rounded(
    matrix: Floats, bits: int, block: int, *, symmetric: bool, by_hqq: bool = False
) -> Blocks:
    """Rounds without a text.

    matrix: `[K, N]`.
    """
    if by_hqq:
        return round_by_hqq(matrix, bits, block)
    kept = None if symmetric or bits == 8 else already_rounded(matrix, bits, block)
    return kept or round_to_nearest(matrix, bits, block, symmetric=symmetric)


def round_by_hqq(matrix: Floats, bits: int, block: int) -> Blocks:
    """HQQ: moves the zero points, in float, for an error norm below 1 (Badri and Shaji, 2023)."""
    torch = require("torch", extra="torch")
    quantizer = require(_QUANTIZER, extra="cpu")
    config = quantizer.HQQWeightOnlyQuantConfig(block_size=block, bits=bits)
    turned = torch.from_numpy(np.ascontiguousarray(matrix.T))
    quants, scales, zeros = quantizer.HQQWeightOnlyQuantizer(config).quantize_internal(
        turned, bits=bits, group_size=block
    )
    width = matrix.shape[1]
    whole = quants.numpy().astype(np.uint8).reshape(width, -1, block)
    scales, zeros = scales.numpy().astype(np.float32), zeros.numpy().astype(np.float32)
    return Blocks(whole, scales.reshape(width, -1), zeros.reshape(width, -1), bits)


def pack_bits(numbers: Bytes, bits: int) -> Bytes:
    """Packs the last axis: two numbers of 4 bits a byte, the first one in the low half."""
    if bits == 8:
        return np.ascontiguousarray(numbers, np.uint8)
    even = np.pad(numbers, [(0, 0)] * (numbers.ndim - 1) + [(0, numbers.shape[-1] % 2)])
    return np.asarray(even[..., ::2] | (even[..., 1::2] << 4), np.uint8)


def unpack_bits(tight: Bytes, bits: int) -> Bytes:
    """Whole numbers of few bits, one a byte again; an odd count has one too many."""
    if bits == 8:
        return tight
    pairs = np.asarray(np.stack([tight & 15, tight >> 4], axis=-1), np.uint8)
    return pairs.reshape(*tight.shape[:-1], -1)


DOMAIN = "com.microsoft"


@dataclass(frozen=True, eq=False)
class StoredWeight:
    """A packed matrix as a graph's initializers: blocks, scales and, where there are any, zeros."""

    quants: ir.Value
    scales: ir.Value
    zeros: ir.Value | None
    bits: int
    block: int  # weights that share a scale


class PackedWeights:
    """Packed matrices, which go to a file of their own at once; the graph only points there."""

    def __init__(self, model: ir.Model, writer: WeightWriter) -> None:
        self._graph = model.graph
        self._writer = writer

    def store(self, blocks: Blocks, weight: ir.Value, name: str | None = None) -> StoredWeight:
        """Writes a matrix that takes a weight's place; scales are of the weight's type."""
        tensor = weight.const_value
        assert tensor is not None
        base, bits = name or f"{weight.name}_Q{blocks.bits}", blocks.bits
        quants = self._added(base, pack_bits(blocks.quants, bits))
        scales = self._added(f"{base}_scales", blocks.scales.astype(tensor.dtype.numpy()))
        zeros = None
        if not (blocks.offsets == 1 << (bits - 1)).all():
            whole = pack_bits(blocks.offsets.astype(np.uint8), bits)
            zeros = self._added(f"{base}_zero_points", whole)
        return StoredWeight(quants, scales, zeros, bits, blocks.block)

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
    level: int,
    follow: tuple[ir.Value, int] | None = None,  # what it reads instead, and how deep that is
) -> None:
    """Puts a MatMulNBits in a product's place, under the same names."""
    source, depth = follow or (product.node.inputs[0], product.depth)
    size, name = (depth, product.width), product.node.name
    _replace(product.node, matmul_nbits(source, stored, size, level, name, product.bias))


def use_in_table(table: Product, rows: ir.Value, stored: StoredWeight) -> None:
    """Puts a GatherBlockQuantized in the place of the Gather from the tokens' table.

    rows: the blocks as `[N, bytes]`.
    """
    numbers = {
        "gather_axis": 0, "quantize_axis": 1, "bits": stored.bits, "block_size": stored.block
    }  # fmt: skip
    inputs = [rows, table.node.inputs[1], stored.scales, stored.zeros]
    _replace(table.node, _node("GatherBlockQuantized", inputs, numbers, table.node.name))


def matmul_nbits(
    source: ir.Value | None,
    stored: StoredWeight,
    size: tuple[int, int],
    level: int,
    name: str | None,
    bias: ir.Value | None = None,
) -> ir.Node:
    """A product with a weight in blocks."""
    inputs = [source, stored.quants, stored.scales, stored.zeros, None, bias]
    numbers = {"K": size[0], "N": size[1], "bits": stored.bits, "block_size": stored.block}
    if level:
        numbers["accuracy_level"] = level
    return _node("MatMulNBits", inputs, numbers, name)


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
    given = list(inputs)
    while given[-1] is None:
        given.pop()
    attributes = [ir.AttrInt64(key, number) for key, number in numbers.items()]
    return ir.Node(DOMAIN, operator, given, attributes, name=name, version=1)


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
