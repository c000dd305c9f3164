"""From a path to what scores it."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from exporter.compare.tasks.encoding import TextCodec
from exporter.compare.tasks.likelihood import LikelihoodScorer
from exporter.engines.build.engine_set import SUFFIXES, find_builds, holds_engines_alone
from exporter.engines.environment import default_threads
from exporter.engines.runners.base import Runner
from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
from exporter.engines.runners.tensorrt import TensorRtRunner
from exporter.models.model_folder import ModelFolder, find_model


def open_scorer(
    path: Path,
    stack: ExitStack,
    *,
    provider: str = "cpu",
    threads: int | None = None,
    batch_size: int | None = None,
    longest: int | None = None,
) -> tuple[LikelihoodScorer, TextCodec]:
    """Loads a model and its tokenizer.

    Args:
        path: An ONNX file with its tokenizer beside it, their folder, or an engine.
        stack: Frees the model when it is closed.
        provider: ``cpu`` or ``cuda``.
        threads: CPU threads; None for all physical cores.
        batch_size: Sequences in one run; None for what suits the backend.
        longest: Positions, where the config tells none.

    Raises:
        OnnxFileError: There is no ONNX file, or more than one to choose from.
        TaskError: There is no tokenizer.
        BackendError: The model can't be loaded.
    """
    folder, runner = open_model(path, provider=provider, threads=threads)
    codec = TextCodec(folder)
    stack.enter_context(runner)
    return LikelihoodScorer.of(runner, folder, rows=batch_size, longest=longest), codec


def open_model(
    path: Path, *, provider: str, threads: int | None = None
) -> tuple[ModelFolder, Runner]:
    """A model's files, and its runner, which is not entered yet; of several builds the first.

    Raises:
        OnnxFileError: There is no ONNX file, or more than one to choose from.
        EngineError: An engine is not what its record says.
        BackendError: The provider is not known.
    """
    if path.suffix in SUFFIXES or holds_engines_alone(path):
        home = path if path.is_dir() else path.parent
        return ModelFolder.beside(path, home), TensorRtRunner(find_builds(path)[0])
    folder = find_model(path)
    runner = OnnxRuntimeRunner(folder.onnx, provider=provider, threads=threads or default_threads())
    return folder, runner
