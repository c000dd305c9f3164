"""How far a cut model's next-token distributions are from the whole model's."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from exporter.models.ablation.ratios import Floats, ratio, ratio_std_error


@dataclass(frozen=True, eq=False)
class Damage:
    """What a cut costs, by sample; sums over the sample's chosen positions.

    Attributes:
        positions: ``[samples]``, at how many positions.
        kl_sums: ``[samples]``, KL divergence of the whole model's distribution from the cut one's,
            in nats.
        nll_sums: ``[samples]``, negative log-likelihood of the next tokens under the cut model, in
            nats.
        baseline_nll_sums: ``[samples]``, the same under the whole model.
        agreements: ``[samples]``, at how many positions both think the same token the likeliest.
    """

    positions: Floats
    kl_sums: Floats
    nll_sums: Floats
    baseline_nll_sums: Floats
    agreements: Floats

    def of(self, samples: NDArray[np.bool_]) -> Damage:
        """On some of the samples, those that are True, ``[samples]``."""
        return Damage(*(getattr(self, each.name)[samples] for each in fields(self)))

    @property
    def kl(self) -> float:
        """Mean KL divergence at a position, in nats; 0 for an unchanged model."""
        return ratio(self.kl_sums, self.positions)

    @property
    def kl_std_error(self) -> float | None:
        """Standard error of :attr:`kl` over samples; None with fewer than two."""
        return ratio_std_error(self.kl_sums, self.positions)

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

    @property
    def top1_agreement(self) -> float:
        """Share of positions at which both think the same token the likeliest; 0 to 1."""
        return ratio(self.agreements, self.positions)


def joined(parts: list[Damage]) -> Damage:
    """The damage over several batches of samples."""
    names = Damage.__dataclass_fields__
    return Damage(**{n: np.concatenate([getattr(part, n) for part in parts]) for n in names})
