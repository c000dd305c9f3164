"""Engines on an NVIDIA GPU: ``python -m tests.benchmarks.bench_gpu FOLDER [--steps NAME,NAME]``.

First the card and the numbers of each form, then times, the most telling ones first.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from exporter.artifacts import Phase, PlannedDeletion
from exporter.artifacts.latency import Shape
from exporter.cut.options import CutOptions
from exporter.cut.surgery import prune_file
from exporter.engines.build.build import build_engines
from exporter.engines.build.cuda import Cuda
from exporter.engines.build.engine_set import EngineRecord, find_engines, sidecar_path
from exporter.engines.build.libraries import LIBRARIES, Backend, ask_driver, usual_backend
from exporter.engines.build.profiles import Ranges, Span
from exporter.engines.build.settings import BuildSettings
from exporter.engines.decoding.tensorrt_decoder import TensorRtDecoder
from exporter.engines.decoding.verify import verify_engines
from exporter.engines.runners.tensorrt import open_engine
from exporter.engines.tensors import make_inputs, random_tokens
from exporter.errors import OUT_OF_MEMORY, DepthcutError
from exporter.processes import available_bytes
from tests.benchmarks.frame import rendered
from tests.llama_shaped import LlamaShape, write_llama

DTYPES = {"fp32": "FLOAT", "fp16": "FLOAT16", "bf16": "BFLOAT16"}
TOKENS = 90
"""Random tokens are drawn below it: no vocabulary is smaller."""
BOTH: tuple[Phase, ...] = ("prefill", "decode")
PAPER = {"13b": 1.40, "8b": 1.38, "70b": 1.48}
"""What was published for Llama 2 13B, 3 8B and 2 70B (in 4 bits) without half of the attentions."""
RESERVE = 0.04  # of the card, for contexts, scratch memory and what the libraries keep
# Of what there is, what the weights of a slice may take: of the card, so that caches have the rest
# (8B whole on 24 GB); of the disk, for a model and one engine; of the machine's memory, of which a
# builder took three times the weights (TensorRT-RTX 1.7).
CARD_SHARE, DISK_SHARE, BUILDER_SHARE = 0.7, 0.4, 0.25

# With Attention as one operator: of the decomposed one TensorRT-RTX 1.7 writes keys and values
# out for each query head, 4.3 GB a layer at batch 64 and 4096 tokens instead of 0.02.
FORM = {"fused_attention": True, "positions": True}
LLAMA_8B = LlamaShape(
    layers=32, hidden=4096, heads=32, kv_heads=8, intermediate=14336, vocabulary=128256,
    dtype=ir.DataType.BFLOAT16, **FORM,
)  # fmt: skip
LLAMA_70B = replace(LLAMA_8B, layers=80, hidden=8192, heads=64, intermediate=28672)
LLAMA_13B = LlamaShape(
    layers=40, hidden=5120, heads=40, kv_heads=40, intermediate=13824, vocabulary=32000,
    dtype=ir.DataType.FLOAT16, **FORM,
)  # fmt: skip
FEW_LAYERS = replace(LLAMA_8B, layers=4, vocabulary=1024)
TINY = LlamaShape(
    layers=2, hidden=64, heads=4, kv_heads=2, intermediate=128, vocabulary=97,
    dtype=ir.DataType.FLOAT, **FORM,
)  # fmt: skip

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """What is measured; the defaults are a card's, tests take tiny ones."""

    dtypes: tuple[str, ...] = ("fp32", "fp16", "bf16")
    attention: LlamaShape = FEW_LAYERS
    pasts: tuple[int, ...] = (64, 512, 4000)
    batches: tuple[int, ...] = (1, 64)
    large: tuple[LlamaShape, ...] = (LLAMA_13B, LLAMA_8B, LLAMA_70B)
    prompt: int = 2048
    new: int = 2048
    room: int = 4096
    warm_up: int = 20
    samples: int = 20
    steps: int = 60  # of a sample; with 4000 positions and the steps before them they fit the room


@dataclass(frozen=True)
class Sizes:
    """Bytes of a Llama with some attentions less; of the embedding a step reads a few rows."""

    weights: int
    embedding: int
    cache_per_token: int

    @classmethod
    def of(cls, shape: LlamaShape, dropped: int = 0) -> Sizes:
        item, kv_width = shape.dtype.itemsize, shape.kv_heads * shape.head_dim
        attention = 2 * shape.hidden * (shape.hidden + kv_width) + shape.hidden
        mlp = 3 * shape.hidden * shape.intermediate + shape.hidden
        table, kept = shape.vocabulary * shape.hidden, shape.layers - dropped
        weights = kept * attention + shape.layers * mlp + shape.hidden + table
        return cls(int(weights * item), int(table * item), int(2 * kept * kv_width * item))

    def step_bytes(self, batch: int, past: int) -> int:
        return self.weights + batch * past * self.cache_per_token

    def largest_batch(self, total: int, room: int) -> int:
        left = total * (1 - RESERVE) - self.weights - self.embedding
        return max(0, int(left // (room * self.cache_per_token)))


@dataclass
class Bench:
    """One folder: what is measured already, the models and engines that lie there."""

    folder: Path
    engine: Backend
    case: Case = field(default_factory=Case)

    @property
    def results(self) -> Path:
        return self.folder / "results.jsonl"

    def rows(self) -> list[Row]:
        if not self.results.is_file():
            return []
        return [json.loads(line) for line in self.results.read_text("utf-8").splitlines()]

    def measured(self, name: str, make: Callable[[], Sequence[Row]]) -> list[Row]:
        """The rows of a name, measured now where they are not there."""
        if not any(row["name"] == name for row in self.rows()):
            print(f"{name} ...", flush=True)
            rows = [{"name": name, **row} for row in make()]
            self.folder.mkdir(parents=True, exist_ok=True)
            with self.results.open("a", encoding="utf-8") as file:
                file.write("".join(f"{json.dumps(row)}\n" for row in rows))
        return [row for row in self.rows() if row["name"] == name]

    def model(self, name: str, shape: LlamaShape, *, in_place: bool = True) -> Path:
        path = self.folder / name / "model.onnx"
        if not path.is_file():
            room = self.case.room if in_place else None
            write_llama(path, shape, noise=shape.hidden**-0.5, room=room)
        return path

    def cut(self, whole: Path, layers: int) -> Path:
        """The same without every second attention, on the same file of weights."""
        target = whole.with_name("cut.onnx")
        plan = [PlannedDeletion(layer=layer, kind="attention") for layer in range(1, layers, 2)]
        options = CutOptions(verify="none", weights="share", companions=False)
        if not target.is_file():
            prune_file(whole, target, plan, options)
        return target

    def built(
        self, onnx: Path, name: str, phases: Sequence[str], ranges: Ranges,
        backend: Backend | None = None, **settings: Any,
    ) -> Path:  # fmt: skip
        folder = self.folder / name
        if len(list(folder.glob("*.engine"))) < len(phases):
            folder.mkdir(parents=True, exist_ok=True)
            build_engines(
                onnx, folder / "m.engine", phases=phases, split=True, ranges=ranges,
                backend=backend or self.engine, settings=BuildSettings(**settings),
            )  # fmt: skip
        return folder

    def drop(self, *names: str) -> None:
        for name in names:
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def stepping(self, engines: Path, batch: int) -> TensorRtDecoder:
        return TensorRtDecoder(find_engines(engines), trial=False, batch=batch, begins=False)

    def step_row(self, decoder: TensorRtDecoder, batch: int, past: int, sizes: Sizes) -> Row:
        """Decode steps, each one token further; by the device's clock."""
        times = []
        for _ in range(self.case.samples):
            begin_steps(decoder, batch, past)
            times.append(decoder.timed_steps(self.case.steps))
        row = {"phase": "decode", "batch": batch, "tokens": past, "samples_ms": times}
        row |= {"launches": decoder.launches}
        return {**row, "ms": statistics.median(times), "bytes": sizes.step_bytes(batch, past)}

    def prompt_row(self, engines: Path, prompt: int) -> Row:
        """Prompts from empty caches; on the device's clock where the runner reads it."""
        with open_engine(engines, trial=False) as runner:
            shape = Shape("prefill", 1, prompt)
            tokens = random_tokens(shape, TOKENS)
            call = runner.prepare(make_inputs(runner.inputs, shape, tokens), phase="prefill")
            run = call.timed or partial(host_ms, call)
            times = [run() for _ in range(self.case.warm_up + self.case.samples)]
        times = times[self.case.warm_up :]
        row = {"phase": "prefill", "batch": 1, "tokens": prompt, "samples_ms": times}
        row |= {"launches": call.launches()}
        return {**row, "ms": statistics.median(times), "clock": "device" if call.timed else "host"}


def host_ms(run: Callable[[], None]) -> float:
    begin = time.perf_counter()
    run()
    return (time.perf_counter() - begin) * 1e3


def begin_steps(decoder: TensorRtDecoder, batch: int, past: int) -> None:
    """Two steps: kernels, then a graph where there are graphs."""
    decoder.begin_at(batch, past)
    for _ in range(2):
        decoder.step(np.ones((batch, 1), np.int64))


def look_at_card(bench: Bench) -> None:
    """The card, and the bytes a second of a copy within it."""

    def measured() -> list[Row]:
        driver, cuda = ask_driver(), Cuda(LIBRARIES[bench.engine].extra)
        try:
            size = min(4 << 30, cuda.free_bytes()[0] // 4)
            source, target = (cuda.allocate(size, "a copy") for _ in range(2))
            begin, end = cuda.event(), cuda.event()
            times = []
            for _ in range(10):
                cuda.record(begin)
                cuda.copy(target, source, size)
                cuda.record(end)
                cuda.wait()
                times.append(cuda.elapsed_ms(begin, end))
            copied = 2 * size / (min(times) / 1e3)
            return [{"card": driver.devices[0].name, "cuda": driver.cuda_version, "copy": copied}]
        finally:
            cuda.close()

    bench.measured("card", measured)


def check_numbers(bench: Bench) -> None:
    """Each form by each library, and two layers of each large shape, against ONNX Runtime."""
    tiny = {kind: replace(TINY, dtype=ir.DataType[DTYPES[kind]]) for kind in bench.case.dtypes}
    layers = {
        name: replace(shape, layers=2, vocabulary=min(shape.vocabulary, 1024))
        for name, shape in zip(PAPER, bench.case.large, strict=True)
    }
    forms = [(item.backend, kind, tiny[kind]) for item in LIBRARIES.values() for kind in tiny]
    forms += [(bench.engine, f"2 layers of {name}", shape) for name, shape in layers.items()]
    ranges = Ranges(batch=Span(1, 2, 2), prompt=Span(1, 16, 16))

    def measured(backend: Backend, kind: str, shape: LlamaShape) -> list[Row]:
        onnx = bench.model("numbers", shape)
        engines = bench.built(onnx, "checked", BOTH, ranges, backend)
        results = verify_engines(find_engines(engines), onnx)[1]
        worst = max(results, key=lambda item: item.error / item.tolerance)
        return [
            {
                "subject": f"{backend}, {kind}", "worst": f"{worst.tensor} ({worst.run})",
                "error": worst.error, "allowed": worst.tolerance,
            }
        ]  # fmt: skip

    for backend, kind, shape in forms:
        name = f"numbers, {backend}, {kind}"
        if importlib.util.find_spec(LIBRARIES[backend].module) is None:
            print(f"{name}: not installed")
            continue
        try:
            bench.measured(name, partial(measured, backend, kind, shape))
        except DepthcutError as error:  # another type, or the other library, may well work
            print(f"{name}: {error.message}")
        bench.drop("numbers", "checked")


def time_attention(bench: Bench) -> None:
    """A decode step of attention alone, at several fills of its caches."""
    case, sizes = bench.case, Sizes.of(bench.case.attention)
    ranges = Ranges(batch=Span(1, max(case.batches), max(case.batches)))
    onnx = bench.model("attention", case.attention)
    engines = bench.built(onnx, "mask", ("decode",), ranges)

    def measured(batch: int) -> list[Row]:
        record = EngineRecord.read(sidecar_path(next(engines.glob("*.engine"))))
        facts = {"subject": "attention", "arm": "mask"}
        facts["scratch"] = record.memory_bytes.get("activation")
        with bench.stepping(engines, batch) as decoder:
            return [facts | bench.step_row(decoder, batch, n, sizes) for n in case.pasts]

    for batch in case.batches:  # one that is too large for the card leaves those before it
        bench.measured(f"attention, batch {batch}", partial(measured, batch))


def layers_that_fit(bench: Bench, shape: LlamaShape) -> int:
    bench.folder.mkdir(parents=True, exist_ok=True)
    limits = [
        CARD_SHARE * ask_driver().devices[0].memory_bytes,
        DISK_SHARE * shutil.disk_usage(bench.folder).free,
        BUILDER_SHARE * (available_bytes() or float("inf")),
    ]
    ends, all_of_it = Sizes.of(replace(shape, layers=0)), Sizes.of(shape)
    outside = ends.weights + ends.embedding
    a_layer = (all_of_it.weights + all_of_it.embedding - outside) / shape.layers
    layers = min(shape.layers, int((min(limits) - outside) // a_layer)) // 2 * 2
    if layers < 2:
        sys.exit("Not even two layers fit the card, the disk or the memory.")
    return layers


def time_large(bench: Bench, name: str) -> None:
    """A large shape, or as many layers of it as fit, whole and without half of its attentions."""
    whole = bench.case.large[list(PAPER).index(name)]
    layers = bench.measured(
        f"{name}, layers", lambda: [{"layers": layers_that_fit(bench, whole), "of": whole.layers}]
    )[0]["layers"]
    shape, same = replace(whole, layers=layers), 0
    for arm in ("whole", "cut"):
        rows = bench.measured(f"{name}, {arm}", partial(large_rows, bench, name, shape, arm, same))
        same = next(row["largest"] for row in rows if "largest" in row)
    bench.drop("large")


def large_rows(bench: Bench, name: str, shape: LlamaShape, arm: str, same: int) -> list[Row]:
    """A prompt; all steps at the largest batch; a step there, at the other arm's, and at 1."""
    case, facts = bench.case, {"subject": name, "arm": arm}
    whole = bench.model("large", shape)
    onnx = whole if arm == "whole" else bench.cut(whole, shape.layers)
    sizes = Sizes.of(shape, shape.layers // 2 if arm == "cut" else 0)
    ranges = Ranges(batch=Span(1, 1, 1), prompt=Span(case.prompt, case.prompt, case.prompt))
    # The engines for prefill and decode are loaded in turns: the weights lie on the card once.
    prompt = bench.prompt_row(bench.built(onnx, "prefill", ("prefill",), ranges), case.prompt)
    bench.drop("prefill")
    most = max(1, sizes.largest_batch(ask_driver().devices[0].memory_bytes, case.room))
    engines = bench.built(onnx, "decode", ("decode",), Ranges(batch=Span(1, most, most)))
    batch = bisect_left(range(1, most + 1), True, key=lambda n: not runs_at(bench, engines, n))
    if not batch:
        sys.exit(f"{name}, {arm}: not one sequence of {case.room} positions fits the card.")
    with bench.stepping(engines, batch) as decoder:
        begin_steps(decoder, batch, case.prompt)
        decode_s = decoder.timed_steps(case.new - 2) * (case.new - 1) / 1e3  # the prompt gives one
        steps = {batch: bench.step_row(decoder, batch, case.prompt, sizes)}
    bench.drop("decode")
    for other in {1, same or batch} - {batch}:  # by kernels that are tuned for it
        engines = bench.built(onnx, "other", ("decode",), Ranges(batch=Span(1, other, other)))
        with bench.stepping(engines, other) as decoder:
            steps[other] = bench.step_row(decoder, other, case.prompt, sizes)
        bench.drop("other")
    at = {"own largest": batch, "same batch": same or batch, "alone": 1}
    prefill_s = batch * prompt["ms"] / 1e3
    largest = {"largest": batch, "prefill_s": prefill_s, "decode_s": decode_s}
    largest |= {"tokens_per_s": batch * case.new / (prefill_s + decode_s), "layers": shape.layers}
    rows = [prompt, largest, *({"at": where, **steps[n]} for where, n in at.items())]
    return [facts | row for row in rows]


def runs_at(bench: Bench, engines: Path, batch: int) -> bool:
    try:
        with bench.stepping(engines, batch) as decoder:
            begin_steps(decoder, batch, bench.case.room - 2)
    except DepthcutError as error:
        if error.code != OUT_OF_MEMORY:
            raise
        return False
    return True


STEPS: Mapping[str, tuple[int, Callable[[Bench], None]]] = {
    "card": (5, look_at_card),
    "numbers": (10, check_numbers),
    **{name: (80, partial(time_large, name=name)) for name in PAPER},
    "attention": (10, time_attention),
}
"""By name the minutes that a step may take, in order of worth."""


def tables(rows: Sequence[Row]) -> str:
    card = next((row for row in rows if row["name"] == "card"), {})
    lines = [f"{card.get('card', 'no card looked at')}", ""]
    lines += [
        f"- {row['subject']}: {row['worst']} differs by {row['error']:.1e} of at most "
        f"{row['allowed']:.0e}{'' if row['error'] <= row['allowed'] else ': WRONG'}"
        for row in rows
        if "error" in row
    ]
    timed, arms = [], dict[tuple[str, str], dict[str, Row]]()
    for row in rows:
        if "ms" in row:
            speed = row.get("bytes", 0) / (row["ms"] / 1e3)
            share = f"{speed / card['copy']:.0%}" if speed and card else ""
            cells = [row[k] for k in ("subject", "arm", "phase", "batch", "tokens", "launches")]
            timed.append([*cells, f"{row['ms']:.3f}", share])
        for at in {row.get("at"), "texts" if "largest" in row else None} - {None}:
            arms.setdefault((row["subject"], str(at)), {})[row["arm"]] = row
    titles = ["model", "at", "batch", "whole", "cut", "gain", "by bytes", "published"]
    pairs = [gain_cells(*key, **pair) for key, pair in arms.items() if len(pair) > 1]
    lines += ["", "Tokens a second:", "", rendered(titles, pairs)]
    titles = ["what", "arm", "phase", "batch", "tokens", "launches", "ms", "speed of a copy"]
    return "\n".join([*lines, rendered(titles, timed)])


def gain_cells(name: str, at: str, whole: Row, cut: Row) -> list[str]:
    """Of steps with what their bytes allow; of texts, which have prompts too, without."""
    batches = [str(row.get("batch") or row["largest"]) for row in (whole, cut)]
    steps = at != "texts"
    first, second = (
        row["batch"] * 1e3 / row["ms"] if steps else row["tokens_per_s"] for row in (whole, cut)
    )
    bound = cut["batch"] / cut["bytes"] * whole["bytes"] / whole["batch"] if steps else 0
    cells = [name, at, " → ".join(dict.fromkeys(batches)), f"{first:,.0f}", f"{second:,.0f}"]
    return [*cells, f"{second / first:.2f}", f"{bound:.2f}" if bound else "", f"{PAPER[name]:.2f}"]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench_gpu")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", default=",".join(STEPS))
    parser.add_argument("--engine", choices=sorted(LIBRARIES))
    parser.add_argument("--device", help="the card, by its number or UUID")
    parser.add_argument("--here", action="store_true")
    options = parser.parse_args(arguments)
    if options.device is not None:
        os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
        os.environ["CUDA_VISIBLE_DEVICES"] = options.device
    if problem := ask_driver().problem:
        sys.exit(f"{problem}: nothing was measured")
    there = [item.backend for item in LIBRARIES.values() if importlib.util.find_spec(item.module)]
    usual = min(there, key=lambda name: name != usual_backend())
    bench = Bench(options.folder, options.engine or usual)
    failed = []
    for name in options.steps.split(","):
        minutes, run = STEPS[name]
        if options.here:
            run(bench)
            continue
        command = [sys.executable, "-m", "tests.benchmarks.bench_gpu", str(options.folder)]
        command += ["--here", "--steps", name, "--engine", bench.engine]
        try:
            code = subprocess.run(command, timeout=60 * minutes, check=False).returncode
        except subprocess.TimeoutExpired:
            code = 124
        failed += [name] if code else []
    if not options.here:
        print(tables(bench.rows()))
        print(f"Failed: {', '.join(failed)}" if failed else "All steps ran.")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
