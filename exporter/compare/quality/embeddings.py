"""How near two encoders' sentence embeddings of the same texts are.

An embedding is made of the hidden states of a text's tokens as the model's folder says, else it is
their mean; texts run one at a time, so that no padding takes part. Where the graph pools by itself,
its own output is taken.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from exporter.artifacts import EmbeddingAgreement, Interval
from exporter.artifacts.latency import Shape
from exporter.compare.quality.intervals import clipped, mean_interval
from exporter.engines.inputs import make_inputs, whole_phase
from exporter.engines.runners.base import Runner
from exporter.engines.tensors import TensorSpec
from exporter.errors import ComparisonError
from exporter.models.ablation.damage import Clusters
from exporter.models.sentence_folder import MEAN, Pooling
from exporter.progress import QUIET, Progress
from graph_passes.fusing.pooling import EMBEDDING

OUTPUTS = (EMBEDDING, "last_hidden_state", "token_embeddings", "hidden_states")
"""Outputs that embed a text, the first that a model has."""

FEWEST_TEXTS = 3  # below that there are no two pairs to rank

Floats = NDArray[np.float64]


def embedding_output(outputs: Sequence[TensorSpec]) -> str | None:
    """The output that embeds a text, or None."""
    names = {spec.name for spec in outputs}
    return next((name for name in OUTPUTS if name in names), None)


def embed(
    runner: Runner,
    texts: Sequence[NDArray[np.int64]],
    *,
    arm: str,
    pooling: Pooling = MEAN,
    unit_length: bool = True,
    progress: Progress = QUIET,
) -> Floats:
    """One arm's embeddings, ``[texts, size]``.

    Args:
        runner: An entered runner; it has one of :data:`OUTPUTS`.
        texts: The token ids of each text.
        arm: Its name in an error.
        pooling: How its token states are pooled.
        unit_length: Whether each has length 1, also where the model's folder doesn't say so.
        progress: Hears of each text.

    Raises:
        ComparisonError: Embeddings are zero or not finite.
    """
    found = []
    with progress.task(f"embeddings, {arm}", total=len(texts), unit="texts") as task:
        for number, ids in enumerate(texts):
            found.append(_embedding(runner, ids, pooling, arm, number))
            task.advance()
    vectors = np.stack(found)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True) if unit_length else vectors


def refuse_few_texts(texts: Sequence[object]) -> None:
    """Refuses what leaves no two pairs to rank.

    Raises:
        ComparisonError: There are fewer than three texts.
    """
    if len(texts) < FEWEST_TEXTS:
        raise ComparisonError(
            f"The evaluation text gives {len(texts)} texts to embed; {FEWEST_TEXTS} are needed.",
            "Name a longer text with --eval-text.",
            code="too-few-texts",
        )


def compare_embeddings(
    baseline: Floats, candidate: Floats, clusters: Clusters = None
) -> EmbeddingAgreement:
    """How near two arms' embeddings of the same texts are.

    Args:
        baseline: What :func:`embed` gave, ``[texts, size]``.
        candidate: Likewise.
        clusters: Of which document each text is.

    Returns:
        Their cosines, and Spearman's correlation of all pairs' similarities in one arm with those
        in the other: whether the candidate ranks likeness as the baseline does, which semantic
        search and STS benchmarks rest on. Both 1 where nothing changed.

    Raises:
        ComparisonError: They are of other sizes.
    """
    _refuse_other_size(baseline, candidate)
    cosines = (baseline * candidate).sum(axis=1)
    similarities = baseline @ baseline.T, candidate @ candidate.T
    ranking = _rank_agreement(*similarities, np.arange(len(baseline)))
    return EmbeddingAgreement(
        texts=len(baseline),
        cosine=float(cosines.mean()),
        lowest_cosine=float(cosines.min()),
        rank_agreement=ranking,
        rank_interval=_rank_interval(*similarities, ranking, clusters),
        cosine_interval=clipped(mean_interval(cosines, np.ones_like(cosines), clusters), -1.0, 1.0),
    )


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
    without = [_rank_agreement(first, second, texts[texts != each]) for each in texts]
    values = len(texts) * whole - (len(texts) - 1) * np.array(without)
    spread = mean_interval(values, np.ones_like(values), clusters)
    if spread is None:
        return None
    low, high = (bound - spread.value + whole for bound in spread.ci95)
    return clipped(Interval(value=whole, ci95=(low, high)), -1.0, 1.0)


def _embedding(
    runner: Runner, ids: NDArray[np.int64], pooling: Pooling, arm: str, number: int
) -> Floats:
    """One text's embedding, finite and not zero."""
    name = embedding_output(runner.outputs)
    assert name is not None
    shape = Shape(whole_phase(runner.inputs), 1, len(ids))
    inputs = make_inputs(runner.inputs, shape, ids[None])
    values = runner.run(inputs, [name], phase=shape.phase)[name].astype(np.float64)
    states = values.reshape(-1, values.shape[-1])
    pools = MEAN if name == EMBEDDING else pooling  # a vector is its own mean
    embedding: Floats = pools(states, np.ones(len(states)))
    length = np.linalg.norm(embedding)
    if not np.isfinite(length) or length == 0:
        raise ComparisonError(
            f"The {arm}'s embedding of text {number} is zero, NaN or infinite.",
            "In fp16 an overflow is likely: export in float32 or bfloat16.",
            code="not-finite",
        )
    return embedding


def _refuse_other_size(first: Floats, second: Floats) -> None:
    if first.shape != second.shape:
        raise ComparisonError(
            f"The arms embed in {first.shape[1]} and {second.shape[1]} dimensions.",
            "Compare two forms of the same model.",
            code="other-width",
        )
