"""One arm's answers to a text, and how far they are from another's to the same."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from exporter.artifacts import Accuracy, Interval, PerplexityPair, SampleLosses
from exporter.artifacts.latency import Shape
from exporter.compare.intervals import clipped, mean_interval, share_interval
from exporter.engines.runners.base import Array, Runner
from exporter.engines.tensors import TensorSpec, make_inputs, whole_phase
from exporter.errors import BackendError, ComparisonError
from exporter.models.ablation.damage import Clusters, Distributions, Floats, by_cluster, divergence
from exporter.models.sentence_folder import MEAN, Pooling
from graph_passes.fusing.pooling import EMBEDDING

LOGITS = "logits"
COLUMNS = ("positions", "kl", "top1", "predicted", "baseline_loss", "candidate_loss")
"""What :func:`figures` tells of each position; ``predicted`` is 1 where there is a loss."""
NO_TARGETS = np.zeros(0, np.int64)
OUTPUTS = (EMBEDDING, "last_hidden_state", "token_embeddings", "hidden_states")
"""Outputs that embed a text, the first that a model has."""
FEWEST_TEXTS = 3  # below that there are no two pairs to rank
_TYPES = "token_type_ids"


def prefill_logits(runner: Runner, sample: NDArray[np.int64]) -> Array:
    """Logits of one sample, ``[positions, vocabulary]``, by an entered runner."""
    shape = Shape(whole_phase(runner.inputs), 1, len(sample))
    inputs = make_inputs(runner.inputs, shape, sample[None])
    logits = all_logits(runner, inputs, shape)
    return logits.reshape(-1, logits.shape[-1])


def all_logits(runner: Runner, inputs: Mapping[str, Array], shape: Shape) -> Array:
    """The logits of every new token, ``[batch, new, vocabulary]`` or ``[new, vocabulary]``."""
    logits = runner.run(inputs, [LOGITS], phase=shape.phase)[LOGITS]
    tokens = shape.sequence_length
    if logits.shape[-2] != tokens:
        raise BackendError(
            f"The model on {runner.backend} gives the logits of {logits.shape[-2]} of {tokens} "
            "tokens; measures of accuracy need all.",
            "Build its engine with --logits all.",
            code="last-logits-only",
        )
    return logits


def class_rows(
    runner: Runner,
    ids: NDArray[np.int64],  # `[tokens]`
    what: str,
    *,
    types: NDArray[np.int64] | None = None,  # of which text of a pair each token is; None: one text
    separate: bool = False,
) -> Floats:
    """Log-probabilities of classes, ``[rows, classes]``: one row, or one for each token."""
    shape = Shape(whole_phase(runner.inputs), 1, len(ids))
    inputs = make_inputs(runner.inputs, shape, ids[None])
    if types is not None and _TYPES in inputs:
        inputs[_TYPES] = types[None].astype(inputs[_TYPES].dtype)
    logits = runner.run(inputs, [LOGITS], phase=shape.phase)[LOGITS]
    return log_probabilities_of(logits, what, separate=separate)


def log_probabilities_of(logits: NDArray[Any], what: str, *, separate: bool = False) -> Floats:
    """Of one text's or image's logits, ``[rows, classes]``; of separate labels a row each.

    A single logit is that of a yes, as rerankers have it: it makes two classes, the yes second.

    logits: `[1, classes]`, or `[1, tokens, classes]`.
    """
    rows = logits.astype(np.float64).reshape(-1, 1 if separate else logits.shape[-1])
    if rows.shape[1] == 1:
        rows = np.hstack([np.zeros_like(rows), rows])
    return Distributions(rows, NO_TARGETS, what).log_probabilities


def embedding_output(outputs: Sequence[TensorSpec]) -> str | None:
    """The output that embeds a text, or None."""
    names = {spec.name for spec in outputs}
    return next((name for name in OUTPUTS if name in names), None)


def embed(runner: Runner, ids: NDArray[np.int64], what: str, *, pooling: Pooling = MEAN) -> Floats:
    """One text's embedding, ``[size]``, finite and not zero."""
    name = embedding_output(runner.outputs)
    assert name is not None
    shape = Shape(whole_phase(runner.inputs), 1, len(ids))
    inputs = make_inputs(runner.inputs, shape, ids[None])
    values = runner.run(inputs, [name], phase=shape.phase)[name].astype(np.float64)
    states = values.reshape(-1, values.shape[-1])
    pools = MEAN if name == EMBEDDING else pooling  # a vector is its own mean
    embedding: Floats = pools(states, np.ones(len(states)))
    if not np.isfinite(embedding).all() or not embedding.any():
        raise ComparisonError(
            f"{what} is zero, NaN or infinite.",
            "In fp16 an overflow is likely: export in float32 or bfloat16.",
            code="not-finite",
        )
    return embedding


def unit_length(vectors: Floats) -> Floats:
    """Vectors ``[..., size]``, none of them zero, as long as 1."""
    unit: Floats = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    return unit


def check_tokens(largest_id: int, vocabulary: int) -> None:
    """Refuses tokens that a model doesn't know."""
    if largest_id >= vocabulary:
        raise ComparisonError(
            f"The text's token id {largest_id} is beyond the model's {vocabulary} tokens.",
            "The tokenizer next to the model belongs to another model.",
            code="token-out-of-range",
        )


def figures(baseline: Distributions, candidate: Distributions) -> Floats:
    """What there is to know of how two arms differ at the same positions.

    ``[len(COLUMNS), positions]``: 1; KL(baseline || candidate) in nats; whether the likeliest
    token is the same; 1 and both arms' negative log-likelihoods in nats where there is a target,
    else 0.
    """
    tensor = np.zeros((len(COLUMNS), len(baseline.log_probabilities)))
    predicted = len(baseline.losses)
    tensor[0] = 1
    tensor[1] = divergence(baseline, candidate)
    best, other = (arm.log_probabilities.argmax(axis=1) for arm in (baseline, candidate))
    tensor[2] = best == other
    tensor[3, :predicted] = 1
    tensor[4, :predicted] = baseline.losses
    tensor[5, :predicted] = candidate.losses
    return tensor


def accuracy_of(by_sample: Floats, source: str, sha256: str, clusters: Clusters = None) -> Accuracy:
    """What sums of :func:`figures` tell, ``[len(COLUMNS), samples]``, on a text of that name."""
    totals = dict(zip(COLUMNS, by_sample.sum(axis=1), strict=True))
    count = totals["positions"]
    if not count:
        raise ComparisonError("There is no token to compare the arms on.", code="no-tokens")
    samples = dict(zip(COLUMNS, by_sample, strict=True))
    with np.errstate(invalid="ignore"):  # infinite losses give no interval
        increase = samples["candidate_loss"] - samples["baseline_loss"]
    divergence_ends = mean_interval(samples["kl"], samples["positions"], clusters, positive=True)
    intervals = {
        "perplexity": mean_interval(increase, samples["predicted"], clusters),
        "kl_divergence": clipped(divergence_ends, 0.0, math.inf),
        "top1_agreement": share_interval(samples["top1"], samples["positions"], clusters),
    }
    return Accuracy(
        text_source=source,
        text_sha256=sha256,
        tokens=int(count),
        perplexity=_perplexity(totals),
        kl_divergence=float(totals["kl"] / count),
        top1_agreement=float(totals["top1"] / count),
        intervals={key: one for key, one in intervals.items() if one is not None},
        sample_losses=_losses(samples, clusters),
    )


def _losses(samples: dict[str, Floats], clusters: Clusters) -> SampleLosses | None:
    names = "predicted", "baseline_loss", "candidate_loss"
    tokens, *losses = (by_cluster(samples[name], clusters) for name in names)
    if not tokens.any() or not np.isfinite(losses).all():
        return None
    baseline, candidate = (values.tolist() for values in losses)
    return SampleLosses(tokens=tokens.astype(int).tolist(), baseline=baseline, candidate=candidate)


def _perplexity(totals: dict[str, np.float64]) -> PerplexityPair | None:
    if not totals["predicted"]:
        return None
    with np.errstate(over="ignore"):  # a model that is broken enough: infinite
        baseline, candidate = (
            float(np.exp(totals[f"{arm}_loss"] / totals["predicted"]))
            for arm in ("baseline", "candidate")
        )
    return PerplexityPair(baseline=baseline, candidate=candidate)


def compare_embeddings(
    baseline: Floats, candidate: Floats, clusters: Clusters = None
) -> tuple[dict[str, float], dict[str, Interval]]:
    """How near two arms' embeddings of the same texts are: figures and intervals by their keys.

    Spearman's correlation is of all pairs' similarities in one arm with those in the other, its
    interval a jackknife's over texts.

    baseline: of length 1, `[texts, size]`.
    """
    cosines = (baseline * candidate).sum(axis=1)
    similarities = baseline @ baseline.T, candidate @ candidate.T
    ranking = _rank_agreement(*similarities, np.arange(len(baseline)))
    figures = {
        "embedding_cosine": float(cosines.mean()),
        "lowest_cosine": float(cosines.min()),
        "rank_agreement": ranking,
    }
    intervals = {
        "embedding_cosine": clipped(
            mean_interval(cosines, np.ones_like(cosines), clusters), -1.0, 1.0
        ),
        "rank_agreement": _rank_interval(*similarities, ranking, clusters),
    }
    return figures, {key: one for key, one in intervals.items() if one is not None}


def _rank_agreement(first: Floats, second: Floats, texts: NDArray[np.intp]) -> float:
    """Of the similarities of all pairs of some texts, from those of all, ``[texts, texts]``."""
    above = np.triu_indices(len(texts), 1)
    pairs = texts[above[0]], texts[above[1]]
    return float(stats.spearmanr(first[pairs], second[pairs]).statistic)


def _rank_interval(
    first: Floats, second: Floats, whole: float, clusters: Clusters
) -> Interval | None:
    """By the jackknife over texts; None where a part has no order."""
    texts = np.arange(len(first))
    if len(texts) <= FEWEST_TEXTS or np.isnan(whole):
        return None
    without = [_rank_agreement(first, second, texts[texts != text]) for text in texts]
    values = len(texts) * whole - (len(texts) - 1) * np.array(without)
    spread = mean_interval(values, np.ones_like(values), clusters)
    if spread is None:
        return None
    low, high = (bound - spread.value + whole for bound in spread.ci95)
    return clipped(Interval(value=whole, ci95=(low, high)), -1.0, 1.0)
