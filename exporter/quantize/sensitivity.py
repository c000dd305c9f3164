"""Which products need 8 bits: the damage of rounding each one alone to 4, then a choice by bytes.

The damage is the KL divergence of the next token's probabilities from the float model's, in nats a
token. Damages of single products nearly add up while they are small (Yao et al., ZeroQuant-V2,
arXiv 2303.08302, choose by them too), so the order of damage per byte is the order in which
products get 8 bits; how many do is then measured with every product in its bits at once, by
bisection, for what was chosen together is not what was measured alone.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
from exporter.errors import CalibrationError, QuantizationError
from exporter.models.ablation.damage import Distributions, chunks, divergence
from exporter.models.texts.batches import Batch
from exporter.models.texts.calibration import CalibrationText
from exporter.progress import Progress
from exporter.quantize.calibration import feed
from exporter.quantize.products import Product, Products
from exporter.quantize.rewrite import rounded
from exporter.quantize.settings import QuantizeSettings
from graph_passes.files.storage import write_files

if TYPE_CHECKING:
    import onnx_ir as ir

LIMIT = 0.04
"""How far above the float model's the perplexity of the calibration text may be: 5 % on other text,
with a fifth of that for what other text and activations in int8 add."""
SAMPLES = 2
"""Of the calibration text, on which a choice is measured."""
TOKENS_ALONE = 128
"""Of a sample, for each product alone: a divergence over the whole vocabulary tells products
apart on few positions, where a perplexity would need thousands."""
_FILE = "weights_given.onnx"

Floats = NDArray[np.float32]
TokenIds = NDArray[np.int64]


@dataclass(frozen=True)
class Sensitivity:
    """One product."""

    name: str
    kl_divergence: float  # mean nats a token that 4 bits cost, all else in float
    bytes_more: int  # what 8 bits read more at each step


@dataclass(frozen=True)
class MixedBits:
    """A choice."""

    bits_by_node: dict[str, int]
    sensitivities: tuple[Sensitivity, ...]  # in the order in which they get 8 bits
    growth: float
    four_bit_growth: float  # the same with all of them in 4 bits


def search_mixed(
    model: ir.Model,
    found: Products,
    settings: QuantizeSettings,  # A head with bits of its own has these in every measurement
    tokens: CalibrationText,
    stage: Path,
    *,
    limit: float = LIMIT,  # how far the perplexity may be above the float model's, as a fraction
    threads: int,
    progress: Progress,
) -> MixedBits:
    """Chooses which products stay at 8 bits.

    The float model is held in memory. It is run about nine times on two samples and, where
    4 bits aren't enough for all, on 128 tokens once for each product.
    """
    known = tokens.input_ids[:SAMPLES]
    with _Trials(model, found.products, settings, stage, threads) as trials:
        choice = _Choice(_TrialText(trials, known), settings, progress)
        four = choice.growth(())
        if four <= 1 + limit:
            return MixedBits(choice.bits(()), (), four, four)
        eight = choice.growth_in_8_bits(limit)
        order = _order(trials, choice.products, known[:1, :TOKENS_ALONE], settings, progress)
        chosen, growth = choice.fewest([one.name for one in order], eight, limit)
    return MixedBits(choice.bits(chosen), tuple(order), growth, four)


def _order(
    trials: _Trials,
    products: Sequence[Product],
    token_ids: TokenIds,
    settings: QuantizeSettings,
    progress: Progress,
) -> list[Sensitivity]:
    """Products by what 4 bits in each of them alone cost, for a byte of 8 bits."""
    text, alone = _TrialText(trials, token_ids), []
    with progress.task("rounding one product at a time", len(products), "products") as task:
        for product in products:
            kl = text.damage({product.name: 4}).kl_divergence
            alone.append(Sensitivity(product.name, kl, _bytes_more(product, settings)))
            task.advance()
    return sorted(alone, key=lambda one: one.kl_divergence / one.bytes_more, reverse=True)


class _Choice:
    """Measures which products need 8 bits on a text, with all others in 4 bits."""

    def __init__(self, text: _TrialText, settings: QuantizeSettings, progress: Progress) -> None:
        heads = [p for p in text.products if p.head and settings.head_bits is not None]
        self.products = [product for product in text.products if product not in heads]
        self._fixed = {product.name: settings.head_bits or 8 for product in heads}
        self._text = text
        self._progress = progress

    def bits(self, eight: Collection[str]) -> dict[str, int]:
        """4 or 8 for each product that the choice is about."""
        return {product.name: 8 if product.name in eight else 4 for product in self.products}

    def growth(self, eight: Collection[str]) -> float:
        """Of the perplexity over the float model's, with these products in 8 bits."""
        growth = self._text.damage(self.bits(eight) | self._fixed).growth
        count = f"{len(eight)} of {len(self.products)}"
        self._progress.say(f"mixed: {count} products in 8 bits, perplexity {growth - 1:+.1%}")
        return growth

    def growth_in_8_bits(self, limit: float) -> float:
        """The growth with every product in 8 bits."""
        growth = self.growth([product.name for product in self.products])
        if growth > 1 + limit:
            raise QuantizationError(
                f"With every product in 8 bits the perplexity of the calibration text grows by "
                f"{growth - 1:.1%}, more than the {limit:.1%} that the scheme mixed allows.",
                "Take smaller blocks or another method, or keep the model in float.",
            )
        return growth

    def fewest(
        self, order: Sequence[str], growth: float, limit: float
    ) -> tuple[frozenset[str], float]:
        """The fewest of an order that are enough, and the growth then."""
        low, high = 0, len(order)
        while high - low > 1 + len(order) // 64:  # what fewer change, no text of this length tells
            middle = (low + high) // 2
            if (tried := self.growth(order[:middle])) <= 1 + limit:
                high, growth = middle, tried
            else:
                low = middle
        return frozenset(order[:high]), growth


@dataclass(frozen=True)
class _Damage:
    kl_divergence: float
    perplexity_ratio: float

    @property
    def growth(self) -> float:
        """The larger of two estimates: a thousand tokens alone tell a ratio to a percent or so."""
        return max(self.perplexity_ratio, _exp(self.kl_divergence))


def _exp(nats: float) -> float:
    with np.errstate(over="ignore"):  # infinite above 709 nats
        return float(np.exp(nats))


class _Trials:
    """The float graph with its products' weights as inputs, so that each run may round others."""

    def __init__(
        self,
        model: ir.Model,
        products: Sequence[Product],
        settings: QuantizeSettings,
        stage: Path,
        threads: int,
    ) -> None:
        self.products = products
        self._settings = settings
        file = _with_weights_given(model, products, stage)
        self._runner = OnnxRuntimeRunner(file, threads=threads)
        self._logits = model.graph.outputs[0].name or ""

    def __enter__(self) -> _Trials:
        """Loads the float model."""
        self._runner.__enter__()
        self._weights = {
            _name(product): self._runner.value(_stored(product)) for product in self.products
        }
        return self

    def __exit__(self, *exception: Any) -> None:
        """Frees the session."""
        self._runner.__exit__(*exception)

    def logits(self, token_ids: TokenIds, bits: Mapping[str, int]) -> Iterator[Floats]:
        """``[tokens, vocabulary]`` of each sample.

        token_ids: `[samples, tokens]`.
        """
        by_bits = sorted((p for p in self.products if p.name in bits), key=lambda p: -bits[p.name])
        given = {
            _name(product): self._runner.value(
                _rounded(product, bits[product.name], self._settings)
            )
            for product in by_bits
        }
        specs = [spec for spec in self._runner.inputs if spec.name not in self._weights]
        for sample in token_ids:
            alone = Batch(0, 0, sample[None], np.ones((1, len(sample)), np.bool_))
            inputs = feed(specs, alone).items()
            fed = {name: self._runner.value(array) for name, array in inputs}
            (logits,) = self._runner.run_bound(self._weights | given | fed, [self._logits])
            yield logits.numpy()[0].astype(np.float32, copy=False)


class _TrialText:
    """Some samples with the float model's logits, to measure trials against."""

    def __init__(self, trials: _Trials, token_ids: TokenIds) -> None:
        self.products = trials.products
        self._trials = trials
        self._token_ids = token_ids
        self._float = list(trials.logits(token_ids, {}))
        for logits, ids in zip(self._float, token_ids, strict=True):
            targets = logits[np.arange(len(ids) - 1), ids[1:]]
            if not (_are_finite(logits) and np.isfinite(targets).all()):
                raise CalibrationError(
                    "The model's perplexity on the calibration text is not finite.",
                    "Choose another text.",
                )

    def damage(self, bits: Mapping[str, int]) -> _Damage:
        """What products in so many bits cost, all others in float."""
        divergences, rises = [], []
        trial = self._trials.logits(self._token_ids, bits)
        for before, after, ids in zip(self._float, trial, self._token_ids, strict=True):
            if not _are_finite(after):
                return _Damage(math.inf, math.inf)
            for rows in chunks(0, len(ids), before.shape[1]):
                one, other = (
                    Distributions(
                        logits[rows].astype(np.float64), ids[rows.start + 1 : rows.stop + 1], "They"
                    )
                    for logits in (before, after)
                )
                divergences.append(divergence(one, other))
                rises.append(other.losses - one.losses)
        rise = np.concatenate(rises).mean()
        return _Damage(float(np.concatenate(divergences).mean()), _exp(rise))


def _are_finite(logits: Floats) -> bool:
    """Whether each position has a distribution: single tokens may be ruled out."""
    return bool(np.isfinite(logits.max(axis=-1)).all())


def _with_weights_given(model: ir.Model, products: Sequence[Product], stage: Path) -> Path:
    """Writes a copy of the graph in which weights are inputs."""
    if not model.graph.outputs or model.graph.outputs[0].name != "logits":
        raise QuantizationError(
            "The scheme mixed is for language models: the graph's first output is not logits.",
            "Choose int4 or int8.",
            code="no-logits",
        )
    copy = model.clone()
    for name in dict.fromkeys(map(_name, products)):
        value = copy.graph.initializers.pop(name)
        value.const_value = None
        copy.graph.inputs.append(value)
    write_files(copy, stage, _FILE, "compact")
    return stage / _FILE


def _name(product: Product) -> str:
    return product.weight.name or ""


def _stored(product: Product) -> NDArray[Any]:
    """A weight as the graph has it."""
    tensor = product.weight.const_value
    assert tensor is not None
    return np.ascontiguousarray(tensor.numpy())


def _rounded(product: Product, bits: int, settings: QuantizeSettings) -> NDArray[Any]:
    """A weight rounded to 4 or 8 bits, unpacked again."""
    matrix = product.matrix()
    symmetric, by_hqq = settings.without_zero_points, settings.method == "hqq"
    blocks = rounded(matrix, bits, settings.block, symmetric=symmetric, by_hqq=by_hqq)
    turned = blocks.values()[:, : product.depth]
    stored = turned if product.transposed else turned.T
    return np.ascontiguousarray(stored.astype(_stored(product).dtype))


def _bytes_more(product: Product, settings: QuantizeSettings) -> int:
    """8 bits against 4 bits; a zero point has as many bits as a weight."""
    blocks = -(-product.depth // settings.block)
    zeros = 0 if settings.without_zero_points else blocks
    return product.width * (product.depth + zeros) // 2
