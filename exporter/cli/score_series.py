"""A series of scores as the options of `depthcut score` ask: over checkpoints, or over texts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.cli.console import ConsoleProgress
from exporter.cli.series_options import without_series

if TYPE_CHECKING:
    from exporter.artifacts import StabilityReport
    from exporter.choose.studies.series import Member
    from exporter.models.loading.model_source import LoadedModel
    from exporter.pipeline.request import SourceOptions

_COMMON = "pydoc"


def scored_series(
    models: Sequence[str], out: Path, options: Mapping[str, Any], progress: ConsoleProgress
) -> StabilityReport:
    """Scores what is asked for, and holds it side by side.

    Args:
        models: As on the command line.
        out: The folder.
        options: The command's, by their parameters' names.
        progress: Told what goes on.

    Raises:
        UsageError: Checkpoints and texts are to be varied at once; a text of each model's own; not
            one model for several texts.
    """
    from exporter.choose.studies.checkpoints import find_checkpoints
    from exporter.choose.studies.series import score_series
    from exporter.errors import UsageError
    from exporter.files import refuse_overwriting

    varied = options["vary_calibration"] or options["vary_samples"]
    trained = options["checkpoints"] or options["revisions"]
    if trained and varied:
        raise UsageError(
            "A series goes over checkpoints or over texts: with both, nobody can tell which of the "
            "two moved a rank.",
            "Leave --vary-calibration and --vary-samples away, or --checkpoints and --revisions.",
        )
    if out.is_file():
        raise UsageError(f"{out} is a file, and a series fills a folder.", "Give -o a folder.")
    plain = without_series(options)
    sources = find_checkpoints(models, progress) if options["checkpoints"] else models
    refuse_overwriting(out, map(Path, sources))
    if trained:
        plain["calibration"] = _one_text(plain, progress)
    if options["revisions"]:
        members = _revisions(sources, options, plain, progress)
    elif options["checkpoints"]:
        members = _checkpoints(sources, plain, progress)
    else:
        members = _texts(sources, options, plain, progress)
    if trained:
        _refuse_copies(members)
    return score_series(members, out, progress=progress)


def _refuse_copies(members: Sequence[Member]) -> None:
    """Refuses a training that never moved, which would look like one model over texts."""
    from exporter.errors import UsageError

    if len({member.key["model"] for member in members}) == 1:
        names = " and ".join(member.name for member in members[:2])
        raise UsageError(
            f"{names} are the same files to the last byte, as all here: that is one checkpoint.",
            "Name checkpoints that differ.",
        )


def _one_text(plain: Mapping[str, Any], progress: ConsoleProgress) -> str | None:
    """The text for all checkpoints; None where the metrics read none."""
    from exporter.errors import UsageError
    from exporter.score.registry import metrics_named, reads_text

    named: str | None = plain["calibration"]
    if named == "self":
        raise UsageError(
            "Each checkpoint would sample a text of its own, and nobody could tell whether it or "
            "the model moved a rank.",
            f"Name one text for all: --calibration {_COMMON}, or a file.",
        )
    if named is None and reads_text(metrics_named(plain["metrics"])):
        progress.say(f"checkpoints: all on one text, {_COMMON}; --calibration names another")
        return _COMMON
    return named


def _checkpoints(
    sources: Sequence[str], plain: Mapping[str, Any], progress: ConsoleProgress
) -> list[Member]:
    from exporter.choose.studies.checkpoints import check_series
    from exporter.choose.studies.naming import checkpoint_labels
    from exporter.choose.studies.series import folder_names

    check_series(sources)
    names = folder_names(checkpoint_labels(sources))
    return [
        _member(name, source, plain, progress) for name, source in zip(names, sources, strict=True)
    ]


def _revisions(
    models: Sequence[str],
    options: Mapping[str, Any],
    plain: Mapping[str, Any],
    progress: ConsoleProgress,
) -> list[Member]:
    from exporter.choose.studies.series import folder_names
    from exporter.errors import UsageError

    revisions: tuple[str, ...] = options["revisions"]
    if len(models) != 1 or options["checkpoints"] or plain["revision"] or Path(models[0]).exists():
        raise UsageError(
            "--revisions is for one MODEL of the Hugging Face Hub, and names them all.",
            "Leave --checkpoints and --revision away; folders here need --checkpoints alone.",
        )
    if len(revisions) < 2:
        raise UsageError(f"{revisions[0]} is one revision; a series has two or more.")
    return [
        _member(name, models[0], {**plain, "revision": revision}, progress)
        for name, revision in zip(folder_names(revisions), revisions, strict=True)
    ]


def _texts(
    models: Sequence[str],
    options: Mapping[str, Any],
    plain: Mapping[str, Any],
    progress: ConsoleProgress,
) -> list[Member]:
    from exporter.choose.studies.series import folder_names
    from exporter.cli.score_runs import loaded_model
    from exporter.errors import UsageError

    if len(models) != 1:
        raise UsageError("Texts are varied for one MODEL.", "For several: --checkpoints.")
    if plain["calibration"] is not None and options["vary_calibration"]:
        raise UsageError(
            "--calibration names one text, --vary-calibration several.",
            "Name them all with --vary-calibration.",
        )
    if plain["samples"] is not None and options["vary_samples"]:
        raise UsageError(
            "--samples is one number, --vary-samples several.", "Give them all to --vary-samples."
        )
    texts = tuple(dict.fromkeys(options["vary_calibration"])) or (plain["calibration"],)
    counts = tuple(dict.fromkeys(options["vary_samples"])) or (plain["samples"],)
    pairs = list(itertools.product(texts, counts))
    if len(pairs) < 2:
        raise UsageError(
            "One text and one number of samples make no series.",
            "Repeat --vary-calibration, or give --vary-samples several numbers.",
        )
    names = folder_names([_label(text, count, len(counts) > 1) for text, count in pairs])
    load = cache(partial(loaded_model, models[0], plain, progress))  # for all texts once
    return [
        _member(name, models[0], {**plain, "calibration": text, "samples": count}, progress, load)
        for name, (text, count) in zip(names, pairs, strict=True)
    ]


def _label(text: str | None, count: int | None, with_count: bool) -> str:
    name = "text" if text is None else text if text.startswith("hf:") else Path(text).name
    return f"{name}-{count}" if with_count else name


def _member(
    name: str,
    source: str,
    options: Mapping[str, Any],
    progress: ConsoleProgress,
    load: Callable[[], LoadedModel] | None = None,
) -> Member:
    from exporter.artifacts import library_versions
    from exporter.choose.studies.series import Member
    from exporter.cli.requests import score_options, source_options
    from exporter.cli.score_runs import scored

    how, text = source_options(options), options["calibration"]
    key = {
        "model": _digest(source, how),
        "load": vars(how),
        "score": vars(score_options(options)),
        "way": {name: options.get(name) for name in ("stream", "device_map")},
        "text": _file_digest(text),
        "versions": library_versions(),
    }
    return Member(name, key, partial(scored, source, options, progress, load=load))


@cache
def _digest(source: str, how: SourceOptions) -> str:
    """Read once: the weights may be large, and a model may stand for several texts."""
    from exporter.models.loading.model_source import source_sha256

    return source_sha256(source, **{k: v for k, v in vars(how).items() if k != "dtype"})


def _file_digest(text: str | None) -> str | None:
    from exporter.files import sha256_file

    return sha256_file(Path(text)) if text is not None and Path(text).is_file() else None
