"""What large models cost: a 70B-shaped one with shared weights, a 2.4 GB one written anew."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.benchmarks.machine import print_machine
from tests.llama_shaped import LlamaShape, write_llama
from tests.measured import depthcut, takes_holes
from tests.written_files import data_of

RUNS = 5
AIM_S, AIM_MB = 1.5, 200
MIDDLE = LlamaShape(
    layers=24, hidden=2048, heads=32, kv_heads=4, intermediate=5632, vocabulary=32000,
)  # fmt: skip


def main() -> None:
    """Prints the figures."""
    print_machine()
    place = Path("out/bench").resolve()
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place) as name:
        folder = Path(name)
        if takes_holes(folder):
            _share(folder / "large")
        else:
            print("70B: left out, since this file system writes every zero")
        _compact(folder / "middle")


def _share(folder: Path) -> None:
    source = write_llama(folder / "model.onnx", LlamaShape())
    size = source.with_name("model.onnx.data").stat().st_size
    rows = {
        "inspect": lambda: _process("inspect", source),
        "prune, share": lambda: _process(
            "prune", source, "-o", source.with_name("pruned.onnx"),
            "--drop", _half(LlamaShape()), "--weights", "share", "--verify", "none",
        ),
    }  # fmt: skip
    print(f"70B-shaped: {size / 1e9:.0f} GB, 80 layers, 40 attentions deleted, {RUNS} runs")
    _print(_interleaved(rows), f"(aim {AIM_S} s, {AIM_MB} MB)")


def _compact(folder: Path) -> None:
    source = write_llama(folder / "model.onnx", MIDDLE, noise=0.02)
    data = source.with_name("model.onnx.data")
    target = folder / "o" / "pruned.onnx"

    def prune() -> tuple[float, float]:
        shutil.rmtree(target.parent, ignore_errors=True)
        return _process(
            "prune", source, "-o", target, "--drop", _half(MIDDLE), "--verify", "none"
        )  # fmt: skip

    rows = {
        "cp": lambda: _copied(data, sync=False),
        "cp, synced": lambda: _copied(data, sync=True),
        "prune, compact": prune,
    }
    print(
        f"2.4 GB: {data.stat().st_size / 1e9:.2f} GB, 24 layers, 12 attentions deleted, {RUNS} runs"
    )
    found = _interleaved(rows)
    _print(found, "")
    print(f"{data_of(target).stat().st_size / 1e9:.2f} GB written; "
          f"aim: {AIM_S} s + cp, {AIM_MB} MB")  # fmt: skip


def _half(shape: LlamaShape) -> str:
    return "attention:" + ",".join(str(layer) for layer in range(0, shape.layers, 2))


def _process(*arguments: str | Path) -> tuple[float, float]:
    run = depthcut(*arguments)
    return run.seconds, run.peak_mb


def _copied(data: Path, *, sync: bool) -> tuple[float, float]:
    copy = data.with_name("copy.data")
    begin = time.perf_counter()
    # A copy of the bytes, not a second reference to them as some file systems can give.
    subprocess.run(["cp", "--reflink=never", data, copy], check=True)
    if sync:
        with copy.open("rb") as file:
            os.fsync(file.fileno())
    seconds = time.perf_counter() - begin
    copy.unlink()
    return seconds, 0.0


def _interleaved(
    rows: dict[str, Callable[[], tuple[float, float]]],
) -> dict[str, tuple[float, float]]:
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in rows}
    for _ in range(RUNS):
        for name, run in rows.items():
            runs[name].append(run())
    return {
        name: (statistics.median(s for s, _ in found), statistics.median(m for _, m in found))
        for name, found in runs.items()
    }


def _print(rows: dict[str, tuple[float, float]], aim: str) -> None:
    for name, (seconds, peak_mb) in rows.items():
        memory = f"{peak_mb:6.0f} MB" if peak_mb else ""
        told = aim if name.startswith("prune") else ""
        print(f"{name:<16} {seconds:7.2f} s {memory} {told}".rstrip(), flush=True)


if __name__ == "__main__":
    sys.exit(main())
