"""How far one next-token distribution is from another: KL divergence in NumPy and in PyTorch.

NumPy serves what runners give, a few positions at a time in float64, so that memory doesn't grow
with the text. PyTorch serves models that are cut in memory, where their logits lie.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from exporter.errors import ComparisonError
from exporter.models.ablation.damage import Damage
from exporter.models.ablation.ratios import Floats

if TYPE_CHECKING:
    import torch

_CHUNK_BYTES = 6 * 2**20  # of float64 logits: small enough for the processor's caches
_LIKELIEST = 5


def chunks(first: int, last: int, vocabulary: int) -> Iterator[slice]:
    """Cuts the positions ``first`` to ``last`` (exclusive) so that one piece fits the caches."""
    step = max(1, _CHUNK_BYTES // (8 * vocabulary))
    for start in range(first, last, step):
        yield slice(start, min(start + step, last))


class Distributions:
    """One arm's next-token distributions at some positions.

    Args:
        logits: ``[positions, vocabulary]``, float64; overwritten.
        targets: The next tokens of the first ``len(targets)`` positions; may be empty.
        what: The subject of an error's sentence.

    Attributes:
        log_probabilities: ``[positions, vocabulary]``.
        losses: ``[len(targets)]``, the negative log-likelihoods of the targets in nats.

    Raises:
        ComparisonError: Logits are NaN or infinite.
    """

    def __init__(self, logits: Floats, targets: NDArray[np.int64], what: str) -> None:
        to_log_probabilities(logits, what)
        self.log_probabilities = logits
        self.losses: Floats = -logits[np.arange(len(targets)), targets]

    @cached_property
    def likeliest(self) -> NDArray[np.intp]:
        """``[positions, 5]``, the likeliest tokens, best first."""
        return _likeliest(self.log_probabilities)

    @cached_property
    def probabilities(self) -> Floats:
        """``[positions, vocabulary]``."""
        return np.exp(self.log_probabilities)


def to_log_probabilities(logits: Floats, what: str) -> None:
    """Turns logits ``[..., vocabulary]`` into log probabilities, in place.

    Args:
        logits: Float64.
        what: The subject of the error's sentence.
    """
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


def _likeliest(logits: Floats) -> NDArray[np.intp]:
    """The likeliest tokens of each row, best first; several passes beat one partition."""
    left = logits.copy()
    rows = np.arange(len(left))
    best = np.empty((len(left), min(_LIKELIEST, left.shape[1])), np.intp)
    for rank in range(best.shape[1]):
        best[:, rank] = left.argmax(axis=1)
        left[rows, best[:, rank]] = -np.inf
    return best


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
