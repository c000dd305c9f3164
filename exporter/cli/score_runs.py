"""One model scored as the options of `depthcut score` ask, whichever way it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from exporter.artifacts import ImportanceReport
from exporter.progress import Progress

if TYPE_CHECKING:
    from exporter.models.loading.model_source import LoadedModel


def scored(
    model: str,
    options: Mapping[str, Any],
    progress: Progress,
    *,
    load: Callable[[], LoadedModel] | None = None,
) -> ImportanceReport:
    """Loads and scores one model.

    Args:
        model: A folder, a hub id or a GGUF file.
        options: The command's, by their parameters' names.
        progress: Told what goes on.
        load: Gives the model where it is scored whole in this process; None: :func:`loaded_model`.
    """
    from exporter.cli.cluster_options import asks_for_cluster, cluster_scored
    from exporter.cli.stream_options import streams

    if streams(options):
        return _streamed(model, options, progress)
    if asks_for_cluster(options):
        return cluster_scored(model, options, progress)
    loaded = loaded_model(model, options, progress) if load is None else load()
    return _in_memory(loaded, options, progress)


def loaded_model(model: str, options: Mapping[str, Any], progress: Progress) -> LoadedModel:
    """Loads a model as the options ask.

    Args:
        model: A folder, a hub id or a GGUF file.
        options: The command's, by their parameters' names.
        progress: Told what goes on.
    """
    from exporter.cli.requests import source_options
    from exporter.models.loading.model_source import load_model

    with progress.task(f"load {model}"):
        return load_model(
            model, **vars(source_options(options)), device_map=options.get("device_map")
        )


def _in_memory(
    loaded: LoadedModel, options: Mapping[str, Any], progress: Progress
) -> ImportanceReport:
    from exporter.cli.requests import score_options
    from exporter.score import score as score_model

    return score_model(loaded, score_options(options), progress=progress)


def _streamed(model: str, options: Mapping[str, Any], progress: Progress) -> ImportanceReport:
    from exporter.cli.requests import score_options, source_options
    from exporter.models.loading.meta_model import load_meta
    from exporter.score.streaming import refuse_unstreamable, score_streamed

    source, wanted = source_options(options), score_options(options)
    refuse_unstreamable(wanted)
    with progress.task(f"open {model}"):
        meta = load_meta(
            model,
            dtype=source.dtype,
            revision=source.revision,
            allow_any_model_type=source.allow_any_model_type,
        )
    return score_streamed(meta, wanted, stream_dir=options.get("stream_dir"), progress=progress)
