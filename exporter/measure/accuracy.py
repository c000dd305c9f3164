"""How far the candidate's predictions are from the baseline's, on the same tokens.

One pass gives all three: perplexity of each arm, KL divergence, and agreement of the most likely
token. Logits are reduced sample by sample and, within a sample, a few positions at a time in
float64, so that memory doesn't grow with the number of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from exporter.artifacts import PerplexityPair
from exporter.backends.base import Array, Runner
from exporter.errors import ComparisonError
from exporter.measure.inputs import Shape, make_inputs
from exporter.progress import QUIET, Progress

LOGITS = "logits"
_CHUNK_BYTES = 6 * 2**20  # of float64 logits: small enough for the processor's caches


@dataclass(frozen=True)
class Agreement:
    """The result of :func:`compare_predictions`.

    Attributes:
        tokens: Positions that were compared.
        perplexity: exp of the mean negative log-likelihood of the next token, over all positions
            but the last of each sample; None for a model that doesn't predict the next token.
        kl_divergence: Mean over positions of KL(baseline || candidate), in nats.
        top1_agreement: Share of positions with the same most likely token.
    """

    tokens: int
    perplexity: PerplexityPair | None
    kl_divergence: float
    top1_agreement: float


def compare_predictions(
    baseline: Runner,
    candidate: Runner,
    token_ids: NDArray[np.int64],
    *,
    causal: bool,
    progress: Progress = QUIET,
) -> Agreement:
    """Runs both arms over the samples, one at a time, and reduces their logits.

    Args:
        baseline: The unpruned model; it has an output ``logits``.
        candidate: The pruned model, likewise.
        token_ids: ``[samples, sequence_length]``.
        causal: Whether position *i* predicts token *i + 1*.
        progress: Hears of each sample.

    Raises:
        ComparisonError: For vocabularies that differ or don't hold the tokens, and for logits
            that aren't finite.
    """
    sums = _Sums()
    with progress.task("perplexity, KL divergence, agreement", total=len(token_ids)) as task:
        for number, sample in enumerate(token_ids):
            shape = Shape("prefill", 1, len(sample))
            pair = [_logits(runner, shape, sample) for runner in (baseline, candidate)]
            if number == 0:
                _refuse_other_vocabulary(pair[0], pair[1])
                check_tokens(int(token_ids.max()), pair[0].shape[-1])
            sums.add_sample(pair[0], pair[1], sample if causal else None, number)
            task.advance()
    return sums.result()


def check_tokens(largest_id: int, vocabulary: int) -> None:
    """Refuses tokens that a model doesn't know.

    Raises:
        ComparisonError: When the largest token id lies beyond the vocabulary.
    """
    if largest_id >= vocabulary:
        raise ComparisonError(
            f"The text's token id {largest_id} is beyond the model's {vocabulary} tokens.",
            "The tokenizer beside the model belongs to another model.",
        )


def _refuse_other_vocabulary(baseline: Array, candidate: Array) -> None:
    if baseline.shape != candidate.shape:
        raise ComparisonError(
            f"The logits have the shapes {list(baseline.shape)} and {list(candidate.shape)}: "
            "the arms have other vocabularies or outputs.",
            "Compare two forms of the same model.",
        )


def _logits(runner: Runner, shape: Shape, sample: NDArray[np.int64]) -> Array:
    """Logits of one sample, ``[positions, vocabulary]``."""
    logits = runner.run(make_inputs(runner.inputs, shape, sample[None]), [LOGITS])[LOGITS]
    return logits.reshape(-1, logits.shape[-1])


@dataclass
class _Sums:
    """Running sums over positions."""

    positions: int = 0
    predicted: int = 0
    kl: float = 0.0
    same_top1: int = 0
    loss: NDArray[np.float64] = field(default_factory=lambda: np.zeros(2))

    def add_sample(
        self,
        baseline: Array,
        candidate: Array,
        sample: NDArray[np.int64] | None,
        number: int,
    ) -> None:
        for rows in _chunks(*baseline.shape):
            pair = [arm[rows].astype(np.float64) for arm in (baseline, candidate)]
            targets = None if sample is None else sample[rows.start + 1 : rows.stop + 1]
            self._add_chunk(pair[0], pair[1], targets, number)

    def _add_chunk(
        self,
        baseline: NDArray[np.float64],
        candidate: NDArray[np.float64],
        targets: NDArray[np.int64] | None,
        number: int,
    ) -> None:
        self.same_top1 += int((baseline.argmax(1) == candidate.argmax(1)).sum())
        self.positions += len(baseline)
        for arm, logits in enumerate((baseline, candidate)):
            _to_log_probabilities(logits, ("baseline", "candidate")[arm], number)
            if targets is not None:
                self.loss[arm] -= logits[np.arange(len(targets)), targets].sum()
        self.predicted += 0 if targets is None else len(targets)
        self.kl += _divergence(baseline, candidate)

    def result(self) -> Agreement:
        if not self.positions:
            raise ComparisonError("There is no token to compare the arms on.")
        return Agreement(
            tokens=self.positions,
            perplexity=self._perplexity(),
            kl_divergence=self.kl / self.positions,
            top1_agreement=self.same_top1 / self.positions,
        )

    def _perplexity(self) -> PerplexityPair | None:
        if not self.predicted:
            return None
        with np.errstate(over="ignore"):  # a model that is broken enough: infinite
            baseline, candidate = np.exp(self.loss / self.predicted)
        return PerplexityPair(baseline=float(baseline), candidate=float(candidate))


def _chunks(positions: int, vocabulary: int) -> Iterator[slice]:
    step = max(1, _CHUNK_BYTES // (8 * vocabulary))
    for start in range(0, positions, step):
        yield slice(start, min(start + step, positions))


def _to_log_probabilities(logits: NDArray[np.float64], arm: str, number: int) -> None:
    """Turns logits ``[positions, vocabulary]`` into log probabilities, in place."""
    with np.errstate(invalid="ignore"):  # infinite logits become NaN here and are refused below
        logits -= logits.max(axis=1, keepdims=True)
    normalizer = np.log(np.exp(logits).sum(axis=1, keepdims=True))
    if not np.isfinite(normalizer).all():
        raise ComparisonError(
            f"The {arm}'s logits in sample {number} are NaN or infinite.",
            "In fp16 an overflow is likely: export in float32 or bfloat16.",
        )
    logits -= normalizer


def _divergence(baseline: NDArray[np.float64], candidate: NDArray[np.float64]) -> float:
    """Sum over positions of KL(baseline || candidate) of log probabilities, in nats."""
    probabilities = np.exp(baseline)
    with np.errstate(invalid="ignore"):  # a token that both rule out: -inf - -inf, weight 0
        baseline -= candidate
    weighted = np.zeros_like(baseline)
    np.multiply(probabilities, baseline, where=probabilities > 0, out=weighted)
    return float(weighted.sum())
