"""Which class runs a model's file: a row for each backend.

A new backend is one file and one row. The file, ``runners/NAME.py``, has a subclass of
:class:`~exporter.engines.runners.base.Runner` whose constructor takes the model's file,
``provider`` and ``threads``; it imports its library through :func:`exporter.optional.require`, and
says in ``capabilities`` what it can do. With its row here, ``NAME:PATH`` is an arm of ``depthcut
compare``, and a model of ``evaluate``, ``generate``, ``lm-eval`` and ``costs``.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from exporter.engines.build.engine_set import find_builds, names_engines
from exporter.engines.environment import default_threads
from exporter.engines.runners.base import Runner
from exporter.engines.runners.tensorrt import TensorRtRunner
from exporter.models.gguf.facts import gguf_facts, gguf_folder
from exporter.models.graph_facts import GraphFacts, read_facts
from exporter.models.model_folder import ModelFolder, find_model

ONNX = "onnx"
"""The backend of a path without a name before it."""


class Backend(NamedTuple):
    """What runs a kind of files.

    Attributes:
        module: Where its runner's class is; it is imported when it is asked for.
        runner: The class.
        gguf: Whether the files are GGUF files, and not ONNX files.
    """

    module: str
    runner: str
    gguf: bool = False

    def folder(self, path: Path) -> ModelFolder:
        """A model's files.

        Args:
            path: The model's file, or a folder with one.

        Raises:
            OnnxFileError: There is no ONNX file, or more than one to choose from.
            GgufFileError: It is no GGUF file.
        """
        return gguf_folder(path) if self.gguf else find_model(path)

    def facts(self, model: Path) -> GraphFacts:
        """What the model's file tells of itself.

        Raises:
            OnnxFileError: It is no complete ONNX file.
            GgufFileError: It is no GGUF file.
        """
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
    """A runner of a model's file, not entered.

    Args:
        name: The backend's, among :data:`RUNNERS`.
        model: The file.
        provider: Where it runs: ``cpu`` or ``cuda``.
        threads: CPU threads for one operator.

    Raises:
        BackendError: The backend doesn't know the provider.
    """
    module = import_module(RUNNERS[name].module)
    kind: type[Any] = getattr(module, RUNNERS[name].runner)
    runner: Runner = kind(model, provider=provider, threads=threads)
    return runner


def open_model(
    model: Path | str, *, provider: str = "cpu", threads: int | None = None
) -> tuple[ModelFolder, Runner]:
    """A model's files, and its runner, which is not entered yet; of several builds the first.

    Args:
        model: An ONNX file, an engine, or a folder of one of them; or a backend among
            :data:`RUNNERS` and the path of its model, as in ``llama.cpp:FILE``.
        provider: Where an ONNX file runs: ``cpu`` or ``cuda``.
        threads: CPU threads for one operator; None for all physical cores.

    Raises:
        OnnxFileError: There is no ONNX file, or more than one to choose from.
        EngineError: An engine is not what its record says.
        BackendError: The provider is not known.
    """
    backend, path = named_backend(model)
    if backend is None and names_engines(path):
        home = path if path.is_dir() else path.parent
        return ModelFolder.beside(path, home), TensorRtRunner(find_builds(path)[0])
    backend = backend or ONNX
    folder = RUNNERS[backend].folder(path)
    threads = threads or default_threads()
    return folder, open_runner(backend, folder.onnx, provider=provider, threads=threads)
