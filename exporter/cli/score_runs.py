"""One model scored as the options of `depthcut score` ask, whichever way it runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from exporter.artifacts import ImportanceReport
from exporter.progress import Progress


def scored(model: str, options: Mapping[str, Any], progress: Progress) -> ImportanceReport:
    """Loads and scores one model.

    Args:
        model: A folder, a hub id or a GGUF file.
        options: The command's, by their parameters' names.
        progress: Told what goes on.
    """
    from exporter.cli.cluster_options import asks_for_cluster, cluster_scored
    from exporter.cli.requests import score_options, source_options
    from exporter.importance import score as score_model
    from exporter.model_source import load_model

    if asks_for_cluster(options):
        return cluster_scored(model, options, progress)
    with progress.task(f"load {model}"):
        loaded = load_model(model, **vars(source_options(options)))
    return score_model(loaded, **vars(score_options(options)), progress=progress)
