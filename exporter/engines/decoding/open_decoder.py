"""From what lies on disk to the decoder that runs it."""

from __future__ import annotations

from pathlib import Path

from exporter.engines.build.engine_set import (
    SUFFIXES,
    find_builds,
    holds_engines_alone,
    sidecar_path,
)
from exporter.engines.decoding.decoder import Decoder
from exporter.engines.decoding.runner_decoder import (
    LoadingDecoder,
    OnnxRuntimeDecoder,
    RunnerDecoder,
)
from exporter.engines.decoding.tensorrt_decoder import TensorRtDecoder
from exporter.engines.environment import default_threads
from exporter.engines.runners.base import Runner
from exporter.engines.runners.llama_cpp import LlamaCppRunner
from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
from exporter.engines.runners.registry import ONNX, RUNNERS, named_backend, open_runner
from exporter.engines.runners.tensorrt import TensorRtRunner
from exporter.errors import UsageError


def open_decoder(
    model: Path | str,
    *,
    backend: str | None = None,  # None takes what is there, and of both the first
    provider: str = "cpu",
    threads: int | None = None,  # CPU threads, but for an engine; all cores when None
    context: int | None = None,  # positions that a text may have at most, but for an engine
) -> Decoder:
    """A decoder for a model, not yet loaded."""
    named, model = named_backend(model)
    if named is not None and backend is not None:
        raise UsageError(
            f"{named}: says already what runs the model.",
            "Leave --runner out.",
            code="wrong-backend",
        )
    if named is None and _runs_engines(model, backend):
        if context is not None:
            raise UsageError(
                "How long a text may be is built into an engine.",
                "Leave --cache-length out.",
                code="context-fixed",
            )
        return TensorRtDecoder(find_builds(model)[0])
    files = RUNNERS[named or ONNX]
    folder = files.folder(model)
    number = threads or default_threads()
    runner = open_runner(named or ONNX, folder.onnx, provider=provider, threads=number)
    if named is not None:
        return LoadingDecoder(runner, context=context)
    return OnnxRuntimeDecoder(
        folder.onnx, provider=provider, threads=runner.threads, context=context
    )


def _runs_engines(model: Path, backend: str | None) -> bool:
    """Whether engines are what runs of a file or folder."""
    if not model.is_file():
        return backend == "engine" or (backend is None and holds_engines_alone(model))
    is_engine = model.suffix in SUFFIXES or (
        model.suffix != ".onnx" and sidecar_path(model).is_file()
    )
    if backend is not None and is_engine != (backend == "engine"):
        raise UsageError(
            f"{model} is {'an' if is_engine else 'no'} engine.",
            "Leave --runner out.",
            code="wrong-backend",
        )
    return is_engine


def decoder_on(runner: Runner) -> Decoder:
    """A decoder on an entered runner, which stays entered; the cache stays where the model runs.

    While it is entered nothing else may use the runner.
    """
    if isinstance(runner, TensorRtRunner):
        return TensorRtDecoder(runner.engines, on=runner)
    return RunnerDecoder(runner)


def own_decoder(runner: Runner) -> Decoder | None:
    """A decoder that loads a runner's model by itself, for timing; None where there is none."""
    if isinstance(runner, TensorRtRunner):
        decoder = TensorRtDecoder(runner.engines, trial=not runner.tried)
        decoder.turns = runner.turns
        return decoder
    if isinstance(runner, OnnxRuntimeRunner):
        return OnnxRuntimeDecoder(runner.model, provider=runner.device, threads=runner.threads)
    if isinstance(runner, LlamaCppRunner):
        own = LlamaCppRunner(runner.model, threads=runner.threads, last_logits=True)
        return LoadingDecoder(own)
    return None
