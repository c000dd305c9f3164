"""How far a cut model's answers are from the whole model's: distributions, or embeddings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from exporter.models.ablation.ratios import Floats, by_cluster, ratio, ratio_std_error


@dataclass(frozen=True, eq=False)
class BySample:
    """Numbers of each sample; every field is ``[samples]``, float64."""

    def of(self, samples: NDArray[np.bool_]) -> Self:
        """On some of the samples, those that are True, ``[samples]``."""
        return type(self)(*(getattr(self, each.name)[samples] for each in fields(self)))

    @property
    def distance(self) -> float:
        """How far the cut model's answers are from the whole one's; 0 for an unchanged model."""
        raise NotImplementedError

    @property
    def finite(self) -> NDArray[np.bool_]:
        """``[samples]``, whether the cut model's answers are finite."""
        numbers = [np.isfinite(getattr(self, each.name)) for each in fields(self)]
        found: NDArray[np.bool_] = np.logical_and.reduce(numbers)
        return found


@dataclass(frozen=True, eq=False)
class DistributionDamage(BySample):
    """What a cut costs distributions; sums over a sample's positions.

    Attributes:
        positions: ``[samples]``, at how many positions.
        kl_sums: ``[samples]``, KL divergence of the whole model's distribution from the cut one's,
            in nats.
        agreements: ``[samples]``, at how many positions both think the same answer the likeliest.
    """

    positions: Floats
    kl_sums: Floats
    agreements: Floats

    def by_document(self, clusters: NDArray[np.int64]) -> Self:
        """The sums of each document in place of each sample's, which makes errors those of these.

        Args:
            clusters: ``[samples]`` or more, of which document each is; where two samples give one
                answer, of each.
        """
        number = len(self.positions)
        clusters = clusters[:: max(1, len(clusters) // number)][:number]
        sums = (by_cluster(getattr(self, each.name), clusters) for each in fields(self))
        return type(self)(*sums)

    @property
    def distance(self) -> float:
        """The KL divergence, in nats."""
        return self.kl

    @property
    def kl(self) -> float:
        """Mean KL divergence at a position, in nats; 0 for an unchanged model."""
        return ratio(self.kl_sums, self.positions)

    @property
    def kl_std_error(self) -> float | None:
        """Standard error of :attr:`kl` over samples; None with fewer than two."""
        return ratio_std_error(self.kl_sums, self.positions)

    @property
    def top1_agreement(self) -> float:
        """Share of positions at which both think the same answer the likeliest; 0 to 1."""
        return ratio(self.agreements, self.positions)

    @property
    def top1_std_error(self) -> float | None:
        """Its standard error over samples; None with fewer than two."""
        return ratio_std_error(self.agreements, self.positions)


@dataclass(frozen=True, eq=False)
class ClassDamage(DistributionDamage):
    """What a cut costs distributions over classes; a text has one position, or one for a token."""


@dataclass(frozen=True, eq=False)
class Damage(DistributionDamage):
    """What a cut costs next-token distributions; sums over a sample's chosen positions.

    Attributes:
        nll_sums: ``[samples]``, negative log-likelihood of the next tokens under the cut model, in
            nats.
        baseline_nll_sums: ``[samples]``, the same under the whole model.
    """

    nll_sums: Floats
    baseline_nll_sums: Floats

    @property
    def finite(self) -> NDArray[np.bool_]:
        """``[samples]``, whether the cut model's answers are finite."""
        return np.isfinite(self.kl_sums) & np.isfinite(self.nll_sums)

    @property
    def log_perplexity_increase(self) -> float:
        """Log of the cut model's perplexity over the whole one's."""
        return ratio(self.nll_sums - self.baseline_nll_sums, self.positions)

    @property
    def log_perplexity_increase_std_error(self) -> float | None:
        """Its standard error over samples, both models on the same tokens."""
        return ratio_std_error(self.nll_sums - self.baseline_nll_sums, self.positions)

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
    """What a cut costs the embeddings of texts.

    Attributes:
        cosines: ``[samples]``, between the whole and the cut model's embedding of each text.
        pairs: ``[samples, 6]``, over the pairs that a text makes with others of its batch: their
            number, and with the pair's similarity ``x`` in the whole and ``y`` in the cut model the
            sums of ``x``, ``y``, ``xx``, ``yy`` and ``xy``.
    """

    cosines: Floats
    pairs: Floats

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
        return float(self.cosines.mean())

    @property
    def cosine_std_error(self) -> float | None:
        """Its standard error; None with fewer than two texts."""
        return ratio_std_error(self.cosines, np.ones_like(self.cosines))

    @property
    def correlations(self) -> Floats:
        """``[samples]``, Pearson's correlation of the pairs' similarities plus a text's influence.

        The mean is the correlation, the spread over texts that of it (each pair is of two texts).
        NaN where no text has another beside it, or all are alike.
        """
        count, x, y, xx, yy, xy = self.pairs.T
        with np.errstate(invalid="ignore", divide="ignore"):
            mx, my = x.sum() / count.sum(), y.sum() / count.sum()
            x2 = xx - 2 * mx * x + count * mx**2
            y2 = yy - 2 * my * y + count * my**2
            both = xy - mx * y - my * x + count * mx * my
            found = both.sum() / np.sqrt(x2.sum() * y2.sum())
            own = both / np.sqrt(x2.sum() * y2.sum())
            own = own - found * (x2 / x2.sum() + y2 / y2.sum()) / 2
            influences: Floats = found + 2 * len(count) * own
        return influences

    @property
    def correlation(self) -> float:
        """Of the similarities of pairs of texts in both models; 1 for an unchanged model."""
        return float(self.correlations.mean())

    @property
    def correlation_std_error(self) -> float | None:
        """Its standard error over texts; None with fewer than two."""
        return ratio_std_error(self.correlations, np.ones_like(self.cosines))


SIMILARITY = "similarity_correlation"
"""What plans and limits call :attr:`EmbeddingDamage.correlation`."""
AnyDamage = Damage | ClassDamage | EmbeddingDamage
D = TypeVar("D", bound=BySample)
D_co = TypeVar("D_co", bound=BySample, covariant=True)


def joined(parts: Sequence[D]) -> D:
    """The damage over several batches of samples, one at least."""
    first = parts[0]
    names = [each.name for each in fields(first)]
    return type(first)(*(np.concatenate([getattr(part, n) for part in parts]) for n in names))


def damage_of_numbers(told: Mapping[str, Any]) -> AnyDamage:
    """The damage whose fields are told by name."""
    kinds: tuple[type[AnyDamage], ...] = (EmbeddingDamage, ClassDamage)
    kind = next((k for k in kinds if {f.name for f in fields(k)} == set(told)), Damage)
    return kind(**{name: np.asarray(numbers, np.float64) for name, numbers in told.items()})
