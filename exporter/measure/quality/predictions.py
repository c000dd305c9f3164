"""Next-token distributions of two arms, position by position.

Logits are reduced a few positions at a time in float64, so that memory doesn't grow with the text.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from exporter.backends.base import Array, Runner
from exporter.errors import ComparisonError
from exporter.measure.inputs import Shape, make_inputs

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


def figures(pair: tuple[Floats, Floats], targets: NDArray[np.int64], where: str) -> Floats:
    """What there is to know of some positions.

    Args:
        pair: The baseline's and the candidate's logits, ``[positions, vocabulary]``, float64.
            They are overwritten.
        targets: The next tokens of the first ``len(targets)`` positions; may be empty.
        where: What an error calls these positions.

    Returns:
        ``[len(COLUMNS), positions]``: 1; KL(baseline || candidate) in nats; whether the likeliest
        token is the same; the share of the baseline's five likeliest among the candidate's; 1 and
        both arms' negative log-likelihoods in nats where there is a target, else 0.

    Raises:
        ComparisonError: Logits are NaN or infinite.
    """
    found = np.zeros((len(COLUMNS), len(pair[0])))
    found[0] = 1
    rows = np.arange(len(targets))
    for arm, name in enumerate(("baseline", "candidate")):
        to_log_probabilities(pair[arm], f"The {name}'s logits in {where}")
        found[5 + arm, : len(targets)] = -pair[arm][rows, targets]
    found[4, : len(targets)] = 1
    best = [_likeliest(logits) for logits in pair]
    found[2] = best[0][:, 0] == best[1][:, 0]
    found[3] = (best[0][:, :, None] == best[1][:, None, :]).any(axis=2).mean(axis=1)
    found[1] = _divergence(*pair)
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


def _divergence(baseline: Floats, candidate: Floats) -> Floats:
    """KL(baseline || candidate) of each row of log probabilities, in nats."""
    probabilities = np.exp(baseline)
    with np.errstate(invalid="ignore"):  # a token that both rule out: -inf - -inf, weight 0
        baseline -= candidate
    weighted = np.zeros_like(baseline)
    np.multiply(probabilities, baseline, where=probabilities > 0, out=weighted)
    divergence: Floats = weighted.sum(axis=1)
    return divergence
