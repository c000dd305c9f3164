"""The benchmark of a card, on the stand-in of a card and of the builder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import pytest

from exporter.engines.build.profiles import Ranges
from exporter.engines.build.settings import BuildSettings
from graph_passes.files.storage import data_files, load_model
from tests.benchmarks import bench_gpu
from tests.benchmarks.bench_gpu import (
    LLAMA_8B,
    PAPER,
    STEPS,
    TINY,
    Bench,
    Case,
    Sizes,
    layers_that_fit,
    tables,
)
from tests.llama_shaped import write_llama
from tests.stand_in.engine_files import write_engine
from tests.stand_in.installed import stand_in

CASE = Case(
    dtypes=("fp32",), attention=TINY, pasts=(4, 16, 50), batches=(1, 4),
    large=tuple(replace(TINY, layers=layers) for layers in (2, 4, 24)),
    prompt=8, new=4, room=64, warm_up=1, samples=3, steps=3,
)  # fmt: skip


def build(
    onnx: Path, target: Path, *, phases: Sequence[str], ranges: Ranges, backend: str,
    settings: BuildSettings, **_: Any,
) -> None:  # fmt: skip
    """Engines that name their graph; their weights take as much as the graph's."""
    weights = sum(path.stat().st_size for path in data_files(load_model(onnx)))
    for phase in phases:
        write_engine(
            onnx, target.with_stem(f"{target.stem}-{phase}"), [phase], ranges, backend=backend,
            settings=settings, weights_bytes=weights,
        )  # fmt: skip


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setattr(bench_gpu, "build_engines", build)
    with stand_in(memory_bytes=1_000_000):
        yield Bench(tmp_path / "gpu", "tensorrt-rtx", CASE)


def test_every_step_leaves_rows_once(bench: Bench) -> None:
    for _, run in STEPS.values():
        run(bench)
    rows = bench.rows()
    assert all(row["error"] <= row["allowed"] for row in rows if "error" in row)
    largest = {(row["subject"], row["arm"]): row for row in rows if "largest" in row}
    assert sum("error" in row for row in rows) == 2 + len(PAPER)
    places = {(row["subject"], row["arm"], row["at"]): row for row in rows if "at" in row}
    for name in PAPER:
        most, more = (largest[name, arm]["largest"] for arm in ("whole", "cut"))
        assert 0 < most < more
        batches = [
            places[name, "cut", at]["batch"] for at in ("alone", "same batch", "own largest")
        ]
        assert batches == [1, most, more]
    assert largest["70b", "whole"]["layers"] < 24
    page = tables(rows)
    assert "WRONG" not in page
    launches = {(row["phase"], row["launches"]) for row in rows if "ms" in row}
    assert launches == {("prefill", "kernels"), ("decode", "CUDA graph")}
    assert [line.split(" | ")[0] for line in page.splitlines() if "own largest" in line] == [
        f"| {name}" for name in PAPER
    ]
    assert "| attention | mask |" in page
    for _, run in STEPS.values():
        run(bench)
    assert bench.rows() == rows


def test_sizes_are_those_of_the_file_and_a_cut_leaves_room(tmp_path: Path) -> None:
    model = ir.load(write_llama(tmp_path / "m.onnx", TINY))
    weights = [value for value in model.graph.initializers.values() if value.name[:1] != "c"]
    whole, cut = Sizes.of(TINY), Sizes.of(TINY, 1)
    assert whole.weights + whole.embedding == sum(value.const_value.nbytes for value in weights)
    assert cut.cache_per_token * 2 == whole.cache_per_token
    assert 0 < whole.largest_batch(2_000_000, 64) < cut.largest_batch(2_000_000, 64)
    assert whole.largest_batch(whole.weights, 64) == 0


def test_a_model_of_8b_is_measured_whole_on_an_h100_with_64_gb_of_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = SimpleNamespace(free=45 << 30)  # what a system leaves of them
    monkeypatch.setattr(bench_gpu.shutil, "disk_usage", lambda _: left)
    monkeypatch.setattr(bench_gpu, "available_bytes", lambda: 128 << 30)
    with stand_in(memory_bytes=80 << 30):
        assert layers_that_fit(Bench(tmp_path, "tensorrt"), LLAMA_8B) == 32
