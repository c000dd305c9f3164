"""How near two classifiers' answers to the same texts are, of each text or of each token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from exporter.artifacts import Accuracy, EmbeddingAgreement, Interval
from exporter.artifacts.latency import Shape
from exporter.compare.agreement import COLUMNS, LOGITS, accuracy_of, figures
from exporter.compare.intervals import clipped, mean_interval
from exporter.engines.runners.base import Runner
from exporter.engines.tensors import TensorSpec, make_inputs, whole_phase
from exporter.errors import ComparisonError
from exporter.models.ablation.damage import Clusters, Distributions
from exporter.models.sentence_folder import MEAN, Pooling
from exporter.progress import QUIET, Progress
from graph_passes.fusing.pooling import EMBEDDING

_TYPES = "token_type_ids"
_FIVE = 5
_NO_TARGETS = np.zeros(0, np.int64)


def class_log_probabilities(
    runner: Runner,
    texts: Sequence[NDArray[np.int64]],
    *,
    arm: str,
    types: Sequence[NDArray[np.int64]] | None = None,  # None: the first
    separate: bool = False,
    progress: Progress = QUIET,
) -> list[Floats]:
    """One arm's answers, of each text ``[rows, classes]``: one row, or one for each token.

    A single logit is that of a yes, as rerankers have it: it makes two classes, the yes second.
    """
    arrays = []
    with progress.task(f"classes, {arm}", total=len(texts), unit="texts") as task:
        for number, ids in enumerate(texts):
            shape = Shape(whole_phase(runner.inputs), 1, len(ids))
            inputs = make_inputs(runner.inputs, shape, ids[None])
            if types is not None and _TYPES in inputs:
                inputs[_TYPES] = types[number][None].astype(inputs[_TYPES].dtype)
            logits = runner.run(inputs, [LOGITS], phase=shape.phase)[LOGITS]
            what = f"The {arm}'s logits of text {number}"
            arrays.append(log_probabilities_of(logits, what, separate=separate))
            task.advance()
    return arrays


def log_probabilities_of(logits: NDArray[Any], what: str, *, separate: bool = False) -> Floats:
    """Of one text's or image's logits, ``[rows, classes]``; see :func:`class_log_probabilities`.

    logits: `[1, classes]`, or `[1, tokens, classes]`.
    """
    rows = logits.astype(np.float64).reshape(-1, 1 if separate else logits.shape[-1])
    if rows.shape[1] == 1:
        rows = np.hstack([np.zeros_like(rows), rows])
    return Distributions(rows, _NO_TARGETS, what).log_probabilities


def in_pairs(rows: Sequence[Floats]) -> list[Floats]:
    """Of single logits, which of each two texts stands higher: nothing else counts for an order.

    ``[1, 2]`` for each pair; of one text its own row.

    rows: what class_log_probabilities gave of a reranker, `[1, 2]` each.
    """
    if len(rows) < 2:
        return list(rows)
    logits = np.array([row[0, 1] - row[0, 0] for row in rows])
    differences = (logits - np.roll(logits, -1))[::2]
    return [-np.logaddexp(0, [[difference, -difference]]) for difference in differences]


def compare_classes(
    baseline: Sequence[Floats],
    candidate: Sequence[Floats],
    *,
    source: str,
    sha256: str,
    clusters: Clusters = None,
    orders: bool = False,
) -> Accuracy:
    """How near two arms' classes of the same texts are.

    KL divergence and the share of the same likeliest class, over texts or tokens, with
    intervals over texts; and of more than five classes how many of the five likeliest are the
    same.
    """
    shapes = [[rows.shape for rows in arm] for arm in (baseline, candidate)]
    if shapes[0] != shapes[1] or not shapes[0]:
        raise ComparisonError(
            f"The arms' classes have the shapes {shapes[0][:1]} and {shapes[1][:1]}.",
            "Compare two forms of the same classifier, on a text that has paragraphs.",
            code="other-classes",
        )
    by_text = np.zeros((len(COLUMNS), len(baseline)))
    for number, pair in enumerate(zip(baseline, candidate, strict=True)):
        arms = (Distributions(rows.copy(), _NO_TARGETS, "The classes' logits") for rows in pair)
        by_text[:, number] = figures(*arms).sum(axis=1)
    known: dict[str, object] = {"compared": "order" if orders else "classes"}
    if baseline[0].shape[1] <= _FIVE:
        known["top5_agreement"] = None
    return accuracy_of(by_text, source, sha256, clusters).model_copy(update=known)


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
    """One arm's embeddings, ``[texts, size]``."""
    arrays = []
    with progress.task(f"embeddings, {arm}", total=len(texts), unit="texts") as task:
        for number, ids in enumerate(texts):
            arrays.append(_embedding(runner, ids, pooling, arm, number))
            task.advance()
    vectors = np.stack(arrays)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True) if unit_length else vectors


def refuse_few_texts(texts: Sequence[object]) -> None:
    """Refuses what leaves no two pairs to rank."""
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

    baseline: what embed gave, `[texts, size]`.
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
    without = [_rank_agreement(first, second, texts[texts != text]) for text in texts]
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
