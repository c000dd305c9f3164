"""How near two classifiers' answers to the same texts are, of each text or of each token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.artifacts import Accuracy
from exporter.artifacts.latency import Shape
from exporter.compare.quality.agreement import LOGITS
from exporter.compare.quality.intervals import clipped, mean_interval, share_interval
from exporter.engines.inputs import make_inputs, whole_phase
from exporter.engines.runners.base import Runner
from exporter.errors import ComparisonError
from exporter.models.ablation.damage import Clusters, Distributions, Floats, divergence
from exporter.progress import QUIET, Progress

_TYPES = "token_type_ids"
_FIVE = 5


def class_log_probabilities(
    runner: Runner,
    texts: Sequence[NDArray[np.int64]],
    *,
    arm: str,
    types: Sequence[NDArray[np.int64]] | None = None,
    separate: bool = False,
    progress: Progress = QUIET,
) -> list[Floats]:
    """One arm's answers, of each text ``[rows, classes]``: one row, or one for each token.

    A single logit is that of a yes, as rerankers have it: it makes two classes, the yes second.

    Args:
        runner: An entered runner with an output ``logits``.
        texts: The token ids of each text, or pair of texts.
        arm: Its name in an error.
        types: Which text of a pair each token is of; None: the first.
        separate: Whether each of a text's classes is a yes or no of its own: a row each.
        progress: Hears of each text.

    Raises:
        ComparisonError: Logits aren't finite.
        BackendError: A run fails.
    """
    found = []
    with progress.task(f"classes, {arm}", total=len(texts), unit="texts") as task:
        for number, ids in enumerate(texts):
            shape = Shape(whole_phase(runner.inputs), 1, len(ids))
            inputs = make_inputs(runner.inputs, shape, ids[None])
            if types is not None and _TYPES in inputs:
                inputs[_TYPES] = types[number][None].astype(inputs[_TYPES].dtype)
            logits = runner.run(inputs, [LOGITS], phase=shape.phase)[LOGITS]
            what = f"The {arm}'s logits of text {number}"
            found.append(log_probabilities_of(logits, what, separate=separate))
            task.advance()
    return found


def log_probabilities_of(logits: NDArray[Any], what: str, *, separate: bool = False) -> Floats:
    """Of one text's or image's logits, ``[rows, classes]``; see :func:`class_log_probabilities`.

    Args:
        logits: ``[1, classes]``, or ``[1, tokens, classes]``.
        what: What errors call them.
        separate: As there.

    Raises:
        ComparisonError: They aren't finite.
    """
    rows = logits.astype(np.float64).reshape(-1, 1 if separate else logits.shape[-1])
    if rows.shape[1] == 1:
        rows = np.hstack([np.zeros_like(rows), rows])
    return Distributions(rows, np.zeros(0, np.int64), what).log_probabilities


def in_pairs(rows: Sequence[Floats]) -> list[Floats]:
    """Of single logits, which of each two texts stands higher: nothing else counts for an order.

    Args:
        rows: What :func:`class_log_probabilities` gave of a reranker, ``[1, 2]`` each; of an odd
            number the last is held against the first.

    Returns:
        ``[1, 2]`` for each pair; of one text its own row.
    """
    if len(rows) < 2:
        return list(rows)
    logits = np.array([row[0, 1] - row[0, 0] for row in rows])
    differences = (logits - np.roll(logits, -1))[::2]
    return [-np.logaddexp(0, [[found, -found]]) for found in differences]


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

    Args:
        baseline: What :func:`class_log_probabilities` gave.
        candidate: Likewise.
        source: What a report calls the texts.
        sha256: Of them.
        clusters: Of which document each is.
        orders: Whether the answers are what :func:`in_pairs` gave.

    Returns:
        KL divergence and the share of the same likeliest class, over texts or tokens, with
        intervals over texts; and of more than five classes how many of the five likeliest are the
        same.

    Raises:
        ComparisonError: There is no text, or the arms have other classes.
    """
    shapes = [[rows.shape for rows in arm] for arm in (baseline, candidate)]
    if shapes[0] != shapes[1] or not shapes[0]:
        raise ComparisonError(
            f"The arms' classes have the shapes {shapes[0][:1]} and {shapes[1][:1]}.",
            "Compare two forms of the same classifier, on a text that has paragraphs.",
            code="other-classes",
        )
    kl, same, five, rows = (np.zeros(len(baseline)) for _ in range(4))
    for number, (first, second) in enumerate(zip(baseline, candidate, strict=True)):
        kl[number] = _divergences(first, second).sum()
        same[number] = (first.argmax(axis=1) == second.argmax(axis=1)).sum()
        five[number] = _shared(first, second).sum()
        rows[number] = len(first)
    return Accuracy(
        text_source=source,
        text_sha256=sha256,
        tokens=int(rows.sum()),
        perplexity=None,
        kl_divergence=float(kl.sum() / rows.sum()),
        kl_interval=clipped(mean_interval(kl, rows, clusters, positive=True), 0.0, math.inf),
        top1_agreement=float(same.sum() / rows.sum()),
        top1_interval=share_interval(same, rows, clusters),
        compared="order" if orders else "classes",
        top5_agreement=float(five.sum() / rows.sum()) if baseline[0].shape[1] > _FIVE else None,
    )


def _shared(first: Floats, second: Floats) -> Floats:
    """Of each row, the share of the first's five likeliest classes among the second's."""
    five = [np.argsort(-each, axis=1, kind="stable")[:, :_FIVE] for each in (first, second)]
    shared: Floats = (five[0][:, :, None] == five[1][:, None]).any(-1).mean(-1)
    return shared


def _divergences(baseline: Floats, candidate: Floats) -> Floats:
    """KL(baseline || candidate) of each row, in nats."""
    nothing = np.zeros(0, np.int64)
    first, second = (
        Distributions(each.copy(), nothing, "The classes' logits") for each in (baseline, candidate)
    )
    return divergence(first, second)
