"""How far a cut model's next-token distributions are from the whole model's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from exporter.models.ablation.ratios import Floats, ratio, ratio_std_error

if TYPE_CHECKING:
    import torch


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


class Reference:
    """The whole model's distributions for a batch, and what cut ones are held against.

    Args:
        logits: Of the whole model, ``[batch, positions, vocabulary]``.
        targets: The next tokens, ``[batch, positions]``.
        mask: Where there is a next token, ``[batch, positions]``, boolean.
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
