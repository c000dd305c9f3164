"""Times a decode step against the card's memory, and the largest batch that fits against another.

Written without a GPU at hand. Times are those of CUDA events or, for whole generations, of the
host; every sample goes into the result file.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from exporter.artifacts.latency import Shape
from exporter.engines.build.cuda import Cuda
from exporter.engines.build.driver import Driver
from exporter.engines.build.engine_set import find_engines
from exporter.engines.build.libraries import Backend
from exporter.engines.build.profiles import Ranges, Span
from exporter.engines.decoding.tensorrt_decoder import TensorRtDecoder
from exporter.engines.inputs import make_inputs, random_tokens
from exporter.engines.runners.base import BoundCall
from exporter.engines.runners.tensorrt import open_engine
from exporter.errors import DepthcutError
from tests.benchmarks.gpu_models import Case, build, emptied
from tests.benchmarks.gpu_sizes import Sizes

WARM_UP, SAMPLES, ATTEMPTS = 30, 200, 5
_COPY_BYTES = 4 << 30
Rows = list[dict[str, Any]]


def bandwidth() -> dict[str, float]:
    """Bytes a second: what the card is made for, and what a copy within it reaches."""
    from cuda.bindings import runtime

    cuda = Cuda("gpu")
    try:
        size = min(_COPY_BYTES, cuda.free_bytes()[0] // 4)
        source, target = cuda.allocate(size, "a copy"), cuda.allocate(size, "a copy")
        begin, end = cuda.event(), cuda.event()
        kind = runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        times = []
        for _ in range(10):
            cuda.record(begin)
            runtime.cudaMemcpyAsync(target, source, size, kind, cuda.stream)
            cuda.record(end)
            cuda.wait()
            times.append(cuda.elapsed_ms(begin, end))
        copied = 2 * size / (min(times) / 1e3)
    finally:
        cuda.close()
    attributes = runtime.cudaDeviceAttr
    _, kilohertz = runtime.cudaDeviceGetAttribute(attributes.cudaDevAttrMemoryClockRate, 0)
    _, bits = runtime.cudaDeviceGetAttribute(attributes.cudaDevAttrGlobalMemoryBusWidth, 0)
    return {"peak": 2e3 * kilohertz * bits / 8, "copy": copied}


def decode_step(
    onnx: Path, folder: Path, backend: Backend, driver: Driver, case: Case, speeds: dict[str, float]
) -> Rows:
    """One step at fixed shapes, for each batch; nothing but the engine is timed."""
    past = Span(case.past, case.past, case.past)
    wanted = [("decode", Ranges(batch=Span(b, b, b), context=past)) for b in case.batches]
    engine = build(onnx, emptied(folder) / "decode.engine", backend, driver, *wanted)
    if driver.problem:
        return []
    sizes = Sizes.of(case.shape)
    rows: Rows = []
    with open_engine(engine) as runner:
        for batch in case.batches:
            shape = Shape("decode", batch, 1, case.past)
            tokens = random_tokens(shape, case.shape.vocabulary)
            inputs = make_inputs(runner.inputs, shape, tokens)
            times = _times(runner.prepare(inputs, phase=shape.phase))
            least = sizes.step_bytes(batch, case.past)
            rows.append({
                "part": "decode", "backend": backend, "batch": batch, "past": case.past,
                "median_ms": statistics.median(times), "samples_ms": times,
                "least_bytes": least, "copied_bytes": sizes.copied_bytes(batch, case.past),
            })  # fmt: skip
            print(_told(rows[-1], speeds), flush=True)
    return rows


def _times(call: BoundCall) -> list[float]:
    if call.timed is None:
        raise TypeError("the runner gives no device times")
    for _ in range(WARM_UP):
        call()
    return [call.timed() for _ in range(SAMPLES)]


def _told(row: dict[str, Any], speeds: dict[str, float]) -> str:
    reached = row["least_bytes"] / (row["median_ms"] / 1e3)
    shares = ", ".join(f"{reached / speed:.0%} of {name}" for name, speed in speeds.items())
    return (
        f"  {row['backend']} decode, batch {row['batch']}, cache {row['past']}: "
        f"{row['median_ms']:.3f} ms, reads {reached / 1e12:.2f} TB/s ({shares}; aim 80 %)"
    )


def largest_batches(
    models: tuple[Path, Path], folder: Path, backend: Backend, driver: Driver, case: Case
) -> Rows:
    """Prompts and new tokens at the largest batch that fits, whole and pruned; prints the ratio."""
    rows: Rows = []
    for name, onnx, dropped in zip(("whole", "cut"), models, (0, case.dropped), strict=True):
        sizes = Sizes.of(case.shape, dropped=dropped)
        found = _largest(onnx, folder, backend, driver, case, sizes)
        rows += [{"part": "largest batch", "arm": name, "backend": backend, **row} for row in found]
    if len(rows) == 2:
        whole, cut = (row["tokens_per_s"] for row in rows)
        print(f"  ratio {cut / whole:.2f} (aim 1.48, which the paper has for 70B)", flush=True)
    return rows


def _largest(
    onnx: Path, folder: Path, backend: Backend, driver: Driver, case: Case, sizes: Sizes
) -> Rows:
    """Begins with what should fit; an eighth less whenever it doesn't.

    One engine with both phases, each of which has the weights. Prompts run one at a time.
    """
    free, total = (80 << 30, 80 << 30) if driver.problem else _free()
    batch = max(1, sizes.largest_batch(free, total, case.prompt + case.new, profiles=2))
    prompt = Span(case.prompt, case.prompt, case.prompt)
    context = Span(case.prompt, case.prompt + case.new // 2, case.prompt + case.new)
    one = Ranges(batch=Span(1, 1, 1), prompt=prompt)
    for _ in range(ATTEMPTS):
        many = Ranges(batch=Span(1, batch, batch), context=context)
        wanted = (("prefill", one), ("decode", many))
        engine = build(onnx, emptied(folder) / "both.engine", backend, driver, *wanted)
        if driver.problem:
            return []
        try:
            return [_generated(engine, batch, case)]
        except DepthcutError as error:
            print(f"  batch {batch}: {error.message}", flush=True)
            batch -= max(1, batch // 8)
    return []


def _free() -> tuple[int, int]:
    cuda = Cuda("gpu")
    try:
        return cuda.free_bytes()
    finally:
        cuda.close()


def _generated(engine: Path, batch: int, case: Case) -> dict[str, Any]:
    """Random tokens go in whatever comes out: with random weights no text means anything."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, case.shape.vocabulary, (batch, case.prompt))
    token = prompts[:, :1]
    with TensorRtDecoder(find_engines(engine)) as decoder:
        decoder.refuse_unfit(batch, case.prompt, case.new)
        decoder.prefill(prompts)
        decoder.advance(token)  # warm
        begin = time.perf_counter()
        decoder.prefill(prompts)
        filled = time.perf_counter()
        for _ in range(case.new - 1):
            decoder.advance(token)
        end = time.perf_counter()
        memory = decoder.capabilities.gpu_memory_bytes
    row = {
        "batch": batch, "prompt": case.prompt, "new": case.new, "prefill_s": filled - begin,
        "decode_s": end - filled, "tokens_per_s": batch * case.new / (end - begin),
        "gpu_memory_bytes": memory,
    }  # fmt: skip
    print(f"  batch {batch}: {row['tokens_per_s']:.0f} tokens/s, prefill {row['prefill_s']:.1f} s, "
          f"decode {row['decode_s']:.1f} s, {memory / 1e9:.1f} GB", flush=True)  # fmt: skip
    return row
