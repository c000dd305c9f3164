"""Times of engines, and the memory's speed that they are held against."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.artifacts import GpuTime
from exporter.artifacts.latency import Shape
from exporter.engines.build.cuda import Cuda
from exporter.engines.build.engine_set import EngineSet, find_engines
from exporter.engines.decoding.tensorrt_decoder import TensorRtDecoder
from exporter.engines.inputs import make_inputs, random_tokens
from exporter.engines.runners.base import Array, Runner
from exporter.engines.runners.tensorrt import open_engine
from exporter.pipeline.gpu.cases import TOKENS
from exporter.pipeline.gpu.workplace import Workplace

_COPY_BYTES, _COPIES = 4 << 30, 10


def memory_speed(extra: str) -> tuple[float | None, float]:
    """Bytes a second: what the card's memory is made for, and what a copy within it reaches."""
    cuda = Cuda(extra)
    try:
        size = min(_COPY_BYTES, cuda.free_bytes()[0] // 4)
        source, target = (cuda.allocate(size, "a copy") for _ in range(2))
        begin, end = cuda.event(), cuda.event()
        times = []
        for _ in range(_COPIES):
            cuda.record(begin)
            cuda.copy(target, source, size)
            cuda.record(end)
            cuda.wait()
            times.append(cuda.elapsed_ms(begin, end))
        return cuda.peak_bytes_per_s(), 2 * size / (min(times) / 1e3)
    finally:
        cuda.close()


def opened(engines: Path) -> TensorRtDecoder:
    """A decoder on a folder's engines. A step's process may crash: nothing is tried before."""
    return TensorRtDecoder(find_engines(engines), trial=False)


def stepping(engines: EngineSet, batch: int) -> TensorRtDecoder:
    """The same that only continues texts, of as many sequences, on an engine for decode alone."""
    return TensorRtDecoder(engines, trial=False, batch=batch, begins=False)


def step_time(
    decoder: TensorRtDecoder,
    place: Workplace,
    batch: int,
    past: int,
    least_bytes: int,
    **facts: Any,
) -> GpuTime:
    """Decode steps, each one token further; by the host's clock, as a text is generated.

    Args:
        decoder: Entered; what lies in its caches doesn't matter.
        place: Says how many.
        batch: Sequences.
        past: Filled positions at the first of them.
        least_bytes: What it must read there.
        facts: Others of the row: subject and arm at least.
    """
    token = np.ones((batch, 1), np.int64)
    decoder.begin_at(batch, past)
    for _ in range(place.case.warm_up):
        decoder.advance(token)
    decoder.begin_at(batch, past)
    times = [_host_ms(partial(decoder.advance, token)) for _ in range(place.case.samples)]
    return GpuTime(
        phase="decode", batch=batch, sequence_length=1, past_length=past,
        least_bytes=least_bytes, median_ms=statistics.median(times), samples_ms=times, **facts,
    )  # fmt: skip


def prefill_time(engines: Path, place: Workplace, batch: int, prompt: int, **facts: Any) -> GpuTime:
    """Prompts from empty caches; on the device's clock where the runner reads it."""
    with open_engine(engines, trial=False) as runner:
        call = runner.prepare(_prompts(runner, batch, prompt), phase="prefill")
        on_device = call.timed
        run = partial(_host_ms, call) if on_device is None else on_device
        times = [run() for _ in range(place.case.warm_up + place.case.samples)]
    times = times[place.case.warm_up :]
    return GpuTime(
        phase="prefill", batch=batch, sequence_length=prompt,
        clock="host" if on_device is None else "device",
        median_ms=statistics.median(times), samples_ms=times, **facts,
    )  # fmt: skip


def _host_ms(run: Callable[[], None]) -> float:
    begin = time.perf_counter()
    run()
    return (time.perf_counter() - begin) * 1e3


def prompt_logits(engines: Path, batch: int, prompt: int) -> NDArray[Any]:
    """Of the same prompts, the logits at the last position, ``[batch, vocabulary]``, float32."""
    with open_engine(engines, trial=False) as runner:
        logits = runner.run(_prompts(runner, batch, prompt), ["logits"], phase="prefill")["logits"]
    return logits[:, -1].astype(np.float32)


def _prompts(runner: Runner, batch: int, prompt: int) -> dict[str, Array]:
    shape = Shape("prefill", batch, prompt)
    return make_inputs(runner.inputs, shape, random_tokens(shape, TOKENS))
