"""Which products need 8 bits: the damage of rounding each one alone to 4, then a choice by bytes.

The damage is the KL divergence of the next token's probabilities from the float model's, in nats a
token. Damages of single products nearly add up while they are small (Yao et al., ZeroQuant-V2,
arXiv 2303.08302, choose by them too), so the order of damage per byte is the order in which
products get 8 bits; how many do is then measured with all others in 4 bits at once, by bisection,
for what was chosen together is not what was measured alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
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
from exporter.quantization.difference import log_softmax
from exporter.quantization.products import Product, Products
from exporter.quantization.rounding import half_quadratic, round_to_nearest, unpack
from exporter.quantization.settings import QuantizeSettings

if TYPE_CHECKING:
    import onnx_ir as ir

LIMIT = 0.04
"""How far above the float model's the perplexity of the calibration text may be: 5 % on other text,
with a fifth of that for what other text and activations in int8 add."""
SAMPLES = 2
"""Of the calibration text, for each product alone; all choices are measured on the same."""
_FILE = "weights_given.onnx"

Floats = NDArray[np.float32]


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
        sensitivities: In the order in which they get 8 bits.
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

    The float model is held in memory and run on ``samples`` samples once for each product, and a
    dozen times more; 8 bits count as no damage.

    Args:
        model: The float graph; it is unchanged.
        found: Its products.
        settings: How they are rounded; GPTQ's are looked at as rounded to nearest. A head with bits
            of its own is left alone.
        tokens: The calibration text.
        stage: A folder for a copy of the graph.
        limit: How far the perplexity may be above the float model's, as a fraction.
        samples: How many samples of the text are read.
        threads: For ONNX Runtime.
        progress: Who is told.

    Raises:
        QuantizationError: The model gives no logits, or 8 bits everywhere are not enough.
        CalibrationError: The text's perplexity isn't finite.
        BackendError: ONNX Runtime can't run the graph.
    """
    products = [p for p in found.products if not (p.head and settings.head_bits is not None)]
    with _Trials(model, products, settings, tokens.token_ids[:samples], stage, threads) as trials:
        alone = []
        with progress.task("rounding one product at a time", len(products)) as task:
            for product in products:
                kl = trials.measure([product]).kl_divergence
                alone.append(Sensitivity(product.name, kl, _bytes_more(product, settings)))
                task.advance()
        order = sorted(alone, key=lambda one: one.kl_divergence / one.bytes_more, reverse=True)
        count, grown, worst = _fewest(trials, products, order, limit)
    eight = {one.name for one in order[:count]}
    bits = {product.name: 8 if product.name in eight else 4 for product in products}
    return MixedBits(bits, tuple(order), grown, worst)


def _fewest(
    trials: _Trials, products: Sequence[Product], order: Sequence[Sensitivity], limit: float
) -> tuple[int, float, float]:
    """How many need 8 bits, the growth then, and with none."""

    def growth(count: int) -> float:
        eight = {one.name for one in order[:count]}
        return trials.measure([p for p in products if p.name not in eight]).growth

    worst = growth(0)
    low, high = 0, len(order)
    if worst <= 1 + limit:
        return 0, worst, worst
    best = 1.0  # all in 8 bits, which count as float here
    while high - low > 1:
        middle = (low + high) // 2
        if (tried := growth(middle)) <= 1 + limit:
            high, best = middle, tried
        else:
            low = middle
    return high, best, worst


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
        token_ids: NDArray[np.int64],
        stage: Path,
        threads: int,
    ) -> None:
        self._products = products
        self._settings = settings
        self._token_ids = token_ids
        file = _with_weights_given(model, products, stage)
        self._runner = OnnxRuntimeRunner(file, threads=threads)
        self._logits = model.graph.outputs[0].name or ""

    def __enter__(self) -> _Trials:
        """Loads, and runs the float model."""
        self._runner.__enter__()
        self._weights = {
            _name(product): self._runner.value(_stored(product)) for product in self._products
        }
        self._float = list(self._run({}))
        self._nll = self._surprise(self._float)
        if not np.isfinite(self._nll):
            raise CalibrationError(
                "The model's perplexity on the calibration text is not finite.",
                "Choose another text.",
            )
        return self

    def __exit__(self, *told: Any) -> None:
        """Frees the session."""
        self._runner.__exit__(*told)

    def measure(self, rounded: Iterable[Product]) -> _Damage:
        """What some products in 4 bits cost, all others in float."""
        other = {
            _name(product): self._runner.value(_rounded(product, self._settings))
            for product in rounded
        }
        logs = list(self._run(other))
        pairs = zip(self._float, logs, strict=True)
        kl = np.mean([np.sum(np.exp(one) * (one - two), axis=-1).mean() for one, two in pairs])
        return _Damage(float(kl), float(np.exp(self._surprise(logs) - self._nll)))

    def _run(self, other: Mapping[str, Any]) -> Iterable[Floats]:
        """Log-probabilities ``[tokens, vocabulary]`` of each sample."""
        specs = [spec for spec in self._runner.inputs if spec.name not in self._weights]
        phase: Phase = "prefill" if has_cache(specs) else "encode"
        for sample in self._token_ids:
            feed = make_inputs(specs, Shape(phase, 1, len(sample)), sample[None])
            given = {name: self._runner.value(array) for name, array in feed.items()}
            values = self._weights | dict(other) | given
            (logits,) = self._runner.run_bound(values, [self._logits])
            yield log_softmax(logits.numpy()[0].astype(np.float32))

    def _surprise(self, logs: Sequence[Floats]) -> float:
        """Mean negative log-likelihood of the next token."""
        told = [
            log[np.arange(len(sample) - 1), sample[1:]]
            for log, sample in zip(logs, self._token_ids, strict=True)
        ]
        return -float(np.concatenate(told).mean(dtype=np.float64))


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
    if settings.method == "hqq":
        packed = half_quadratic(matrix, 4, settings.block)
    else:
        symmetric = settings.without_zero_points
        packed = round_to_nearest(matrix, 4, settings.block, symmetric=symmetric)
    turned = unpack(packed, 4)[:, : product.depth]
    stored = turned if product.transposed else turned.T
    return np.ascontiguousarray(stored.astype(_stored(product).dtype))


def _bytes_more(product: Product, settings: QuantizeSettings) -> int:
    """8 bits against 4 bits; a zero point has as many bits as a weight."""
    blocks = -(-product.depth // settings.block)
    zeros = 0 if settings.without_zero_points else blocks
    return product.width * (product.depth + zeros) // 2
