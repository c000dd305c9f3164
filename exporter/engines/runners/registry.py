"""Which class runs a model's file: a row for each backend."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from exporter.engines.runners.base import Runner
from exporter.models.gguf_model_files import gguf_facts, gguf_folder
from exporter.models.graph_facts import GraphFacts, read_facts
from exporter.models.model_folder import ModelFolder, find_model

ONNX = "onnx"
"""The backend of a path without a name before it."""


class Backend(NamedTuple):
    """What runs a kind of files."""

    module: str
    runner: str
    gguf: bool = False

    def folder(self, path: Path) -> ModelFolder:
        """A model's files."""
        return gguf_folder(path) if self.gguf else find_model(path)

    def facts(self, model: Path) -> GraphFacts:
        """What the model's file tells of itself."""
        return gguf_facts(model) if self.gguf else read_facts(model)


RUNNERS: dict[str, Backend] = {
    ONNX: Backend("exporter.engines.runners.onnxruntime", "OnnxRuntimeRunner"),
    "openvino": Backend("exporter.engines.runners.openvino", "OpenVinoRunner"),
    "llama.cpp": Backend("exporter.engines.runners.llama_cpp", "LlamaCppRunner", gguf=True),
}
"""By a backend's name."""


def named_backend(text: Path | str) -> tuple[str | None, Path]:
    """The backend before a path, as in ``openvino:DIR``, and the path; None where none is named.

    A file of such a name is written ``./openvino:x``.
    """
    kind, colon, rest = str(text).partition(":")
    return (kind, Path(rest)) if colon and kind in RUNNERS else (None, Path(text))


def open_runner(name: str, model: Path, *, provider: str = "cpu", threads: int) -> Runner:
    """A runner of a model's file, not entered."""
    module = import_module(RUNNERS[name].module)
    kind: type[Any] = getattr(module, RUNNERS[name].runner)
    runner: Runner = kind(model, provider=provider, threads=threads)
    return runner
