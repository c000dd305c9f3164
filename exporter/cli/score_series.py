"""A series of scores as `depthcut score` is asked for: over checkpoints, or over texts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.artifacts import StabilityReport, library_versions
from exporter.choose.studies.checkpoints import check_series, find_checkpoints
from exporter.choose.studies.naming import checkpoint_labels
from exporter.cli.console import ConsoleProgress
from exporter.cli.score_call import ScoreCall, loaded_model, scored
from exporter.cli.study_results import print_study
from exporter.errors import UsageError
from exporter.files import refuse_overwriting, sha256_file
from exporter.models.loading.options import SourceOptions
from exporter.models.texts.self_text import SAMPLED
from exporter.score.registry import metrics_named

if TYPE_CHECKING:
    from exporter.choose.studies.series import SeriesPoint
    from exporter.models.loading.model_source import LoadedModel

_COMMON = "pydoc"


def score_series(call: ScoreCall, out: Path, progress: ConsoleProgress) -> None:
    """Scores a series, holds it side by side, and prints that."""
    from exporter.choose.studies.series import STABILITY
    from exporter.score.cluster.pool import open_pool

    cluster = call.cluster
    with (
        nullcontext()
        if cluster is None
        else open_pool(cluster.address, workers=cluster.workers, progress=progress)
    ):
        report = _scored_series(call, out, progress)
    print_study(report, out / STABILITY, as_json=progress.as_json)


def _scored_series(call: ScoreCall, out: Path, progress: ConsoleProgress) -> StabilityReport:
    """Scores what is asked for, into a folder, and holds it side by side.

    Raises:
        UsageError: Checkpoints and texts are to be varied at once; a text of each model's own; not
            one model for several texts.
    """
    from exporter.choose.studies.series import score_series as score_members

    series = call.series
    varied = series.vary_calibration or series.vary_samples
    trained = series.checkpoints or series.revisions
    if trained and varied:
        raise UsageError(
            "A series varies checkpoints or texts, not both: otherwise it is unknown which of "
            "the two changed a rank.",
            "Leave --vary-calibration and --vary-samples out, or --checkpoints and --revisions.",
            code="text-and-model-differ",
        )
    if out.is_file():
        raise UsageError(
            f"{out} is a file, but a series needs a folder.", "Give -o a folder.", code="is-a-file"
        )
    sources = find_checkpoints(call.models, progress) if series.checkpoints else call.models
    refuse_overwriting(out, map(Path, sources))
    if trained:
        score = replace(call.score, calibration=_one_text(call, progress))
        call = replace(call, score=score)
    if series.revisions:
        points = _revisions(sources, call, progress)
    elif series.checkpoints:
        points = _checkpoints(sources, call, progress)
    else:
        points = _texts(sources, call, progress)
    if trained:
        _refuse_copies(points)
    return score_members(points, out, progress=progress)


def _refuse_copies(points: Sequence[SeriesPoint]) -> None:
    """Refuses a training that never moved, which would look like one model over texts."""
    if len({point.key["model"] for point in points}) == 1:
        names = " and ".join(point.name for point in points[:2])
        raise UsageError(
            f"{names} are identical, like all others here: that is one checkpoint.",
            "Name checkpoints that differ.",
            code="one-point",
        )


def _one_text(call: ScoreCall, progress: ConsoleProgress) -> tuple[str, ...]:
    """The text for all checkpoints; none where the metrics read none."""
    named: tuple[str, ...] = call.score.calibration
    if set(named).intersection(SAMPLED):
        raise UsageError(
            "Each checkpoint would sample its own text, so it would be unknown whether the "
            "text or the model changed a rank.",
            f"Name one text for all: --calibration {_COMMON}, or a file.",
            code="text-per-model",
        )
    if not named and any(each.reads_text for each in metrics_named(call.score.metrics)):
        progress.say(f"checkpoints: all on one text, {_COMMON}; --calibration names another")
        return (_COMMON,)
    return named


def _checkpoints(
    sources: Sequence[str], call: ScoreCall, progress: ConsoleProgress
) -> list[SeriesPoint]:

    from exporter.choose.studies.series import folder_names

    check_series(sources)
    names = folder_names(checkpoint_labels(sources))
    return [
        _member(name, source, call, progress) for name, source in zip(names, sources, strict=True)
    ]


def _revisions(
    models: Sequence[str],
    call: ScoreCall,
    progress: ConsoleProgress,
) -> list[SeriesPoint]:

    from exporter.choose.studies.series import folder_names

    revisions: tuple[str, ...] = call.series.revisions
    if (
        len(models) != 1
        or call.series.checkpoints
        or call.load.revision
        or Path(models[0]).exists()
    ):
        raise UsageError(
            "--revisions is for one MODEL of the Hugging Face Hub, and names them all.",
            "Leave --checkpoints and --revision out; folders here need --checkpoints alone.",
            code="not-one-hub-model",
        )
    if len(revisions) < 2:
        raise UsageError(
            f"{revisions[0]} is one revision; a series has two or more.", code="one-point"
        )
    return [
        _member(
            name, models[0], replace(call, load=replace(call.load, revision=revision)), progress
        )
        for name, revision in zip(folder_names(revisions), revisions, strict=True)
    ]


def _texts(
    models: Sequence[str],
    call: ScoreCall,
    progress: ConsoleProgress,
) -> list[SeriesPoint]:

    from exporter.choose.studies.series import folder_names

    if len(models) != 1:
        raise UsageError(
            "Texts are varied for one MODEL.", "For several: --checkpoints.", code="not-one-model"
        )
    if call.score.calibration and call.series.vary_calibration:
        raise UsageError(
            "--calibration names what all points share, --vary-calibration what differs.",
            "Name them all with --vary-calibration.",
            code="text-given-twice",
        )
    if call.score.samples is not None and call.series.vary_samples:
        raise UsageError(
            "--samples is one number, --vary-samples several.",
            "Give them all to --vary-samples.",
            code="samples-given-twice",
        )
    varied = dict.fromkeys(call.series.vary_calibration)
    texts: list[tuple[str, ...]] = [(text,) for text in varied] or [call.score.calibration]
    counts = tuple(dict.fromkeys(call.series.vary_samples)) or (call.score.samples,)
    pairs = list(itertools.product(texts, counts))
    if len(pairs) < 2:
        raise UsageError(
            "One text and one number of samples make no series.",
            "Repeat --vary-calibration, or give --vary-samples several numbers.",
            code="one-point",
        )
    names = folder_names([_label(text, count, len(counts) > 1) for text, count in pairs])
    load = cache(partial(loaded_model, models[0], call, progress))  # for all texts once
    return [
        _member(
            name,
            models[0],
            replace(call, score=replace(call.score, calibration=text, samples=count)),
            progress,
            load,
        )
        for name, (text, count) in zip(names, pairs, strict=True)
    ]


def _label(texts: Sequence[str], count: int | None, with_count: bool) -> str:
    names = [text if text.startswith("hf:") else Path(text).name for text in texts]
    name = "+".join(names) or "text"
    return f"{name}-{count}" if with_count else name


def _member(
    name: str,
    source: str,
    call: ScoreCall,
    progress: ConsoleProgress,
    load: Callable[[], LoadedModel] | None = None,
) -> SeriesPoint:

    from exporter.choose.studies.series import SeriesPoint

    how = call.load
    key = {
        "model": _digest(source, how),
        "load": vars(how),
        "score": asdict(call.score),
        "way": {"stream": call.streaming.stream, "device_map": call.device_map},
        "texts": list(map(_file_digest, call.score.calibration)),
        "versions": library_versions(),
    }
    return SeriesPoint(name, key, partial(scored, source, call, progress, load=load))


@cache
def _digest(source: str, how: SourceOptions) -> str:
    """Read once: the weights may be large, and a model may stand for several texts."""
    from exporter.models.loading.sources import source_sha256

    return source_sha256(source, **how.reading)


def _file_digest(text: str) -> str | None:

    return sha256_file(Path(text)) if Path(text).is_file() else None
