"""Weight-only schemes: products and the table in blocks of 4 or 8 bits, activations in float."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from exporter.errors import QuantizationError
from exporter.progress import Progress
from exporter.quantize.gguf_blocks import GgufBlocks
from exporter.quantize.products import Product, Products, Quantised
from exporter.quantize.rewrite import (
    Blocks,
    Floats,
    PackedWeights,
    StoredWeight,
    drop_unused,
    matmul_nbits,
    round_to_nearest,
    rounded,
    use_in_product,
    use_in_table,
)
from exporter.quantize.settings import QuantizeSettings
from graph_passes.files.weight_file import WeightWriter
from graph_passes.finding.weights import BLOCK_SUMS

COMPUTES_IN_INT8 = 4  # the accuracy level
_DIGITS = {4: 4, 8: 2}  # 16 bits: below what float32 loses in a whole model
_SUM_BITS = 4
_DATA_FILE = "packed.data"
_KEPT_BLOCKS = 0  # in place of bits


def with_whole_zero_points(blocks: Blocks, level: int) -> tuple[Blocks, int]:
    """A matrix with any offsets as one with whole zero points, which are fast.

    What their fractions are becomes further rows, for so many copies of the inputs' block sums.
    """
    scales, bits, block = blocks.scales, blocks.bits, blocks.block
    zeros = np.clip(np.round(blocks.offsets), 0, (1 << bits) - 1).astype(np.float32)
    rest = scales * (zeros - blocks.offsets)
    if not rest.any():
        return replace(blocks, offsets=zeros), 0
    parts = [(blocks.quants.astype(np.float32), scales, zeros)]
    for _ in range(1 if level == COMPUTES_IN_INT8 else _DIGITS[bits]):
        digit, rest = _digit(rest, bits, block)
        parts.append(digit)
    whole, steps, middles = (np.concatenate(part, axis=1) for part in zip(*parts, strict=True))
    return Blocks(whole.astype(np.uint8), steps, middles, bits), len(parts) - 1


def _digit(rest: Floats, bits: int, block: int) -> tuple[tuple[Floats, Floats, Floats], Floats]:
    """Rounds ``[N, depth]`` to blocks around the middle, and tells what that leaves."""
    rows, depth = rest.shape
    middle = 1 << (bits - 1)
    wanted = np.pad(rest, ((0, 0), (0, -depth % block))).reshape(rows, -1, block)
    largest = np.abs(wanted).argmax(axis=2, keepdims=True)
    # The range has one step more below the middle: the largest number stands there.
    scale = -np.take_along_axis(wanted, largest, axis=2) / np.float32(middle)
    safe = np.where(scale == 0, np.float32(1), scale)
    steps: Floats = np.clip(np.round(wanted / safe), -middle, middle - 1)
    left: Floats = (wanted - steps * scale).reshape(rows, -1)[:, :depth]
    scales: Floats = scale[..., 0]
    return (steps + middle, scales, np.full_like(scales, middle)), left


class BlockSums:
    """Follows products' inputs by the sums of their blocks, once for each input."""

    def __init__(self, store: PackedWeights, level: int) -> None:
        self._store = store
        self._level = level
        self._matrices: dict[tuple[int, int, int], StoredWeight] = {}
        self._followed: dict[tuple[ir.Value | None, int, int], ir.Value] = {}

    def follow(self, product: Product, block: int, copies: int) -> tuple[ir.Value, int]:
        """Adds what computes ``[x, sums, ..., sums]`` before a product, which is unchanged."""
        x, graph, depth = product.node.inputs[0], product.node.graph, product.depth
        width = copies * -(-depth // block**2) * block
        key, size = (x, block, copies), (depth, block, copies)
        if key in self._followed:
            return self._followed[key], depth + width
        assert x is not None
        assert graph is not None
        if size not in self._matrices:
            ones, name = _summing(*size, width), f"block_sums_{depth}_{block}_{copies}"
            self._matrices[size] = self._store.store(ones, product.weight, name)
        name = f"{product.name}{BLOCK_SUMS}"
        sums = matmul_nbits(x, self._matrices[size], (depth, width), self._level, name)
        joined = ir.Node(
            "", "Concat", [x, sums.outputs[0]], [ir.AttrInt64("axis", -1)],
            name=f"{product.name}/followed_by_sums",
        )  # fmt: skip
        for node in (sums, joined):
            node.outputs[0].name, node.outputs[0].type = f"{node.name}/output", x.type
            node.metadata_props.update(product.node.metadata_props)
        graph.insert_before(product.node, [sums, joined])
        self._followed[key] = joined.outputs[0]
        return joined.outputs[0], depth + width


def _summing(depth: int, block: int, copies: int, width: int) -> Blocks:
    """The matrix of ones that sums ``copies`` times over each block of ``depth`` numbers."""
    blocks = depth // block
    middle = 1 << (_SUM_BITS - 1)
    quants = np.full((width, blocks, block), middle, np.uint8)
    for number in range(blocks):
        quants[number :: width // copies, number] = middle + 1
    scales = np.ones((width, blocks), np.float32)
    return Blocks(quants, scales, np.full_like(scales, middle), _SUM_BITS)


class WeightOnly:
    """One graph's quantisation; a weight that several products read is packed once."""

    def __init__(
        self,
        model: ir.Model,
        found: Products,
        settings: QuantizeSettings,
        gguf: GgufBlocks | None = None,
    ) -> None:
        self._model, self._found, self._settings, self._gguf = model, found, settings, gguf
        # By value, whether it is read turned, and bits: the weight and its copies of block sums.
        self._packed: dict[tuple[ir.Value, bool, int], tuple[StoredWeight, int]] = {}
        self._counts: Counter[int] = Counter()
        self._kept: Counter[str] = Counter()  # by GGUF types
        self._rounded_anew: dict[str, str] = {}

    def run(self, stage: Path, progress: Progress) -> Quantised:
        """Rewrites the graph."""
        products, level = self._found.products, self._settings.level
        in_float, head_bits, embedding_bits = dict(self._found.in_float), None, None
        with WeightWriter(stage / _DATA_FILE) as writer:
            self._store = PackedWeights(self._model, writer)
            block_sums = BlockSums(self._store, level)
            with progress.task("quantising", len(products), "products") as task:
                for product in products:
                    weight, sums = self._weight_of(product)
                    follow = block_sums.follow(product, weight.block, sums) if sums else None
                    use_in_product(product, weight, level, follow)
                    self._counts[weight.bits] += 1
                    head_bits = weight.bits if product.head else head_bits
                    task.advance()
            unused = [product.weight for product in products]
            table = self._found.table
            if table is not None and self._settings.embedding_bits is not None:
                packed = self._packed_table(table, self._settings.embedding_bits)
                if packed is None:
                    in_float[table.name] = (
                        f"its rows of {table.depth} are no multiple of the block of "
                        f"{self._settings.block}"
                    )
                else:
                    use_in_table(table, self._store.flat(packed), packed)
                    unused += [table.weight, packed.quants]
                    embedding_bits = packed.bits
            drop_unused(self._model, unused)
        if self._gguf is not None and not self._kept:
            first = next((f" {name}: {why}." for name, why in self._rounded_anew.items()), "")
            raise QuantizationError(
                f"No weight of the graph has its blocks in {self._gguf.path}.{first}",
                "Name the GGUF file that this graph was exported from.",
                code="nothing-to-quantize",
            )
        return Quantised(
            dict(self._counts), head_bits, embedding_bits, in_float, dict(self._kept),
            self._rounded_anew,
        )  # fmt: skip

    def _weight_of(self, product: Product) -> tuple[StoredWeight, int]:
        kept = self._kept_blocks(product)
        if kept is not None:
            return kept
        settings, table = self._settings, self._found.table
        bits = (settings.head_bits if product.head else None) or settings.bits
        # A head and the table may be one weight, of which one packed form serves both.
        shared = (
            table is not None
            and table.reads_same(product)
            and product.depth % settings.block == 0
            and bits == settings.embedding_bits
        )
        return self._rounded(product, bits, shared=shared)

    def _packed_table(self, table: Product, bits: int) -> StoredWeight | None:
        """The tokens' table; None where it can't be packed. It takes no fractional offsets."""
        kept = self._kept_blocks(table)
        if kept is not None and not kept[1]:
            return kept[0]
        if kept is not None:
            self._rounded_anew[table.name] = "a table takes no fractional offsets"
        if table.depth % self._settings.block:
            return None
        return self._rounded(table, bits, shared=True)[0]

    def _kept_blocks(self, product: Product) -> tuple[StoredWeight, int] | None:
        """A weight in the GGUF file's blocks, if it has any."""
        key = (product.weight, product.transposed, _KEPT_BLOCKS)
        if self._gguf is not None and key not in self._packed:
            assert product.weight.const_value is not None
            dtype = product.weight.const_value.dtype.numpy()
            blocks = self._gguf.find(product.matrix(), dtype)
            if isinstance(blocks, str):
                self._rounded_anew[product.name] = blocks
                return None
            self._kept[blocks.kinds] += 1
            self._packed[key] = self._written(product, blocks.blocks)
        return self._packed.get(key)

    def _rounded(self, product: Product, bits: int, *, shared: bool) -> tuple[StoredWeight, int]:
        """Rounds without a text, to whole zero points in a shared table and in unfilled blocks."""
        key = (product.weight, product.transposed, bits)
        if key in self._packed:
            return self._packed[key]
        settings, matrix = self._settings, product.matrix()
        block, symmetric = settings.block, settings.without_zero_points
        ragged, by_hqq = bool(len(matrix) % block), settings.method == "hqq"
        if ragged and by_hqq:
            raise QuantizationError(
                f"{product.name} sums over {len(matrix)} inputs, no multiple of the block of "
                f"{block}: hqq's zero points would leave ONNX Runtime's fast kernel there.",
                "Take a --block-size that divides it, or --quantize-method rtn.",
                code="ragged-block",
            )
        if shared or ragged:
            blocks = round_to_nearest(matrix, bits, block, symmetric=symmetric)
        else:
            blocks = rounded(matrix, bits, block, symmetric=symmetric, by_hqq=by_hqq)
        self._packed[key] = self._written(product, blocks)
        return self._packed[key]

    def _written(self, product: Product, blocks: Blocks) -> tuple[StoredWeight, int]:
        whole, sums = with_whole_zero_points(blocks, self._settings.level)
        return self._store.store(whole, product.weight), sums
