"""How far a cut model's answers are from the whole model's: distributions, or embeddings."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from exporter.artifacts.plan_figures import PLAN_KINDS, PlanKind
from exporter.errors import ComparisonError

if TYPE_CHECKING:
    import torch

Floats = NDArray[np.float64]
SIMILARITY = "similarity_correlation"
"""What plans call the correlation of embeddings' similarities."""
Clusters = NDArray[np.int64] | None
"""``[samples]``, of which document each is; None: each is one of its own."""


def by_cluster(values: Floats, clusters: Clusters) -> Floats:
    """Sums over each cluster's samples, ``[samples, ...]`` to ``[clusters, ...]``."""
    if clusters is None:
        return values
    names, labels = np.unique(clusters, return_inverse=True)
    sums: Floats = np.zeros((len(names), *values.shape[1:]))
    np.add.at(sums, labels, values)
    return sums


def ratio(sums: Floats, counts: Floats) -> float:
    """``sum(sums) / sum(counts)``."""
    return float(sums.sum() / counts.sum())


def ratio_std_error(sums: Floats, counts: Floats, clusters: Clusters = None) -> float | None:
    """Standard error of :func:`ratio` over clusters; None with fewer than two that count."""
    sums, counts = by_cluster(sums, clusters), by_cluster(counts, clusters)
    if np.count_nonzero(counts) < 2:
        return None
    total = counts.sum()
    residuals = sums - ratio(sums, counts) * counts
    variance = (residuals**2).sum() / (1 - ((counts / total) ** 2).sum())
    return float(np.sqrt(variance) / total)


def degrees_of_freedom(counts: Floats) -> float:
    """Of :func:`ratio_std_error`: one less than the clusters if they are equal, else fewer.

    Satterthwaite's, as Bell and McCaffrey, "Bias reduction in standard errors for linear regression
    with multi-stage samples" (Survey Methodology 28, 2002), have them for a mean.
    """
    shares = counts / counts.sum()
    second, third = (shares**2).sum(), (shares**3).sum()
    return float((1 - second) ** 2 / (second - 2 * third + second**2))


class RatioSums:
    """The same of many things at once, each sample a cluster, from sums that don't grow with them.

    Args:
        shape: How many things, in as many axes as wanted.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        # Per sample i, with d_i the sum of its tokens' values and n_i their number:
        self._d, self._dd, self._dn = (np.zeros(shape) for _ in range(3))
        self._n, self._nn, self._samples = 0.0, 0.0, 0

    def add(self, sums: Floats, weights: Floats) -> None:
        """Takes some samples.

        sums: `[*shape, samples]`, each sample's sum.
        weights: `[samples]`, over how many tokens.
        """
        self._d += sums.sum(axis=-1)
        self._dd += (sums * sums).sum(axis=-1)
        self._dn += (sums * weights).sum(axis=-1)
        self._n += float(weights.sum())
        self._nn += float((weights * weights).sum())
        self._samples += int(np.count_nonzero(weights))

    @property
    def total_weight(self) -> float:
        """Over how many tokens the means go."""
        return self._n

    @property
    def means(self) -> Floats:
        """``shape``; NaN before any token was there."""
        with np.errstate(invalid="ignore"):
            means: Floats = self._d / self._n if self._n else self._d * np.nan
        return means

    @property
    def std_errors(self) -> Floats | None:
        """``shape``; None with fewer than two samples that count."""
        if self._samples < 2:
            return None
        means, unequal = self.means, self._nn / self._n**2
        squares = self._dd - 2 * means * self._dn + means * means * self._nn
        errors: Floats = np.sqrt(np.maximum(0.0, squares) / (1 - unequal)) / self._n
        return errors


Objective = Literal["kl", "perplexity", "cosine", "similarity"]
"""What searches keep small."""


class Sums(NamedTuple):
    """A figure's numbers of each sample: their mean, or a share of what counts."""

    values: Floats  # `[samples]`
    counts: Floats  # `[samples]`


@dataclass(frozen=True, eq=False)
class BySample:
    """Numbers of each sample; every field is ``[samples]``, float64."""

    kind: ClassVar[PlanKind]  # its figures

    def of(self, samples: NDArray[np.bool_]) -> Self:
        """On some of the samples, those that are True, ``[samples]``."""
        return type(self)(*(getattr(self, field.name)[samples] for field in fields(self)))

    def by_document(self, clusters: NDArray[np.int64]) -> Self:
        """Numbers of documents, `[samples]` or more, in place of samples: errors are then those."""
        number = len(self.finite)
        own = clusters[:: max(1, len(clusters) // number)][:number]
        return type(self)(*(by_cluster(getattr(self, field.name), own) for field in fields(self)))

    @property
    def distance(self) -> float:
        """How far the cut model's answers are from the whole one's; 0 for an unchanged model."""
        raise NotImplementedError

    def objective(self, name: Objective) -> float:
        """The number that a search keeps small: in nats, or what embeddings lack of 1."""
        return self.distance

    def sums(self) -> dict[str, Sums]:
        """What each of its kind's figures is made of."""
        raise NotImplementedError

    def value(self, key: str) -> float:
        """A figure; NaN where it can't be told."""
        return ratio(*self.sums()[key])

    def std_error(self, key: str) -> float | None:
        """A figure's standard error over samples; None with fewer than two."""
        return ratio_std_error(*self.sums()[key])

    def figures(self) -> dict[str, float | None]:
        """What plans say of it, with standard errors; None or NaN where one can't be told."""
        sums = self.sums()
        means = [figure.key for figure in self.kind.figures if not figure.is_share]
        errors = {f"{key}_std_error": ratio_std_error(*sums[key]) for key in means}
        return {**{key: ratio(*one) for key, one in sums.items()}, **errors}

    @property
    def words(self) -> str:
        """It in a few words."""
        return ", ".join(
            f"{one.name} {one.written(self.value(one.key))}" for one in self.kind.figures
        )

    @property
    def finite(self) -> NDArray[np.bool_]:
        """``[samples]``, whether the cut model's answers are finite."""
        numbers = [np.isfinite(getattr(self, field.name)) for field in fields(self)]
        array: NDArray[np.bool_] = np.logical_and.reduce(numbers)
        return array


@dataclass(frozen=True, eq=False)
class DistributionDamage(BySample):
    """What a cut costs distributions; sums over a sample's positions."""

    positions: Floats  # `[samples]`, at how many positions
    # `[samples]`, KL divergence of the whole model's distribution from the cut one's, in nats
    kl_sums: Floats
    # `[samples]`, at how many positions both think the same answer the likeliest
    agreements: Floats

    @property
    def distance(self) -> float:
        """The KL divergence, in nats."""
        return self.kl

    @property
    def kl(self) -> float:
        """Mean KL divergence at a position, in nats; 0 for an unchanged model."""
        return self.value("kl")

    @property
    def top1_agreement(self) -> float:
        """Share of positions at which both think the same answer the likeliest; 0 to 1."""
        return self.value("top1_agreement")

    def sums(self) -> dict[str, Sums]:
        """See :class:`BySample`."""
        agreements = Sums(self.agreements, self.positions)
        return {"kl": Sums(self.kl_sums, self.positions), "top1_agreement": agreements}


@dataclass(frozen=True, eq=False)
class ClassDamage(DistributionDamage):
    """What a cut costs distributions over classes; a text has one position, or one for a token."""

    kind = PLAN_KINDS["classes"]


@dataclass(frozen=True, eq=False)
class Damage(DistributionDamage):
    """What a cut costs next-token distributions; sums over a sample's chosen positions."""

    kind = PLAN_KINDS["tokens"]
    # `[samples]`, negative log-likelihood of the next tokens under the cut model, in nats
    nll_sums: Floats
    baseline_nll_sums: Floats  # `[samples]`, the same under the whole model

    @property
    def finite(self) -> NDArray[np.bool_]:
        """``[samples]``, whether the cut model's answers are finite."""
        return np.isfinite(self.kl_sums) & np.isfinite(self.nll_sums)

    @property
    def log_perplexity_increase(self) -> float:
        """Log of the cut model's perplexity over the whole one's."""
        return self.value("log_perplexity_increase")

    def objective(self, name: Objective) -> float:
        """See :class:`BySample`."""
        return self.distance if name == "kl" else self.log_perplexity_increase

    def sums(self) -> dict[str, Sums]:
        """See :class:`BySample`."""
        rise = Sums(self.nll_sums - self.baseline_nll_sums, self.positions)
        return {"log_perplexity_increase": rise, **super().sums()}

    @property
    def perplexity(self) -> float:
        """Of the cut model."""
        return math.exp(min(700.0, ratio(self.nll_sums, self.positions)))

    @property
    def baseline_perplexity(self) -> float:
        """Of the whole model."""
        return math.exp(min(700.0, ratio(self.baseline_nll_sums, self.positions)))


@dataclass(frozen=True, eq=False)
class EmbeddingDamage(BySample):
    """What a cut costs the embeddings of texts; sums over a sample's texts."""

    kind = PLAN_KINDS["embeddings"]
    cosines: Floats  # `[samples]`, between the whole and the cut model's embedding of each text
    pairs: Floats
    texts: Floats  # `[samples]`, how many each is

    @property
    def finite(self) -> NDArray[np.bool_]:
        """``[samples]``, whether the cut model's embeddings are finite."""
        return np.isfinite(self.cosines)

    @property
    def distance(self) -> float:
        """1 minus the cosine."""
        return 1 - self.cosine

    @property
    def cosine(self) -> float:
        """Mean over the texts; 1 for an unchanged model."""
        return self.value("cosine")

    @property
    def correlations(self) -> Floats:
        """``[samples]``, Pearson's correlation of the pairs' similarities plus a text's influence.

        The mean is the correlation, the spread over texts its error: each pair is of two texts.
        NaN where no text has another beside it, or all are alike.
        """
        count, x, y, xx, yy, xy = self.pairs.T
        with np.errstate(invalid="ignore", divide="ignore"):
            mx, my = x.sum() / count.sum(), y.sum() / count.sum()
            x2 = xx - 2 * mx * x + count * mx**2
            y2 = yy - 2 * my * y + count * my**2
            both = xy - mx * y - my * x + count * mx * my
            total = both.sum() / np.sqrt(x2.sum() * y2.sum())
            own = both / np.sqrt(x2.sum() * y2.sum())
            own = own - total * (x2 / x2.sum() + y2 / y2.sum()) / 2
            influences: Floats = self.texts * total + 2 * self.texts.sum() * own
        return influences

    @property
    def correlation(self) -> float:
        """Of the similarities of pairs of texts in both models; 1 for an unchanged model."""
        return self.value(SIMILARITY)

    def objective(self, name: Objective) -> float:
        """See :class:`BySample`."""
        return 1 - self.correlation if name == "similarity" else self.distance

    def sums(self) -> dict[str, Sums]:
        """See :class:`BySample`."""
        cosine = Sums(self.cosines, self.texts)
        return {"cosine": cosine, SIMILARITY: Sums(self.correlations, self.texts)}


AnyDamage = BySample
DAMAGES: list[type[BySample]] = [Damage, ClassDamage, EmbeddingDamage]
"""By whose fields what was kept of a damage is read."""
D = TypeVar("D", bound=BySample)
D_co = TypeVar("D_co", bound=BySample, covariant=True)


def joined(parts: Sequence[D]) -> D:
    """The damage over several batches of samples, one at least."""
    first = parts[0]
    names = [field.name for field in fields(first)]
    return type(first)(*(np.concatenate([getattr(part, n) for part in parts]) for n in names))


def damage_of_numbers(numbers: Mapping[str, Any]) -> AnyDamage:
    """The damage whose fields are given by name."""
    kind = next(one for one in DAMAGES if {field.name for field in fields(one)} == set(numbers))
    return kind(**{name: np.asarray(values, np.float64) for name, values in numbers.items()})


_CHUNK_BYTES = 6 * 2**20  # of float64 logits: small enough for the processor's caches


def chunks(positions: int, vocabulary: int) -> Iterator[slice]:
    """Cuts positions so that one piece fits the caches."""
    step = max(1, _CHUNK_BYTES // (8 * vocabulary))
    for start in range(0, positions, step):
        yield slice(start, min(start + step, positions))


class Distributions:
    """One arm's next-token distributions at some positions.

    logits: `[positions, vocabulary]`, float64; overwritten.
    """

    def __init__(self, logits: Floats, targets: NDArray[np.int64], what: str) -> None:
        to_log_probabilities(logits, what)
        self.log_probabilities = logits  # `[positions, vocabulary]`
        # `[len(targets)]`, the negative log-likelihoods of the targets in nats
        self.losses: Floats = -logits[np.arange(len(targets)), targets]

    @cached_property
    def probabilities(self) -> Floats:
        """``[positions, vocabulary]``."""
        return np.exp(self.log_probabilities)


def to_log_probabilities(logits: Floats, what: str) -> None:
    """Turns logits ``[..., vocabulary]`` into log probabilities, in place."""
    with np.errstate(invalid="ignore"):  # infinite logits become NaN here and are refused below
        logits -= logits.max(axis=-1, keepdims=True)
    normalizer = np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    if not np.isfinite(normalizer).all():
        raise ComparisonError(
            f"{what} are NaN or infinite.",
            "In fp16 an overflow is likely: export in float32 or bfloat16.",
            code="not-finite",
        )
    logits -= normalizer


def divergence(baseline: Distributions, candidate: Distributions) -> Floats:
    """KL(baseline || candidate) of each position, in nats."""
    probabilities = baseline.probabilities
    with np.errstate(invalid="ignore"):  # a token that both rule out: -inf - -inf, weight 0
        differences = baseline.log_probabilities - candidate.log_probabilities
    weighted = np.zeros_like(differences)
    np.multiply(probabilities, differences, where=probabilities > 0, out=weighted)
    divergence: Floats = weighted.sum(axis=1)
    return divergence


class Reference:
    """The whole model's distributions for a batch, and what cut ones are held against.

    logits: of the whole model, `[batch, positions, vocabulary]`.
    targets: the next tokens, `[batch, positions]`.
    mask: where there is a next token, `[batch, positions]`, boolean.
    """

    def __init__(self, logits: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor) -> None:
        log_p = logits.float().log_softmax(-1)
        self._mask, self._targets = mask, targets
        self._nll = -_at(log_p, targets)
        self._likeliest = log_p.argmax(-1)
        self._p = log_p.exp()
        self._entropy_term = (self._p * log_p).nan_to_num(nan=0.0).sum(-1)

    @property
    def nbytes(self) -> int:
        """Memory of the probabilities, in bytes."""
        return self._p.numel() * self._p.element_size()

    @property
    def is_finite(self) -> bool:
        """Whether the whole model's own answers are."""
        return bool(np.isfinite(self._summed(self._nll)).all())

    def damage(self, logits: torch.Tensor) -> Damage:
        """Holds a cut model's logits against this; ``[batch, positions, vocabulary]``."""
        import torch

        wide = logits.float()
        normaliser = wide.logsumexp(-1)
        # sum p (log p - log q) with log q = logits - normaliser: q itself is never written.
        cross = torch.linalg.vecdot(self._p, wide)
        if bool(cross.isnan().any()):  # 0 times -inf: tokens that a model rules out
            cross = torch.where(self._p == 0, 0.0, self._p * wide).sum(-1)
        kl = self._entropy_term - cross + normaliser
        nll = normaliser - _at(wide, self._targets)
        return Damage(
            positions=self._summed(torch.ones_like(nll)),
            kl_sums=self._summed(kl.clamp(min=0.0)),
            nll_sums=self._summed(nll),
            baseline_nll_sums=self._summed(self._nll),
            agreements=self._summed((wide.argmax(-1) == self._likeliest).float()),
        )

    def _summed(self, values: torch.Tensor) -> Floats:
        import torch

        kept = torch.where(self._mask, values.double(), 0.0)
        sums: Floats = kept.sum(-1).cpu().numpy()
        return sums


def _at(values: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return values.gather(-1, targets[..., None])[..., 0]
