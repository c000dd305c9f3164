"""What `depthcut prune` costs on an exported file: time and memory of the whole process."""

from __future__ import annotations

import gc
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from graph_passes import Deletion, ResidualSite, find_sites, prune_graph
from graph_passes.files.storage import data_files, load_model
from tests.benchmarks.machine import print_machine
from tests.measured import depthcut
from tests.tiny_graphs import TinySpec, tiny_model

RUNS = 5
CUT = 8
LIMIT_S, LIMIT_MB = 1.5, 200


def seconds(work: Callable[[], object]) -> float:
    """How long one call takes; without searches for garbage, as the command does."""
    gc.disable()
    begin = time.perf_counter()
    work()
    taken = time.perf_counter() - begin
    gc.enable()
    return taken


def prune_command(source: Path, target: Path, weights: str, layers: list[int]) -> list[str]:
    """`depthcut prune` of some attentions, without verification."""
    drops = "attention:" + ",".join(map(str, layers))
    return [
        "prune", str(source), "-o", str(target),
        "--drop", drops, "--verify", "none", "--weights", weights,
    ]  # fmt: skip


def scaling() -> None:
    """Finding and pruning half the attentions against the number of layers."""
    for layers in (20, 40, 80, 160):
        model = tiny_model(TinySpec(layers=layers, annotated=False))
        half = [Deletion(layer, "attention") for layer in range(0, layers, 2)]
        find_s = statistics.median(seconds(lambda m=model: find_sites(m)) for _ in range(RUNS))
        cut_s = statistics.median(
            seconds(lambda m=model, d=half: prune_graph(m, d)) for _ in range(RUNS)
        )
        print(f"{layers:4} layers, {len(model.graph):5} nodes: "
              f"find {find_s:.3f} s, find and cut {cut_s:.3f} s")  # fmt: skip


def main() -> None:
    """Prints the figures."""
    print_machine()
    scaling()
    name = os.environ.get("DEPTHCUT_BENCH_ONNX")
    if not name:
        raise SystemExit("Set DEPTHCUT_BENCH_ONNX to the path of an exported model.onnx.")
    with tempfile.TemporaryDirectory() as folder:
        measure(_copied(Path(name), Path(folder)))


def _copied(source: Path, folder: Path) -> Path:
    """The model in a folder of its own, where results may be written beside it."""
    for file in (source, *data_files(load_model(source))):
        shutil.copyfile(file, folder / file.name)
    return folder / source.name


def measure(source: Path) -> None:
    """Times finding, `cp` of the weights, and the whole process with both kinds of weights."""
    model = load_model(source)
    find_s = statistics.median(seconds(lambda: find_sites(model)) for _ in range(RUNS))
    copy_s = statistics.median(_copy_s(data_files(model)) for _ in range(RUNS))
    sites = [site for site in find_sites(model) if isinstance(site, ResidualSite)]
    layers = [site.layer for site in sites if site.kind == "attention"][:CUT]
    print(f"{source.name}: {len(model.graph)} nodes, {len(layers)} attentions cut, {RUNS} runs")
    print(f"find sites         {find_s:7.3f} s")
    print(f"cp of the weights  {copy_s:7.3f} s")
    for weights, limit_s in (("compact", LIMIT_S + copy_s), ("share", LIMIT_S)):
        command = prune_command(source, source.with_name("pruned.onnx"), weights, layers)
        runs = [depthcut(*command) for _ in range(RUNS)]
        taken_s = statistics.median(run.seconds for run in runs)
        peak_mb = statistics.median(run.peak_mb for run in runs)
        print(f"prune, {weights:<11} {taken_s:7.3f} s (aim {limit_s:.3f}), "
              f"{peak_mb:.0f} MB (aim {LIMIT_MB})")  # fmt: skip


def _copy_s(files: list[Path]) -> float:
    total = 0.0
    for file in files:
        copy = file.with_name("copy.data")
        total += seconds(
            lambda file=file, copy=copy: subprocess.run(["cp", file, copy], check=True)
        )  # type: ignore[misc]
        copy.unlink()
    return total


if __name__ == "__main__":
    main()
