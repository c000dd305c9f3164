"""Scores side by side: one model by other metrics or on other texts, or its checkpoints."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.stats import kendalltau, spearmanr

from exporter.artifacts import (
    ImportanceReport,
    RankAgreement,
    RankedScores,
    RankingRef,
    ScoreComparison,
)
from exporter.errors import ScoringError
from exporter.files import sha256_file
from exporter.score.metric import UNITS

FIRST = (4, 8, 12, 16)
"""For how many of the most redundant sublayers the overlap is told."""


def compare_files(paths: Sequence[Path], metric: str | None = None) -> ScoreComparison:
    """Compares every ranking of some importance.json with every other."""
    reports = {str(path): ImportanceReport.read(path) for path in paths}
    _check_same_series(reports)
    several = len(reports) > 2 or len({r.model.sha256 for r in reports.values()}) > 1
    if metric or several:
        chosen = metric or next(iter(reports.values())).metric
        named = {name: report.of_metric(chosen) for name, report in reports.items()}
        reports = {name: r.model_copy(update={"further": {}}) for name, r in named.items()}
    pairs = itertools.combinations(_ranked(reports), 2)
    agreements = [_agreement(one, other) for one, other in pairs if one.kind == other.kind]
    if not agreements:
        raise ScoringError(
            f"{' and '.join(reports)} hold no two rankings of the same kind of sublayer.",
            "Score by several metrics, or give a file of scores on another text.",
            code="not-comparable",
        )
    return ScoreComparison(
        models={name: report.model for name, report in reports.items()},
        texts={name: report.calibration for name, report in reports.items()},
        scores=_ranked(reports),
        agreements=agreements,
        made_from={f"importance[{i}]": sha256_file(path) for i, path in enumerate(paths)},
    )


def _ranked(reports: Mapping[str, ImportanceReport]) -> list[RankedScores]:
    """By kind, then by file and metric."""
    rankings = [
        (RankingRef(metric=metric, file=name), scores)
        for name, report in reports.items()
        for metric, scores in report.tables.items()
    ]
    for ranking, scores in rankings:
        odd = next((score for score in scores if not math.isfinite(score.score)), None)
        if odd is not None:
            raise ScoringError(
                f"{ranking.file}: the {ranking.metric} of {odd.kind} {odd.layer} is "
                f"{odd.score}; it can't be ranked.",
                "Score the model again.",
                code="not-finite",
            )
    return [
        RankedScores(kind=kind, ranking=ranking, scores=table)
        for kind in UNITS
        for ranking, scores in rankings
        if (table := {score.layer: score.score for score in scores if score.kind == kind})
    ]


def _check_same_series(reports: Mapping[str, ImportanceReport]) -> None:
    """Either the model or the text must be the same, or nobody knows which moved a rank."""
    (one, first), *others = reports.items()
    for other, report in others:
        shapes = [(r.model.architecture, r.model.num_layers) for r in (first, report)]
        if shapes[0] != shapes[1]:
            raise ScoringError(
                f"{first.model.source} ({one}) is {shapes[0][0]} with {shapes[0][1]} layers, "
                f"{report.model.source} ({other}) {shapes[1][0]} with {shapes[1][1]}.",
                "Compare scores of one model, or of checkpoints of one training.",
                code="not-comparable",
            )
    models = {report.model.sha256 for report in reports.values()}
    texts = {
        (r.calibration.sha256, r.calibration.samples, r.calibration.sequence_length): name
        for name, r in reports.items()
    }
    if len(models) > 1 and len(texts) > 1:
        names = [f"{name}: {reports[name].calibration.source}" for name in texts.values()]
        raise ScoringError(
            f"The models differ, and so do the texts ({'; '.join(names)}): it is unknown which of "
            "the two moved a rank.",
            "Score all checkpoints on one text (--calibration pydoc, or a file; self is another "
            "for each model), or one model on several texts.",
            code="not-comparable",
        )


def _agreement(one: RankedScores, other: RankedScores) -> RankAgreement:
    layers = sorted(one.scores.keys() & other.scores.keys())
    left, right = (np.array([r.scores[layer] for layer in layers]) for r in (one, other))
    is_ranked = len(layers) > 1 and min(np.ptp(left), np.ptp(right)) > 0
    return RankAgreement(
        kind=one.kind,
        first=one.ranking,
        second=other.ranking,
        sublayers=len(layers),
        spearman=float(spearmanr(left, right).statistic) if is_ranked else None,
        kendall=float(kendalltau(left, right).statistic) if is_ranked else None,
        shared_first=dict(_shared(left, right)),
    )


def _shared(left: NDArray[np.float64], right: NDArray[np.float64]) -> Iterator[tuple[int, int]]:
    """How many are among the n lowest of both; ties by layer, as plans have it."""
    orders = [np.argsort(scores, kind="stable").tolist() for scores in (left, right)]
    for n in FIRST:
        if n < len(left):
            yield n, len({*orders[0][:n]} & {*orders[1][:n]})
