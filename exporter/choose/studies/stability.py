"""Holds a series of score files side by side: one model over training, or one over texts."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from exporter.artifacts import (
    CalibrationRef,
    ImportanceReport,
    KindStability,
    Over,
    RankingRef,
    SeriesAgreement,
    StabilityPoint,
    StabilityReport,
)
from exporter.choose.studies.naming import checkpoint_labels, step_of, text_labels
from exporter.errors import ScoringError
from exporter.files import sha256_bytes, sha256_file
from exporter.score.comparison import FIRST, Floats, first_sublayers, rank_figures, table_of_kind
from exporter.score.metric import UNITS
from graph_passes.types import DeletionKind

_DRAWS = 500


def stability_of_files(paths: Sequence[Path], *, metric: str | None = None) -> StabilityReport:
    """Reads score files, and holds them side by side in the order given.

    Args:
        paths: importance.json files, at least two; see :func:`stability_of`.
        metric: Which of their metrics counts; None: the first file's own.

    Raises:
        ArtifactError: A file is not valid, or lacks the metric.
        ScoringError: As for :func:`stability_of`.
    """
    reports = {str(path): ImportanceReport.read(path) for path in paths}
    if len(reports) < len(paths):
        raise ScoringError("A score file is named twice.", "Name each once.", code="named-twice")
    made_from = {f"importance[{i}]": sha256_file(path) for i, path in enumerate(paths)}
    return stability_of(reports, metric=metric, made_from=made_from)


def stability_of(
    reports: Mapping[str, ImportanceReport],
    *,
    metric: str | None = None,
    made_from: Mapping[str, str] | None = None,
) -> StabilityReport:
    """Holds score reports side by side, in their order.

    They are of one model on several texts, or of several checkpoints on one text. Where both
    differ, nobody could tell which of the two moved a rank.

    Args:
        reports: At least two, by their files' names.
        metric: Which of their metrics counts; None: the first report's own.
        made_from: The files' digests; None: the reports' own.

    Raises:
        ArtifactError: A report lacks the metric.
        ScoringError: Fewer than two; models of other shapes; checkpoints on other texts; models
            and texts that both differ; a score that can't be ranked.
    """
    if len(reports) < 2:
        raise ScoringError(
            "One file of scores makes no series.",
            "Name two or more importance.json.",
            code="one-file",
        )
    wanted = metric or next(iter(reports.values())).metric
    chosen = {name: report.of_metric(wanted) for name, report in reports.items()}
    _check_shapes(chosen)
    over = _what_differs(chosen)
    digests = {name: sha256_bytes(report.to_json().encode()) for name, report in chosen.items()}
    return StabilityReport(
        over=over,
        metric=wanted,
        points=_points(chosen, over),
        kinds=[table for kind in UNITS if (table := _kind(chosen, kind, wanted))],
        made_from=dict(digests if made_from is None else made_from),
    )


def _check_shapes(reports: Mapping[str, ImportanceReport]) -> None:
    """All must have scored the same sublayers of the same kind of model."""
    (one, first), *others = reports.items()
    for other, second in others:
        for what, values in (
            ("layers", (first.model.num_layers, second.model.num_layers)),
            ("as its class", (first.model.architecture, second.model.architecture)),
        ):
            if values[0] != values[1]:
                raise ScoringError(
                    f"{first.model.source} ({one}) has {values[0]} {what}, {second.model.source} "
                    f"({other}) has {values[1]}: these are models of different shapes.",
                    "A series is of one model: its checkpoints, or its scores on several texts.",
                    code="other-shapes",
                )
        odd = {(s.layer, s.kind) for s in first.scores} ^ {(s.layer, s.kind) for s in second.scores}
        if odd:
            layer, kind = min(odd)
            raise ScoringError(
                f"{kind} {layer} is scored in only one of {one} and {other}.",
                "Score them all by the same metric and options, such as --blocks.",
                code="scored-in-one",
            )


def _what_differs(reports: Mapping[str, ImportanceReport]) -> Over:
    """Whether the series goes over checkpoints or over texts."""
    (one, first), *others = reports.items()
    models = [name for name, r in others if r.model.sha256 != first.model.sha256]
    texts = [name for name, r in others if _text_key(r) != _text_key(first)]
    if not models:
        return "texts"
    if texts:
        second = reports[texts[0]]
        raise ScoringError(
            f"{one} is scored on {_told(first.calibration)}, {texts[0]} on "
            f"{_told(second.calibration)}, and the models differ too: so it is unknown which "
            "of the two changed a rank.",
            _text_hint(first, second),
            code="text-and-model-differ",
        )
    return "checkpoints"


def _text_key(report: ImportanceReport) -> tuple[str, int, int]:
    text = report.calibration
    return text.sha256, text.samples, text.sequence_length


def _told(text: CalibrationRef) -> str:
    return f"{text.source} ({text.samples} x {text.sequence_length}, sha256 {text.sha256[:12]})"


def _text_hint(*reports: ImportanceReport) -> str:
    texts = [text for report in reports for text in report.calibration.texts]
    if any(text.source.startswith("self (") for text in texts):
        return (
            "Text that a model samples is its own; score all checkpoints on the same: "
            "--calibration pydoc, or a file."
        )
    return "Score all checkpoints on the same text, or one model on several texts."


def _points(reports: Mapping[str, ImportanceReport], over: Over) -> list[StabilityPoint]:
    refs = [report.calibration for report in reports.values()]
    if over == "checkpoints":
        sources = _checkpoint_names(reports)
        labels, steps = checkpoint_labels(sources), list(map(step_of, sources))
    else:
        labels, steps = text_labels(refs), _amounts(refs)
    return [
        StabilityPoint(
            label=label, step=step, file=name, model=report.model, calibration=report.calibration
        )
        for label, step, (name, report) in zip(labels, steps, reports.items(), strict=True)
    ]


def _checkpoint_names(reports: Mapping[str, ImportanceReport]) -> list[str]:
    """The models' sources; those of the files where revisions of one model have the same."""
    sources = [report.model.source for report in reports.values()]
    if len(set(sources)) == len(sources):
        return sources
    files = [Path(name) for name in reports]
    return [str(p.parent if p.stem == "importance" else p.with_suffix("")) for p in files]


def _amounts(texts: Sequence[CalibrationRef]) -> list[float | None]:
    """Tokens, where they are all that differs."""
    if len({text.source for text in texts}) > 1:
        return [None] * len(texts)
    return [float(text.tokens) for text in texts]


def _kind(
    reports: Mapping[str, ImportanceReport], kind: DeletionKind, metric: str
) -> KindStability | None:
    tables = [
        table_of_kind(RankingRef(metric=metric, file=name), report.scores, kind)
        for name, report in reports.items()
    ]
    layers = sorted(tables[0])
    if not layers:
        return None
    scores = [np.array([table[layer] for layer in layers]) for table in tables]
    errors = [_std_errors(report, kind) for report in reports.values()]
    return KindStability(
        kind=kind,
        layers=layers,
        scores=[values.tolist() for values in scores],
        repeatability=[repeatability(*pair) for pair in zip(scores, errors, strict=True)],
        agreements=[
            _agreement(i, j, scores) for i, j in itertools.combinations(range(len(scores)), 2)
        ],
        always_first={n: _always(scores, layers, n) for n in FIRST if n < len(layers)},
    )


def _std_errors(report: ImportanceReport, kind: DeletionKind) -> list[float | None]:
    """In the order of the layers."""
    own = sorted((s for s in report.scores if s.kind == kind), key=lambda score: score.layer)
    return [score.std_error for score in own]


def _agreement(first: int, second: int, scores: Sequence[Floats]) -> SeriesAgreement:
    figures = rank_figures(scores[first], scores[second])
    return SeriesAgreement(first=first, second=second, **vars(figures))


def _always(scores: Sequence[Floats], layers: Sequence[int], number: int) -> list[int]:
    kept = set.intersection(*(set(first_sublayers(values, number)) for values in scores))
    return sorted(layers[place] for place in kept)


def repeatability(
    scores: Floats, std_errors: Sequence[float | None], *, seed: int = 0
) -> float | None:
    """Spearman's correlation to expect of two scorings of one model on texts of one kind and size.

    Both are drawn around the scores with their standard errors, each sublayer by itself, and
    ranked; the mean over the draws. Held against what disjoint halves of a text gave, it was right
    to 0.02. Of two or three samples the standard errors themselves say little.

    Args:
        scores: ``[sublayers]``.
        std_errors: Of each; None where it isn't known.
        seed: Of the draws.

    Returns:
        From -1 to 1; None where a standard error isn't known, or the scores and their errors tell
        no two sublayers apart.
    """
    known = [error for error in std_errors if error is not None]
    if len(known) < max(2, len(std_errors)) or not np.isfinite(known).all():
        return None
    rng, errors = np.random.default_rng(seed), np.array(known)
    if not np.ptp(scores) and not errors.any():
        return None
    first, second = (
        _ranks(scores + errors * rng.standard_normal((_DRAWS, len(scores)))) for _ in range(2)
    )
    # Without ties both rows have the same spread.
    return float((first * second).sum() / (first * first).sum())


def _ranks(drawn: Floats) -> Floats:
    """``[draws, sublayers]``, around zero."""
    ranks: Floats = drawn.argsort(axis=1).argsort(axis=1) - (drawn.shape[1] - 1) / 2
    return ranks
