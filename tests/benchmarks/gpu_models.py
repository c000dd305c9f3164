"""The models and engines of ``make bench-gpu``; none of this needs a GPU."""

from __future__ import annotations

import importlib.util
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from exporter.artifacts import PlannedDeletion
from exporter.cut.options import CutOptions
from exporter.cut.surgery import prune_file
from exporter.engines.build.build import build_engines
from exporter.engines.build.driver import Driver
from exporter.engines.build.libraries import LIBRARIES, Backend
from exporter.engines.build.profiles import Ranges, graph_inputs, profile
from exporter.engines.build.settings import BuildSettings, Profile
from tests.llama_shaped import LlamaShape, write_llama

# With Attention as one operator: of the decomposed one TensorRT-RTX 1.7 writes keys and values
# out for each query head, 4.3 GB a layer at batch 64 and 4096 tokens instead of 0.02.
LLAMA_3_8B = LlamaShape(
    layers=32, hidden=4096, heads=32, kv_heads=8, intermediate=14336, vocabulary=128256,
    dtype=ir.DataType.BFLOAT16, fused_attention=True,
)  # fmt: skip
SMALL = LlamaShape(
    layers=4, hidden=256, heads=8, kv_heads=2, intermediate=512, vocabulary=1000,
    dtype=ir.DataType.BFLOAT16, fused_attention=True,
)  # fmt: skip
_ELSEWHERE = BuildSettings(compute_capabilities=("sm89",))


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        shape: The model's.
        past: Tokens in the cache of the step that is timed.
        prompt: Tokens of the prompts that the largest batch begins with.
        new: Tokens that it generates.
        batches: Of the step that is timed.
    """

    shape: LlamaShape
    past: int
    prompt: int
    new: int
    batches: tuple[int, ...] = (1, 32)

    @property
    def dropped(self) -> int:
        """Attentions that the pruned arm lacks."""
        return self.shape.layers // 2


LARGE_CASE = Case(LLAMA_3_8B, past=512, prompt=2048, new=2048)
SMALL_CASE = Case(SMALL, past=64, prompt=64, new=64, batches=(1, 4))


def make_models(folder: Path, case: Case) -> tuple[Path, Path]:
    """The whole model with random weights, and one without every second attention.

    The second shares the first one's data file, so that 16 GB lie there once.
    """
    begin = time.perf_counter()
    whole = write_llama(folder / "whole.onnx", case.shape, noise=0.02)
    cut = folder / "cut.onnx"
    layers = range(1, case.shape.layers, 2)
    plan = [PlannedDeletion(layer=layer, kind="attention") for layer in layers]
    prune_file(whole, cut, plan, CutOptions(verify="none", weights="share"))
    size = whole.with_name("whole.onnx.data").stat().st_size
    print(f"models: {size / 1e9:.2f} GB of random weights, {len(plan)} of {case.shape.layers} "
          f"attentions dropped, {time.perf_counter() - begin:.1f} s", flush=True)  # fmt: skip
    return whole, cut


def backends(driver: Driver) -> list[Backend]:
    """The libraries that can build here; the others are told."""
    found: list[Backend] = []
    for name, library in LIBRARIES.items():
        if importlib.util.find_spec(library.module) is None:
            print(f"{name}: not installed, left out")
        elif driver.problem and not library.builds_without_gpu:
            print(f"{name}: {driver.problem}, left out")
        else:
            found.append(library.backend)
    return found


def build(
    onnx: Path, target: Path, backend: Backend, driver: Driver, *wanted: tuple[str, Ranges]
) -> Path:
    """Builds one engine for the card that is here, or for sm89 where none is.

    Args:
        onnx: The graph.
        target: The engine's file.
        backend: The library.
        driver: What the driver said.
        wanted: Phase and ranges of each profile.
    """
    inputs = graph_inputs(onnx)
    profiles: list[Profile] = [profile(inputs, phase, ranges) for phase, ranges in wanted]
    settings = _ELSEWHERE if driver.problem else BuildSettings()
    ((path, record),) = build_engines(
        onnx, target, profiles=profiles, backend=backend, settings=settings
    )
    scratch = record.memory_bytes.get("activation", 0) / 1e6
    print(f"  {path.name}: {record.engine_bytes / 1e9:.2f} GB, {sum(record.layers.values())} "
          f"layers, {scratch:.0f} MB of scratch memory, built in {record.build_s:.1f} s by "
          f"{backend} {record.backend_version}", flush=True)  # fmt: skip
    return path


def emptied(folder: Path) -> Path:
    """A folder without what an earlier part left; engines of this size fill a disk."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
