"""How far one arm's predictions are from another's, on the same tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from numpy.typing import NDArray

from exporter.artifacts import Accuracy, PerplexityPair, SampleLosses
from exporter.artifacts.latency import Shape
from exporter.compare.evaluation import EvaluationTokens
from exporter.compare.intervals import clipped, mean_interval, share_interval
from exporter.engines.environment import default_threads
from exporter.engines.runners.base import Array, Runner
from exporter.engines.tensors import has_cache, make_inputs, whole_phase
from exporter.errors import BackendError, ComparisonError
from exporter.models.ablation.damage import (
    Clusters,
    Distributions,
    Floats,
    by_cluster,
    chunks,
    divergence,
)
from exporter.models.model_folder import ModelFolder
from exporter.progress import QUIET, Progress

LOGITS = "logits"
COLUMNS = ("positions", "kl", "top1", "top5", "predicted", "baseline_loss", "candidate_loss")
"""What :func:`figures` tells of each position; ``predicted`` is 1 where there is a loss."""


def predicts_next_token(runner: Runner, folder: ModelFolder) -> bool:
    """Whether a model with an output ``logits`` is causal, as its graph or its config says."""
    return has_cache(runner.inputs) or folder.predicts_next_token


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


def figures(baseline: Distributions, candidate: Distributions) -> Floats:
    """What there is to know of how two arms differ at the same positions.

    ``[len(COLUMNS), positions]``: 1; KL(baseline || candidate) in nats; whether the likeliest
    token is the same; the share of the baseline's five likeliest among the candidate's; 1 and
    both arms' negative log-likelihoods in nats where there is a target, else 0.
    """
    tensor = np.zeros((len(COLUMNS), len(baseline.log_probabilities)))
    predicted = len(baseline.losses)
    best = baseline.likeliest, candidate.likeliest
    tensor[0] = 1
    tensor[1] = divergence(baseline, candidate)
    tensor[2] = best[0][:, 0] == best[1][:, 0]
    tensor[3] = (best[0][:, :, None] == best[1][:, None, :]).any(axis=2).mean(axis=1)
    tensor[4, :predicted] = 1
    tensor[5, :predicted] = baseline.losses
    tensor[6, :predicted] = candidate.losses
    return tensor


def compare_predictions(
    arms: Mapping[str, Runner],
    pairs: Sequence[tuple[str, str]],
    tokens: EvaluationTokens,
    *,
    causal: bool,
    progress: Progress = QUIET,
) -> list[Accuracy]:
    """Runs every arm over the samples, one sample at a time, and reduces their logits."""
    token_ids = tokens.token_ids
    by_sample = np.zeros((len(pairs), len(COLUMNS), len(token_ids)))
    with (
        progress.task(
            "perplexity, KL divergence, agreement", total=len(token_ids), unit="samples"
        ) as task,
        ThreadPoolExecutor(default_threads()) as pool,
    ):
        for number, sample in enumerate(token_ids):
            logits = _logits(arms, sample, backwards=number % 2 == 1)
            vocabulary = _one_vocabulary(logits)
            check_tokens(int(token_ids.max()), vocabulary)
            targets = sample if causal else sample[:0]
            parts = list(chunks(len(sample), vocabulary))
            reduce = partial(_chunk, logits, pairs, sample=targets, number=number)
            for array in pool.map(reduce, parts):
                by_sample[:, :, number] += array.sum(axis=2)
            task.advance()
    return [accuracy_of(sums, tokens.source, tokens.sha256, tokens.documents) for sums in by_sample]


def _logits(
    arms: Mapping[str, Runner], sample: NDArray[np.int64], *, backwards: bool
) -> dict[str, Array]:
    """By arm; the one that was used last goes first, which helps those that are loaded in turns."""
    order = reversed(list(arms)) if backwards else arms
    arrays = {name: prefill_logits(arms[name], sample) for name in order}
    return {name: arrays[name] for name in arms}


def check_tokens(largest_id: int, vocabulary: int) -> None:
    """Refuses tokens that a model doesn't know."""
    if largest_id >= vocabulary:
        raise ComparisonError(
            f"The text's token id {largest_id} is beyond the model's {vocabulary} tokens.",
            "The tokenizer next to the model belongs to another model.",
            code="token-out-of-range",
        )


def _one_vocabulary(logits: Mapping[str, Array]) -> int:
    """The size of the vocabulary that all arms have."""
    first, *others = (values.shape for values in logits.values())
    for other in others:
        if other != first:
            raise ComparisonError(
                f"The logits have the shapes {list(first)} and {list(other)}: "
                "the arms have other vocabularies or outputs.",
                "Compare two forms of the same model.",
                code="other-vocabulary",
            )
    return int(first[-1])


def _chunk(
    logits: Mapping[str, Array],
    pairs: Sequence[tuple[str, str]],
    rows: slice,
    sample: NDArray[np.int64],
    number: int,
) -> Floats:
    """The figures of all pairs, ``[pairs, len(COLUMNS), positions]``."""
    targets = sample[rows.start + 1 : rows.stop + 1]
    arms = {
        name: Distributions(
            values[rows].astype(np.float64), targets, f"The {name}'s logits in sample {number}"
        )
        for name, values in logits.items()
    }
    return np.stack([figures(arms[first], arms[second]) for first, second in pairs])


def accuracy_of(by_sample: Floats, source: str, sha256: str, clusters: Clusters = None) -> Accuracy:
    """What sums of :func:`figures` tell, ``[len(COLUMNS), samples]``, on a text of that name."""
    totals = dict(zip(COLUMNS, by_sample.sum(axis=1), strict=True))
    count = totals["positions"]
    if not count:
        raise ComparisonError("There is no token to compare the arms on.", code="no-tokens")
    samples = dict(zip(COLUMNS, by_sample, strict=True))
    with np.errstate(invalid="ignore"):  # infinite losses give no interval
        increase = samples["candidate_loss"] - samples["baseline_loss"]
    return Accuracy(
        text_source=source,
        text_sha256=sha256,
        tokens=int(count),
        perplexity=_perplexity(totals),
        log_perplexity_increase=mean_interval(increase, samples["predicted"], clusters),
        kl_divergence=float(totals["kl"] / count),
        kl_interval=clipped(
            mean_interval(samples["kl"], samples["positions"], clusters, positive=True),
            0.0,
            math.inf,
        ),
        top1_agreement=float(totals["top1"] / count),
        top1_interval=share_interval(samples["top1"], samples["positions"], clusters),
        top5_agreement=float(totals["top5"] / count),
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
