"""The same model in every worker, or none at all."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exporter.errors import ClusterError, ModelSourceError
from exporter.models.loading.model_source import LoadedModel, load_model


@dataclass(frozen=True)
class ModelAddress:
    """What a worker loads.

    Attributes:
        source: A path, absolute, or a hub id.
        sha256: Of what was loaded where the command was given.
        options: Further arguments of :func:`exporter.models.loading.model_source.load_model`.
    """

    source: str
    sha256: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, loaded: LoadedModel, options: Mapping[str, Any] | None = None) -> ModelAddress:
        """Where a loaded model came from."""
        source = loaded.ref.source
        if Path(source).expanduser().exists():
            source = str(loaded.path.resolve())
        return cls(source, loaded.ref.sha256, dict(options or {}))

    def load(self) -> LoadedModel:
        """Loads it, in the worker.

        Raises:
            ClusterError: It is not there, or is another model.
        """
        host = socket.gethostname()
        try:
            loaded = load_model(self.source, **self.options)
        except ModelSourceError as error:
            raise ClusterError(
                f"On {host}: {error.message}",
                "The model has to lie under the same path on all machines, such as a shared "
                "folder, or be a hub id that all can fetch.",
                code="model-missing",
            ) from error
        if loaded.ref.sha256 != self.sha256:
            raise ClusterError(
                f"On {host}, {self.source} is another model (sha256 {loaded.ref.sha256[:12]}) "
                f"than where the command was given (sha256 {self.sha256[:12]}).",
                "Give all machines the same files.",
                code="another-model",
            )
        return loaded
