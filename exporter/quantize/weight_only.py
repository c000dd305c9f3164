"""Weight-only schemes: products and the table in blocks of 4 or 8 bits, activations in float."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from exporter.errors import QuantizationError
from exporter.progress import Progress
from exporter.quantize.gguf_blocks import GgufBlocks
from exporter.quantize.products import Product, Products, Quantised, refuse_not_finite
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

if TYPE_CHECKING:
    import onnx_ir as ir

COMPUTES_IN_INT8 = 4  # the accuracy level
_DIGITS = {4: 4, 8: 2}  # 16 bits: below what float32 loses in a whole model
_SUM_BITS = 4


@dataclass(frozen=True)
class FittedWeight:
    """A matrix with whole zero points, and how it is to be read."""

    blocks: Blocks
    sums: int = 0


def with_whole_zero_points(blocks: Blocks, level: int) -> FittedWeight:
    """A matrix with any offsets as one with whole zero points."""
    scales, bits, block = blocks.scales, blocks.bits, blocks.block
    zeros = np.clip(np.round(blocks.offsets), 0, (1 << bits) - 1).astype(np.float32)
    rest = scales * (zeros - blocks.offsets)
    if not rest.any():
        return FittedWeight(replace(blocks, offsets=zeros))
    parts = [(blocks.quants.astype(np.float32), scales, zeros)]
    for _ in range(1 if level == COMPUTES_IN_INT8 else _DIGITS[bits]):
        digit, rest = _digit(rest, bits, block)
        parts.append(digit)
    whole, steps, middles = (np.concatenate(part, axis=1) for part in zip(*parts, strict=True))
    return FittedWeight(Blocks(whole.astype(np.uint8), steps, middles, bits), len(parts) - 1)


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
        width = copies * -(-product.depth // block**2) * block
        key = (product.node.inputs[0], block, copies)
        if key not in self._followed:
            self._followed[key] = self._joined(product, block, copies, width)
        return self._followed[key], product.depth + width

    def _joined(self, product: Product, block: int, copies: int, width: int) -> ir.Value:
        x, graph = product.node.inputs[0], product.node.graph
        assert x is not None
        assert graph is not None
        ones = self._matrix(product, block, copies, width)
        inputs, size = (x, ones.quants, ones.scales), (product.depth, width)
        name = f"{product.name}{BLOCK_SUMS}"
        sums = matmul_nbits(inputs, name, size, _SUM_BITS, block, self._level)
        joined = ir.Node(
            "", "Concat", [x, sums.outputs[0]], [ir.AttrInt64("axis", -1)],
            name=f"{product.name}/followed_by_sums",
        )  # fmt: skip
        for node in (sums, joined):
            node.outputs[0].name, node.outputs[0].type = f"{node.name}/output", x.type
            node.metadata_props.update(product.node.metadata_props)
        graph.insert_before(product.node, [sums, joined])
        return joined.outputs[0]

    def _matrix(self, product: Product, block: int, copies: int, width: int) -> StoredWeight:
        key = (product.depth, block, copies)
        if key not in self._matrices:
            name = f"block_sums_{product.depth}_{block}_{copies}"
            ones = _summing(product.depth, block, copies, width)
            self._matrices[key] = self._store.store(ones, product.weight, name)
        return self._matrices[key]


def _summing(depth: int, block: int, copies: int, width: int) -> Blocks:
    """The matrix of ones that sums ``copies`` times over each block of ``depth`` numbers."""
    blocks = depth // block
    middle = 1 << (_SUM_BITS - 1)
    quants = np.full((width, blocks, block), middle, np.uint8)
    result = width // copies
    for number in range(blocks):
        quants[number::result, number] = middle + 1
    scales = np.ones((width, blocks), np.float32)
    return Blocks(quants, scales, np.full_like(scales, middle), _SUM_BITS)


_DATA_FILE = "packed.data"
_KEPT_BLOCKS = 0  # in place of bits


@dataclass(frozen=True, eq=False)
class WeightOnly:
    """One graph's quantisation."""

    model: ir.Model
    found: Products
    settings: QuantizeSettings
    gguf: GgufBlocks | None = None

    def run(self, stage: Path, progress: Progress) -> Quantised:
        """Rewrites the graph."""
        with WeightWriter(stage / _DATA_FILE) as writer:
            packer = _Packer(self, PackedWeights(self.model, writer))
            with progress.task("quantising", len(self.found.products), "products") as task:
                for product in self.found.products:
                    packer.product(product)
                    task.advance()
            in_float = dict(self.found.in_float) | packer.table()
            drop_unused(self.model, packer.replaced)
        if self.gguf is not None and not packer.kept:
            raise _nothing_kept(self.gguf.path, packer.rounded_anew)
        return Quantised(
            dict(packer.counts), packer.head_bits, packer.embedding_bits, in_float,
            dict(packer.kept), packer.rounded_anew,
        )  # fmt: skip

    def bits_of(self, product: Product) -> int:
        """How many bits a product's weight gets."""
        if product.head and self.settings.head_bits is not None:
            return self.settings.head_bits
        return self.settings.bits

    def shares_table(self, product: Product) -> bool:
        """Whether a head and the table are one weight, of which one packed form serves both."""
        table = self.found.table
        return (
            table is not None
            and table.is_head(product)
            and product.depth % self.settings.block == 0
            and self.bits_of(product) == self.settings.embedding_bits
        )


@dataclass(frozen=True, eq=False)
class _Weight:
    """A weight that was written; ``sums`` is as in :class:`FittedWeight`."""

    stored: StoredWeight
    bits: int
    block: int
    sums: int


class _Packer:
    """Packs one matrix after the other; a weight that several products read is packed once."""

    def __init__(self, work: WeightOnly, store: PackedWeights) -> None:
        self._work = work
        self._store = store
        self._sums = BlockSums(store, work.settings.level)
        self._packed: dict[tuple[ir.Value, bool, int], _Weight] = {}
        self.counts: Counter[int] = Counter()
        self.kept: Counter[str] = Counter()  # by GGUF type, "Q4_K+Q6_K" for a weight of several
        self.rounded_anew: dict[str, str] = {}
        self.replaced: list[ir.Value] = []
        self.head_bits: int | None = None
        self.embedding_bits: int | None = None

    def product(self, product: Product) -> None:
        """Packs a product's weight and puts it to use."""
        weight = self._weight_of(product)
        follow = None
        if weight.sums:
            follow = self._sums.follow(product, weight.block, weight.sums)
        level = self._work.settings.level
        use_in_product(product, weight.stored, weight.bits, weight.block, level, follow)
        self.counts[weight.bits] += 1
        self.replaced.append(product.weight)
        if product.head:
            self.head_bits = weight.bits

    def table(self) -> dict[str, str]:
        """Packs the tokens' table where that is asked for; else says why it stays in float."""
        table, bits = self._work.found.table, self._work.settings.embedding_bits
        if table is None or bits is None:
            return {}
        block = self._work.settings.block
        name = table.weight.name or "the embedding"
        weight = self._kept(table.weight, not table.transposed, name, table.matrix, whole=True)
        if weight is None and table.depth % block:
            return {name: f"its rows of {table.depth} are no multiple of the block of {block}"}
        if weight is None:

            def blocks() -> Blocks:
                matrix = table.matrix()
                refuse_not_finite(matrix, name)
                return self._rounded(matrix, bits, shared=True)

            weight = self._once((table.weight, not table.transposed, bits), blocks)
        use_in_table(
            table, self._store.flat(weight.stored), weight.stored, weight.bits, weight.block
        )
        self.replaced += [table.weight, weight.stored.quants]
        self.embedding_bits = weight.bits
        return {}

    def _weight_of(self, product: Product) -> _Weight:
        kept = self._kept(product.weight, product.transposed, product.name, product.matrix)
        if kept is not None:
            return kept
        bits, settings = self._work.bits_of(product), self._work.settings

        def blocks() -> Blocks:
            matrix = product.matrix()
            refuse_not_finite(matrix, product.name)
            if settings.method == "hqq" and len(matrix) % settings.block:
                raise _ragged(product.name, len(matrix), settings.block)
            return self._rounded(matrix, bits, self._work.shares_table(product))

        return self._once((product.weight, product.transposed, bits), blocks)

    def _kept(
        self,
        value: ir.Value,
        transposed: bool,
        name: str,
        matrix: Callable[[], Floats],
        *,
        whole: bool = False,
    ) -> _Weight | None:
        """A weight in the file's blocks, if it has any; ``whole`` takes no fractional offsets."""
        gguf, key = self._work.gguf, (value, transposed, _KEPT_BLOCKS)
        if gguf is None:
            return None
        if key not in self._packed:
            assert value.const_value is not None
            blocks = gguf.find(matrix(), value.const_value.dtype.numpy())
            if isinstance(blocks, str):
                self.rounded_anew[name] = blocks
                return None
            self.kept["+".join(blocks.kinds)] += 1
            self._packed[key] = self._written(value, blocks.blocks)
        weight = self._packed[key]
        if whole and weight.sums:
            self.rounded_anew[name] = "a table takes no fractional offsets"
            return None
        return weight

    def _rounded(self, matrix: Floats, bits: int, shared: bool) -> Blocks:
        """Rounds without a text, to whole zero points in a shared table and in unfilled blocks."""
        settings = self._work.settings
        block, symmetric = settings.block, settings.without_zero_points
        if shared or len(matrix) % block:
            return round_to_nearest(matrix, bits, block, symmetric=symmetric)
        by_hqq = settings.method == "hqq"
        return rounded(matrix, bits, block, symmetric=symmetric, by_hqq=by_hqq)

    def _once(self, key: tuple[ir.Value, bool, int], blocks: Callable[[], Blocks]) -> _Weight:
        if key not in self._packed:
            self._packed[key] = self._written(key[0], blocks())
        return self._packed[key]

    def _written(self, value: ir.Value, blocks: Blocks) -> _Weight:
        """Fractional zero points, which are slow, become further rows of whole blocks."""
        fitted = with_whole_zero_points(blocks, self._work.settings.level)
        stored = self._store.store(fitted.blocks, value)
        return _Weight(stored, blocks.bits, blocks.block, fitted.sums)


def _ragged(name: str, depth: int, block: int) -> QuantizationError:
    return QuantizationError(
        f"{name} sums over {depth} inputs, no multiple of the block of {block}: hqq's zero points "
        "would leave ONNX Runtime's fast kernel there.",
        "Take a --block-size that divides it, or --quantize-method rtn.",
        code="ragged-block",
    )


def _nothing_kept(gguf: Path, reasons: Mapping[str, str]) -> QuantizationError:
    first = next((f" {name}: {why}." for name, why in reasons.items()), "")
    return QuantizationError(
        f"No weight of the graph has its blocks in {gguf}.{first}",
        "Name the GGUF file that this graph was exported from.",
        code="nothing-to-quantize",
    )
