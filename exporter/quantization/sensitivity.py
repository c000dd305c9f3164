"""Which products need 8 bits: the damage of rounding each one alone to 4, then a choice by bytes.

The damage is the KL divergence of the next token's probabilities from the float model's, in nats a
token. Damages of single products nearly add up while they are small (Yao et al., ZeroQuant-V2,
arXiv 2303.08302, choose by them too), so the order of damage per byte is the order in which
products get 8 bits; how many do is then measured with all others in 4 bits at once, by bisection,
for what was chosen together is not what was measured alone.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from exporter.artifacts import Phase
from exporter.backends.onnxruntime import OnnxRuntimeRunner
from exporter.errors import CalibrationError, QuantizationError
from exporter.measure.inputs import Shape, has_cache, make_inputs
from exporter.progress import Progress
from exporter.quantization.calibration import CalibrationTokens
from exporter.quantization.products import Product, Products
from exporter.quantization.rounding import rounded, unpack
from exporter.quantization.settings import QuantizeSettings

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
    """One product.

    Attributes:
        name: The product's.
        kl_divergence: Mean nats a token that 4 bits cost, all else in float.
        bytes_more: What 8 bits read more at each step.
    """

    name: str
    kl_divergence: float
    bytes_more: int


@dataclass(frozen=True)
class MixedBits:
    """A choice.

    Attributes:
        bits_by_node: 4 or 8 for each product that was looked at.
        sensitivities: In the order in which they get 8 bits; none where 4 are enough for all.
        growth: Of the perplexity of the calibration text over the float model's, as chosen:
            measured on the text's own tokens, or over all tokens by what the float model thinks of
            them (the exponential of the KL divergence), whichever is larger.
        four_bit_growth: The same with all of them in 4 bits.
    """

    bits_by_node: dict[str, int]
    sensitivities: tuple[Sensitivity, ...]
    growth: float
    four_bit_growth: float


def search_mixed(
    model: ir.Model,
    found: Products,
    settings: QuantizeSettings,
    tokens: CalibrationTokens,
    stage: Path,
    *,
    limit: float = LIMIT,
    samples: int = SAMPLES,
    threads: int,
    progress: Progress,
) -> MixedBits:
    """Chooses which products stay at 8 bits.

    The float model is held in memory. It is run about eight times on ``samples`` samples and, where
    4 bits aren't enough for all, on 128 tokens once for each product; 8 bits count as no damage.

    Args:
        model: The float graph; it is unchanged.
        found: Its products.
        settings: How they are rounded; GPTQ's are looked at as rounded to nearest. A head with bits
            of its own is left alone.
        tokens: The calibration text.
        stage: A folder for a copy of the graph.
        limit: How far the perplexity may be above the float model's, as a fraction.
        samples: How many samples of the text a choice is measured on.
        threads: For ONNX Runtime.
        progress: Who is told.

    Raises:
        QuantizationError: The model gives no logits, or 8 bits everywhere are not enough.
        CalibrationError: The text's perplexity isn't finite.
        BackendError: ONNX Runtime can't run the graph.
    """
    products = [p for p in found.products if not (p.head and settings.head_bits is not None)]
    known = tokens.token_ids[:samples]
    with _Trials(model, products, settings, stage, threads) as trials:
        choice = _Choice(trials.on(known), products, progress)
        worst, order = choice.growth(()), []
        eight, grown = frozenset[str](), worst
        if worst > 1 + limit:
            order = _order(trials, products, known[:1, :TOKENS_ALONE], settings, progress)
            eight, grown = choice.fewest([one.name for one in order], limit)
    bits = {product.name: 8 if product.name in eight else 4 for product in products}
    return MixedBits(bits, tuple(order), grown, worst)


def _order(
    trials: _Trials,
    products: Sequence[Product],
    token_ids: TokenIds,
    settings: QuantizeSettings,
    progress: Progress,
) -> list[Sensitivity]:
    """Products by what 4 bits in each of them alone cost, for a byte of 8 bits."""
    text, alone = trials.on(token_ids), []
    with progress.task("rounding one product at a time", len(products)) as task:
        for product in products:
            kl = text.damage([product]).kl_divergence
            alone.append(Sensitivity(product.name, kl, _bytes_more(product, settings)))
            task.advance()
    return sorted(alone, key=lambda one: one.kl_divergence / one.bytes_more, reverse=True)


@dataclass(frozen=True, eq=False)
class _Choice:
    """Which products get 8 bits, judged on a text with all others in 4 bits."""

    text: _Text
    products: Sequence[Product]
    progress: Progress

    def growth(self, eight: Collection[str]) -> float:
        """Of the perplexity, with these in 8 bits, which count as float."""
        grown = self.text.damage([p for p in self.products if p.name not in eight]).growth
        count = f"{len(eight)} of {len(self.products)}"
        self.progress.say(f"mixed: {count} products in 8 bits, perplexity {grown - 1:+.1%}")
        return grown

    def fewest(self, order: Sequence[str], limit: float) -> tuple[frozenset[str], float]:
        """The fewest of an order that are enough, and the growth then; none are known not to be."""
        low, high, best = 0, len(order), 1.0
        while high - low > 1 + len(order) // 64:  # what fewer change, no text of this length tells
            middle = (low + high) // 2
            if (tried := self.growth(order[:middle])) <= 1 + limit:
                high, best = middle, tried
            else:
                low = middle
        return frozenset(order[:high]), best


@dataclass(frozen=True)
class _Damage:
    kl_divergence: float
    perplexity_ratio: float

    @property
    def growth(self) -> float:
        """The larger of two estimates: a thousand tokens alone tell a ratio to a percent or so."""
        return max(self.perplexity_ratio, math.exp(self.kl_divergence))


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
        self._products = products
        self._settings = settings
        file = _with_weights_given(model, products, stage)
        self._runner = OnnxRuntimeRunner(file, threads=threads)
        self._logits = model.graph.outputs[0].name or ""

    def __enter__(self) -> _Trials:
        """Loads the float model."""
        self._runner.__enter__()
        self._weights = {
            _name(product): self._runner.value(_stored(product)) for product in self._products
        }
        return self

    def __exit__(self, *told: Any) -> None:
        """Frees the session."""
        self._runner.__exit__(*told)

    def on(self, token_ids: TokenIds) -> _Text:
        """Trials on some samples."""
        return _Text(self, token_ids)

    def logits(self, token_ids: TokenIds, rounded: Iterable[Product]) -> Iterator[Floats]:
        """``[tokens, vocabulary]`` of each sample, some products in 4 bits, all others in float."""
        given = {
            _name(product): self._runner.value(_rounded(product, self._settings))
            for product in rounded
        }
        specs = [spec for spec in self._runner.inputs if spec.name not in self._weights]
        phase: Phase = "prefill" if has_cache(specs) else "encode"
        for sample in token_ids:
            feed = make_inputs(specs, Shape(phase, 1, len(sample)), sample[None])
            fed = {name: self._runner.value(array) for name, array in feed.items()}
            (logits,) = self._runner.run_bound(self._weights | given | fed, [self._logits])
            yield logits.numpy()[0].astype(np.float32, copy=False)


class _Text:
    """What some samples tell of a trial.

    Raises:
        CalibrationError: The float model's perplexity on them isn't finite.
    """

    def __init__(self, trials: _Trials, token_ids: TokenIds) -> None:
        self._trials = trials
        self._token_ids = token_ids
        self._float = [_Predicted.by(logits) for logits in trials.logits(token_ids, [])]
        told = zip(self._float, token_ids, strict=True)
        self._nll = np.mean([_surprise(one.logits, one.log_sums, ids) for one, ids in told])
        if not np.isfinite(self._nll):
            raise CalibrationError(
                "The model's perplexity on the calibration text is not finite.",
                "Choose another text.",
            )

    def damage(self, rounded: Iterable[Product]) -> _Damage:
        """What some products in 4 bits cost, all others in float."""
        told = zip(
            self._float, self._trials.logits(self._token_ids, rounded), self._token_ids, strict=True
        )
        divergences, surprises = [], []
        for one, logits, ids in told:
            sums = _log_sums(logits)
            divergences.append(one.divergence(logits, sums))
            surprises.append(_surprise(logits, sums, ids))
        return _Damage(float(np.mean(divergences)), float(np.exp(np.mean(surprises) - self._nll)))


@dataclass(frozen=True, eq=False)
class _Predicted:
    """The float model's logits of a sample, their ``log(sum(exp))``, and the probabilities."""

    logits: Floats
    log_sums: Floats
    probabilities: Floats

    @classmethod
    def by(cls, logits: Floats) -> _Predicted:
        sums = _log_sums(logits)
        return cls(logits, sums, np.exp(logits - sums[:, None]))

    def divergence(self, logits: Floats, log_sums: Floats) -> float:
        """Mean KL divergence of other logits from these, nats a token."""
        lost = np.einsum("tv,tv->t", self.probabilities, self.logits - logits)
        return float(np.mean(log_sums - self.log_sums + lost, dtype=np.float64))


def _log_sums(logits: Floats) -> Floats:
    highest = logits.max(axis=-1)
    sums: Floats = highest + np.log(np.exp(logits - highest[:, None]).sum(axis=-1))
    return sums


def _surprise(logits: Floats, log_sums: Floats, token_ids: TokenIds) -> float:
    """Mean negative log-likelihood of the next token."""
    told = logits[np.arange(len(token_ids) - 1), token_ids[1:]]
    return float(np.mean(log_sums[:-1] - told, dtype=np.float64))


def _with_weights_given(model: ir.Model, products: Sequence[Product], stage: Path) -> Path:
    """Writes a copy of the graph in which weights are inputs."""
    from graph_passes.files.storage import write_files

    if not model.graph.outputs or model.graph.outputs[0].name != "logits":
        raise QuantizationError(
            "The scheme mixed is for language models: the graph's first output is not logits.",
            "Choose int4 or int8.",
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


def _rounded(product: Product, settings: QuantizeSettings) -> NDArray[Any]:
    """A weight of 4 bits, unpacked again."""
    matrix = product.matrix()
    symmetric, by_hqq = settings.without_zero_points, settings.method == "hqq"
    packed = rounded(matrix, 4, settings.block, symmetric=symmetric, half_quadratically=by_hqq)
    turned = unpack(packed, 4)[:, : product.depth]
    stored = turned if product.transposed else turned.T
    return np.ascontiguousarray(stored.astype(_stored(product).dtype))


def _bytes_more(product: Product, settings: QuantizeSettings) -> int:
    """8 bits against 4 bits; a zero point has as many bits as a weight."""
    blocks = -(-product.depth // settings.block)
    zeros = 0 if settings.without_zero_points else blocks
    return product.width * (product.depth + zeros) // 2
