"""How far the rankings of two score files agree: other metrics, other texts, one model."""

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
    RankCorrelation,
    RankingRef,
    Score,
    ScoreComparison,
)
from exporter.errors import ScoringError
from exporter.files import sha256_file
from exporter.score.metric import UNITS
from graph_passes.types import DeletionKind

FIRST = (4, 8, 12, 16)
"""For how many of the most redundant sublayers the overlap is told."""

Floats = NDArray[np.float64]
Table = dict[int, float]
"""One kind's scores by layer."""


def compare_files(first: Path, second: Path) -> ScoreComparison:
    """Holds every ranking of two importance.json against every other.

    Args:
        first: A file.
        second: Another of the same model; the same file compares its metrics alone.

    Raises:
        ArtifactError: When a file is not valid.
        ScoringError: When they score other models, a score can't be ranked, or there are no two
            rankings.
    """
    reports = {str(path): ImportanceReport.read(path) for path in (first, second)}
    _check_same_model(reports)
    agreements = compare_reports(reports)
    if not agreements:
        raise ScoringError(
            f"{' and '.join(reports)} hold no two rankings of the same kind of sublayer.",
            "Score by several metrics, or give a file of scores on another text.",
            code="no-two-rankings",
        )
    return ScoreComparison(
        model=reports[str(first)].model,
        texts={name: report.calibration for name, report in reports.items()},
        agreements=agreements,
        made_from={"first": sha256_file(first), "second": sha256_file(second)},
    )


def compare_reports(reports: Mapping[str, ImportanceReport]) -> list[RankAgreement]:
    """Every pair of rankings of some reports of one model, kind by kind.

    Raises:
        ScoringError: When a score can't be ranked.
    """
    rankings = [
        (RankingRef(metric=metric, file=name), scores)
        for name, report in reports.items()
        for metric, scores in report.tables.items()
    ]
    found = []
    for kind in UNITS:
        tables = [(ranking, table_of_kind(ranking, scores, kind)) for ranking, scores in rankings]
        scored = [(ranking, table) for ranking, table in tables if table]
        found += [_agreement(kind, *pair) for pair in itertools.combinations(scored, 2)]
    return found


def comparison_rows(comparison: ScoreComparison) -> tuple[list[str], list[list[str]]]:
    """A table's header and rows; its columns are headed by the files where each is of one."""
    counts = sorted({n for found in comparison.agreements for n in found.shared_first})
    names = _short_names([*comparison.texts])
    pairs = {(found.first.file, found.second.file) for found in comparison.agreements}
    of_files = len(pairs) == 1 and len(names) > 1

    def called(ranking: RankingRef) -> str:
        alone = of_files or len(names) == 1
        return ranking.metric if alone else f"{ranking.metric} ({names[ranking.file]})"

    heads = [names[file] for file in pairs.pop()] if of_files else ["ranking", "held against"]
    header = ["kind", *heads, "Spearman", "Kendall", *(f"of first {n}" for n in counts)]
    rows = [
        [
            found.kind,
            called(found.first),
            called(found.second),
            _figure(found.spearman),
            _figure(found.kendall),
            *(str(found.shared_first.get(n, "-")) for n in counts),
        ]
        for found in comparison.agreements
    ]
    return header, rows


def _short_names(files: Sequence[str]) -> dict[str, str]:
    """What each file is called: its name where those differ, else its path."""
    names = [Path(file).name for file in files]
    return dict(zip(files, names if len({*names}) == len(files) else files, strict=True))


def _check_same_model(reports: Mapping[str, ImportanceReport]) -> None:
    (one, first), *others = reports.items()
    for other, second in others:
        if first.model.sha256 != second.model.sha256:
            raise ScoringError(
                f"{one} scores {first.model.source} ({first.model.sha256[:12]}), {other} scores "
                f"{second.model.source} ({second.model.sha256[:12]}): these are other models.",
                "Compare scores of the same model; its files must not have changed between.",
                code="another-model",
            )


def table_of_kind(ranking: RankingRef, scores: Sequence[Score], kind: DeletionKind) -> Table:
    """The scores of one kind of sublayer, by layer.

    Raises:
        ScoringError: One can't be ranked.
    """
    for score in scores:
        if not math.isfinite(score.score):
            raise ScoringError(
                f"{ranking.file}: the {ranking.metric} of {score.kind} {score.layer} is "
                f"{score.score}; it can't be ranked.",
                "Score the model again.",
                code="not-finite",
            )
    return {score.layer: score.score for score in scores if score.kind == kind}


def rank_figures(left: Floats, right: Floats) -> RankCorrelation:
    """Holds two rankings side by side.

    Args:
        left: ``[sublayers]``, scores; the lowest goes first.
        right: ``[sublayers]``, of the same sublayers.
    """
    told = len(left) > 1 and min(np.ptp(left), np.ptp(right)) > 0
    return RankCorrelation(
        spearman=float(spearmanr(left, right).statistic) if told else None,
        kendall=float(kendalltau(left, right).statistic) if told else None,
        shared_first=dict(_shared(left, right)),
    )


def first_sublayers(scores: Floats, number: int) -> list[int]:
    """Places of so many of the lowest scores; ties by layer, as plans have it."""
    lowest: list[int] = np.argsort(scores, kind="stable").tolist()[:number]
    return lowest


def _agreement(
    kind: DeletionKind, one: tuple[RankingRef, Table], other: tuple[RankingRef, Table]
) -> RankAgreement:
    layers = sorted(one[1].keys() & other[1].keys())
    left, right = (np.array([table[layer] for layer in layers]) for table in (one[1], other[1]))
    return RankAgreement(
        kind=kind,
        first=one[0],
        second=other[0],
        sublayers=len(layers),
        **vars(rank_figures(left, right)),
    )


def _shared(left: Floats, right: Floats) -> Iterator[tuple[int, int]]:
    """How many are among the n lowest of both."""
    for n in FIRST:
        if n < len(left):
            yield n, len({*first_sublayers(left, n)} & {*first_sublayers(right, n)})


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
