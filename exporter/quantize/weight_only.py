"""Weight-only schemes: products and the table in blocks of 4 or 8 bits, activations in float."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from exporter.errors import QuantizationError
from exporter.models.texts.calibration import CalibrationText
from exporter.progress import Progress
from exporter.quantize.calibration import second_moments
from exporter.quantize.gguf_blocks import GgufBlocks
from exporter.quantize.gptq import gptq, inverse_factor
from exporter.quantize.products import Product, Products, Quantised, Table
from exporter.quantize.refusals import refuse_not_finite
from exporter.quantize.rewrite import (
    PackedWeights,
    StoredWeight,
    drop_unused,
    use_in_product,
    use_in_table,
)
from exporter.quantize.rounding import Blocks, round_to_nearest, rounded
from exporter.quantize.settings import QuantizeSettings
from exporter.quantize.zero_points import BlockSums, with_whole_zero_points
from graph_passes.files.weight_file import WeightWriter

if TYPE_CHECKING:
    import onnx_ir as ir

_DATA_FILE = "packed.data"
_KEPT_BLOCKS = 0  # in place of bits

Matrix = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class WeightOnly:
    """One graph's quantisation.

    Attributes:
        model: The float graph; :meth:`run` changes it.
        found: Its products.
        settings: What is asked for.
        bits_by_node: Bits of single products, before all else.
        tokens: The calibration text; only GPTQ looks at it.
        threads: For running the model on it.
        gguf: The file whose blocks are kept.
    """

    model: ir.Model
    found: Products
    settings: QuantizeSettings
    bits_by_node: Mapping[str, int]
    tokens: CalibrationText | None
    threads: int
    gguf: GgufBlocks | None = None

    def run(self, stage: Path, progress: Progress) -> Quantised:
        """Rewrites the graph.

        Args:
            stage: A staging folder, in which the packed weights lie until the graph is written.
            progress: Told of each step.

        Raises:
            QuantizationError: A weight isn't finite, hqq meets blocks that aren't filled, or no
                weight has its blocks in the GGUF file.
            CalibrationError: GPTQ can't be computed for a layer.
        """
        moments = self._moments(stage, progress)
        with WeightWriter(stage / _DATA_FILE) as writer:
            packer = _Packer(self, PackedWeights(self.model, writer))
            with progress.task("quantising", len(self.found.products), "products") as task:
                for product, factor in moments:
                    packer.product(product, factor)
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
        if product.name in self.bits_by_node:
            return self.bits_by_node[product.name]
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

    def _moments(self, stage: Path, progress: Progress) -> Iterator[tuple[Product, Matrix | None]]:
        """Every product, for GPTQ with the factor of its input's moments; by input."""
        rounded = [p for p in self.found.products if self._is_plainly_rounded(p)]
        watched = [p for p in self.found.products if p not in rounded]
        if watched and self.tokens is not None:
            folder = stage / "watched"
            folder.mkdir()
            for value, moments in second_moments(
                self.model, watched, self.tokens, folder, threads=self.threads, progress=progress
            ):
                mine = [p for p in watched if p.node.inputs[0] is value]
                factor = inverse_factor(moments, mine[0].name)
                yield from ((product, factor) for product in mine)
        yield from ((product, None) for product in rounded)

    def _is_plainly_rounded(self, product: Product) -> bool:
        return self.settings.method != "gptq" or self.shares_table(product)


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

    def product(self, product: Product, factor: Matrix | None) -> None:
        """Packs a product's weight and puts it to use."""
        weight = self._weight_of(product, factor)
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
        weight = weight or self._rounded_table(table, name, bits)
        use_in_table(
            table, self._store.flat(weight.stored), weight.stored, weight.bits, weight.block
        )
        self.replaced.append(table.weight)
        self.embedding_bits = weight.bits
        return {}

    def _weight_of(self, product: Product, factor: Matrix | None) -> _Weight:
        kept = self._kept(product.weight, product.transposed, product.name, product.matrix)
        if kept is not None:
            return kept
        bits, settings = self._work.bits_of(product), self._work.settings

        def blocks() -> Blocks:
            matrix = product.matrix()
            refuse_not_finite(matrix, product.name)
            if factor is not None:
                symmetric = settings.without_zero_points
                return gptq(matrix, factor, bits, settings.block, symmetric=symmetric)
            if settings.method == "hqq" and len(matrix) % settings.block:
                raise _ragged(product.name, len(matrix), settings.block)
            return self._rounded(matrix, bits, self._work.shares_table(product))

        key = (product.weight, product.transposed, bits)
        if factor is not None:  # it is this product's alone
            self._packed.pop(key, None)
        return self._once(key, blocks)

    def _rounded_table(self, table: Table, name: str, bits: int) -> _Weight:
        def blocks() -> Blocks:
            matrix = table.matrix()
            refuse_not_finite(matrix, name)
            return self._rounded(matrix, bits, shared=True)

        return self._once((table.weight, not table.transposed, bits), blocks)

    def _kept(
        self,
        value: ir.Value,
        transposed: bool,
        name: str,
        matrix: Callable[[], Matrix],
        *,
        whole: bool = False,
    ) -> _Weight | None:
        """A weight in the file's blocks, if it has any; ``whole`` takes no fractional offsets."""
        gguf, key = self._work.gguf, (value, transposed, _KEPT_BLOCKS)
        if gguf is None:
            return None
        if key not in self._packed:
            assert value.const_value is not None
            found = gguf.find(matrix(), value.const_value.dtype.numpy())
            if isinstance(found, str):
                self.rounded_anew[name] = found
                return None
            self.kept["+".join(found.kinds)] += 1
            self._packed[key] = self._written(value, found.blocks)
        weight = self._packed[key]
        if whole and weight.sums:
            self.rounded_anew[name] = "a table takes no fractional offsets"
            return None
        return weight

    def _rounded(self, matrix: Matrix, bits: int, shared: bool) -> Blocks:
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
        code="no-usable-blocks",
    )
