"""Opens what decodes, and generates: prefill, then a token at a time; one text or many."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from exporter.engines.build.engine_set import find_builds, names_engines
from exporter.engines.decoding.decoder import Decoder
from exporter.engines.decoding.encoder_decoder import EncoderDecoderRunner, StackDecoder
from exporter.engines.decoding.runner_decoder import RunnerDecoder
from exporter.engines.decoding.tensorrt_decoder import TensorRtDecoder
from exporter.engines.decoding.verify import believed
from exporter.engines.environment import default_threads
from exporter.engines.runners.base import Runner
from exporter.engines.runners.llama_cpp import LlamaCppRunner
from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
from exporter.engines.runners.registry import ONNX, RUNNERS, named_backend, open_runner
from exporter.engines.runners.tensorrt import TensorRtRunner
from exporter.errors import BackendError, UsageError
from exporter.models.model_folder import ModelFolder
from exporter.progress import QUIET, Progress

_END = -1  # stands for each token after one that ends the text


@dataclasses.dataclass(frozen=True)
class Generation:
    """What was generated, and how fast."""

    token_ids: tuple[int, ...]
    ended: bool
    first_token_ms: float
    per_token_ms: float | None  # mean over the later tokens; None with fewer than two


def generate(
    decoder: Decoder,
    prompt_ids: list[int],
    *,
    new_tokens: int,  # the most tokens to generate, at least one
    stop_ids: frozenset[int] = frozenset(),
    positions: int | None = None,  # how many positions the model knows; None where nothing says so
    on_token: Callable[[int], None] | None = None,
) -> Generation:
    """Continues one prompt greedily."""
    if not prompt_ids:
        raise BackendError("The prompt holds no token.", "Give it some text.", code="no-tokens")
    refuse_too_long(decoder, len(prompt_ids), new_tokens, positions)
    prompts = np.array([prompt_ids], np.int64)
    stream = _tokens(decoder, prompts, len(prompt_ids) + new_tokens)
    begin = time.perf_counter()
    numbers: list[int] = []
    times: list[float] = []
    for token in islice(stream, new_tokens):
        times.append(time.perf_counter())
        if int(token[0]) in stop_ids:
            break
        numbers.append(int(token[0]))
        if on_token is not None:
            on_token(numbers[-1])
    later = (times[-1] - times[0]) / (len(times) - 1) * 1e3 if len(times) > 1 else None
    ended = len(times) > len(numbers)
    return Generation(tuple(numbers), ended, (times[0] - begin) * 1e3, later)


def refuse_too_long(decoder: Decoder, prompt: int, new_tokens: int, positions: int | None) -> None:
    """Refuses a text for which there is no room; the decoder need not be loaded."""
    if positions is not None and prompt + new_tokens > positions:
        raise BackendError(
            f"The model knows {positions} positions; prompt and new tokens together are "
            f"{prompt + new_tokens} ({prompt} + {new_tokens}).",
            "Take a shorter prompt or fewer new tokens.",
            code="context-too-long",
        )
    decoder.refuse_unfit(1, prompt, new_tokens)


def continuations(
    decoder: Decoder,
    prompts: NDArray[np.int64],  # `[prompts, tokens]`
    *,
    new_tokens: int,
    stop_ids: Collection[int] = (),
    batch_size: int | None = None,  # prompts that run together; None for all
    arm: str = "it",
    progress: Progress = QUIET,
) -> NDArray[np.int64]:
    """Continues prompts greedily.

    Tokens, ``[prompts, new_tokens]``; -1 for each after one that ends the text.
    """
    rows = batch_size or len(prompts)
    starts = range(0, len(prompts), rows)
    context, arrays = prompts.shape[1] + new_tokens, []
    with progress.task(f"greedy generation, {arm}", total=len(starts), unit="batches") as task:
        for start in starts:
            stream = _tokens(decoder, prompts[start : start + rows], context)
            arrays.append(np.stack(list(islice(stream, new_tokens)), axis=1))
            task.advance()
    tokens = np.concatenate(arrays)
    stops = np.isin(tokens, list(stop_ids))
    after = np.cumsum(stops, axis=1) - stops > 0
    return np.where(after, _END, tokens)


def _tokens(
    decoder: Decoder, prompts: NDArray[np.int64], context: int
) -> Iterator[NDArray[np.int64]]:
    """The likeliest next token of each sequence, ``[batch]``, again and again."""
    logits = decoder.prefill(prompts, context=context)
    while True:
        if np.isnan(logits).any():
            raise BackendError(
                "The model gives NaN logits, so there is no next token.", code="not-finite"
            )
        token = np.asarray(logits.argmax(axis=-1), np.int64)
        yield token
        logits = decoder.step(token[:, None])


def open_decoder(
    model: Path | str,
    *,
    provider: str = "cpu",
    threads: int | None = None,  # CPU threads, but for an engine; all cores when None
    context: int | None = None,  # positions that a text may have at most, but for an engine
    progress: Progress = QUIET,
) -> Decoder:
    """A decoder for a model, not yet loaded."""
    backend, path = named_backend(model)
    if context is not None and backend is None and names_engines(path):
        raise UsageError(
            "How long a text may be is built into an engine.",
            "Leave --cache-length out.",
            code="unsupported-option",
        )
    runner = open_model(model, provider=provider, threads=threads, progress=progress)[1]
    if isinstance(runner, TensorRtRunner):
        return TensorRtDecoder(runner.engines)
    return RunnerDecoder(runner, context=context, loads=True)


def open_model(
    model: Path | str,
    *,
    provider: str = "cpu",
    threads: int | None = None,  # CPU threads, but for an engine; all cores when None
    progress: Progress = QUIET,
) -> tuple[ModelFolder, Runner]:
    """A model's files, and its runner, which is not entered yet; of several builds the first."""
    backend, path = named_backend(model)
    if backend is None and names_engines(path):
        home = path if path.is_dir() else path.parent
        engines = believed(find_builds(path)[0], progress=progress)
        return ModelFolder.beside(path, home), TensorRtRunner(engines)
    backend = backend or ONNX
    folder = RUNNERS[backend].folder(path)
    threads = threads or default_threads()
    return folder, open_runner(backend, folder.onnx, provider=provider, threads=threads)


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
    if isinstance(runner, EncoderDecoderRunner):
        return StackDecoder(runner)
    if isinstance(runner, OnnxRuntimeRunner):
        own: Runner = OnnxRuntimeRunner(
            runner.model, provider=runner.device, threads=runner.threads
        )
    elif isinstance(runner, LlamaCppRunner):
        own = LlamaCppRunner(runner.model, threads=runner.threads, last_logits=True)
    else:
        return None
    return RunnerDecoder(own, loads=True)
