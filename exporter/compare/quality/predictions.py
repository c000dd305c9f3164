"""Next-token distributions of several arms, position by position.

Logits are reduced a few positions at a time in float64, so that memory doesn't grow with the text.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from exporter.engines.inputs import Shape, make_inputs
from exporter.engines.runners.base import Array, Runner
from exporter.errors import ComparisonError

LOGITS = "logits"
COLUMNS = ("positions", "kl", "top1", "top5", "predicted", "baseline_loss", "candidate_loss")
"""What :func:`figures` tells of each position; ``predicted`` is 1 where there is a loss."""

_CHUNK_BYTES = 6 * 2**20  # of float64 logits: small enough for the processor's caches
_LIKELIEST = 5

Floats = NDArray[np.float64]


def prefill_logits(runner: Runner, sample: NDArray[np.int64]) -> Array:
    """Logits of one sample, ``[positions, vocabulary]``.

    Args:
        runner: An entered runner with an output ``logits``.
        sample: Token ids, ``[positions]``.
    """
    inputs = make_inputs(runner.inputs, Shape("prefill", 1, len(sample)), sample[None])
    logits = runner.run(inputs, [LOGITS])[LOGITS]
    return logits.reshape(-1, logits.shape[-1])


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


def figures(baseline: Distributions, candidate: Distributions) -> Floats:
    """What there is to know of how two arms differ at the same positions.

    Returns:
        ``[len(COLUMNS), positions]``: 1; KL(baseline || candidate) in nats; whether the likeliest
        token is the same; the share of the baseline's five likeliest among the candidate's; 1 and
        both arms' negative log-likelihoods in nats where there is a target, else 0.
    """
    found = np.zeros((len(COLUMNS), len(baseline.log_probabilities)))
    predicted = len(baseline.losses)
    best = baseline.likeliest, candidate.likeliest
    found[0] = 1
    found[1] = divergence(baseline, candidate)
    found[2] = best[0][:, 0] == best[1][:, 0]
    found[3] = (best[0][:, :, None] == best[1][:, None, :]).any(axis=2).mean(axis=1)
    found[4, :predicted] = 1
    found[5, :predicted] = baseline.losses
    found[6, :predicted] = candidate.losses
    return found


def to_log_probabilities(logits: Floats, what: str) -> None:
    """Turns logits ``[..., vocabulary]`` into log probabilities, in place.

    Args:
        logits: Float64.
        what: The subject of the error's sentence.

    Raises:
        ComparisonError: They are NaN or infinite.
    """
    with np.errstate(invalid="ignore"):  # infinite logits become NaN here and are refused below
        logits -= logits.max(axis=-1, keepdims=True)
    normalizer = np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    if not np.isfinite(normalizer).all():
        raise ComparisonError(
            f"{what} are NaN or infinite.",
            "In fp16 an overflow is likely: export in float32 or bfloat16.",
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
