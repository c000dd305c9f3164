"""Which class runs an ONNX file: a row for each backend.

A new backend is one file and one row. The file, ``runners/NAME.py``, has a subclass of
:class:`~exporter.engines.runners.base.Runner` whose constructor takes the ONNX file, ``provider``
and ``threads``; it imports its library through :func:`exporter.optional.require`, and says in
``capabilities`` what it can do. With its row here, ``NAME:PATH`` is an arm of ``depthcut compare``.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from exporter.engines.build.engine_set import find_builds, names_engines
from exporter.engines.environment import default_threads
from exporter.engines.runners.base import Runner
from exporter.engines.runners.tensorrt import TensorRtRunner
from exporter.models.model_folder import ModelFolder, find_model

ONNX = "onnx"
"""The backend of a path without a name before it."""

RUNNERS: dict[str, tuple[str, str]] = {
    ONNX: ("exporter.engines.runners.onnxruntime", "OnnxRuntimeRunner"),
}
"""By a backend's name, the module and the class of its runner; imported when it is asked for."""


def open_runner(name: str, model: Path, *, provider: str = "cpu", threads: int) -> Runner:
    """A runner of an ONNX file, not entered.

    Args:
        name: The backend's, among :data:`RUNNERS`.
        model: The file.
        provider: Where it runs: ``cpu`` or ``cuda``.
        threads: CPU threads for one operator.

    Raises:
        BackendError: The backend doesn't know the provider.
    """
    module, kind = RUNNERS[name]
    runner: Runner = getattr(import_module(module), kind)(model, provider=provider, threads=threads)
    return runner


def open_model(
    path: Path, *, provider: str = "cpu", threads: int | None = None
) -> tuple[ModelFolder, Runner]:
    """A model's files, and its runner, which is not entered yet; of several builds the first.

    Args:
        path: An ONNX file, an engine, or a folder of one of them.
        provider: Where an ONNX file runs: ``cpu`` or ``cuda``.
        threads: CPU threads for one operator; None for all physical cores.

    Raises:
        OnnxFileError: There is no ONNX file, or more than one to choose from.
        EngineError: An engine is not what its record says.
        BackendError: The provider is not known.
    """
    if names_engines(path):
        home = path if path.is_dir() else path.parent
        return ModelFolder.beside(path, home), TensorRtRunner(find_builds(path)[0])
    folder = find_model(path)
    threads = threads or default_threads()
    return folder, open_runner(ONNX, folder.onnx, provider=provider, threads=threads)
