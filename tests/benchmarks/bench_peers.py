"""The same deletion by depthcut, ONNX GraphSurgeon and onnxsim, on a model of 2.4 GB."""

from __future__ import annotations

import importlib.util
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from graph_passes import ResidualSite, find_sites
from graph_passes.files.storage import load_model
from tests.benchmarks.machine import print_machine
from tests.llama_shaped import LlamaShape, write_llama
from tests.measured import ChildFailed, Measured, depthcut, script

RUNS = 3
SHAPE = LlamaShape(
    layers=24, hidden=2048, heads=32, kv_heads=4, intermediate=5632, vocabulary=32000,
)  # fmt: skip
CUT = tuple(range(0, SHAPE.layers, 2))
PEERS = {"onnx_graphsurgeon": "onnx-graphsurgeon", "onnxsim": "onnxsim"}
AIM_TIME, AIM_MEMORY = 10, 20

_GRAPHSURGEON = """
import json, os, sys
import onnx
import onnx_graphsurgeon as gs
source, target, sites = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
graph = gs.import_onnx(onnx.load(source))
tensors = graph.tensors()
nodes = {node.name: node for node in graph.nodes}
gone = {name for site in sites for name in site["outputs"]}
graph.outputs = [value for value in graph.outputs if value.name not in gone]
for site in sites:
    total, skip = nodes[site["add"]].outputs[0], tensors[site["skip"]]
    for reader in list(total.outputs):
        reader.inputs = [skip if value is total else value for value in reader.inputs]
    tensors[site["skip"]] = skip
graph.cleanup(remove_unused_graph_inputs=True).toposort()
model = gs.export_onnx(graph)
onnx.save(model, target, save_as_external_data=True, location=os.path.basename(target) + ".data")
print(len(model.graph.node))
_report()
"""
_ONNXSIM = """
import os, sys
import onnx, onnxsim
source, target, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
before = len(onnx.load(source, load_external_data=False).graph.node)
model = onnxsim.apply_transformer_block_pruning(source, num_blocks_to_drop=count, num_samples=1)
onnx.save(model, target, save_as_external_data=True, location=os.path.basename(target) + ".data")
print(before, len(model.graph.node))
_report()
"""


def main() -> None:
    """Prints the figures."""
    print_machine(*PEERS.values())
    with tempfile.TemporaryDirectory(dir=_place()) as name:
        folder = Path(name)
        print("writing 2 x 2.4 GB of random weights ...", flush=True)
        cached = write_llama(folder / "cached" / "model.onnx", SHAPE, noise=0.02)
        _compare(cached, folder)
        uncached = replace(SHAPE, cache=False, fused_norm=True)
        _onnxsim_alone(write_llama(folder / "plain" / "model.onnx", uncached, noise=0.02), folder)


def _place() -> Path:
    """Beside the other benchmarks' files, since /tmp may be memory."""
    place = Path("out/bench").resolve()
    place.mkdir(parents=True, exist_ok=True)
    return place


def _compare(source: Path, folder: Path) -> None:
    size = source.with_name("model.onnx.data").stat().st_size
    print(
        f"{size / 1e9:.2f} GB, {SHAPE.layers} layers with KV cache, {len(CUT)} attentions deleted"
    )
    ways: dict[str, Callable[[], Measured]] = {
        "depthcut, compact": lambda: _depthcut(source, folder / "o" / "model.onnx", "compact"),
        "depthcut, share": lambda: _depthcut(source, source.with_name("pruned.onnx"), "share"),
    }
    if _installed("onnx_graphsurgeon"):
        sites = json.dumps(_sites(source))
        target = folder / "gs.onnx"
        ways["onnx-graphsurgeon"] = lambda: script(_GRAPHSURGEON, [source, target, sites])
    medians = _interleaved(ways)
    _print_rows(medians)
    if "onnx-graphsurgeon" in medians:
        for ours in ("depthcut, compact", "depthcut, share"):
            _print_ratios(medians["onnx-graphsurgeon"], medians[ours], ours)
    if _installed("onnxsim"):
        print("onnxsim on this graph: " + _onnxsim(source, folder)[0])


def _onnxsim_alone(source: Path, folder: Path) -> None:
    """Against shared weights: onnxsim writes none, its result names the source's data file."""
    if not _installed("onnxsim"):
        return
    print(f"the same without KV cache, RMSNormalization as an operator, {len(CUT)} sublayers")
    told, measured = _onnxsim(source, folder)
    print("onnxsim on this graph: " + told)
    target = source.with_name("pruned.onnx")
    ours = _median([_depthcut(source, target, "share") for _ in range(RUNS)])
    _print_rows({"depthcut, share": ours})
    if measured is not None:
        _print_rows({"onnxsim": measured})
        _print_ratios(measured, ours, "depthcut, share")


def _onnxsim(source: Path, folder: Path) -> tuple[str, Measured | None]:
    """What it did or why not, in one line; one run, since it takes minutes."""
    try:
        # It hands the graph to ONNX Runtime without a path, so weights are looked for right here.
        arguments = [source.name, folder / "sim.onnx", str(len(CUT))]
        done = script(_ONNXSIM, arguments, folder=source.parent)
    except ChildFailed as error:
        return f"fails: {str(error).splitlines()[-1][:200]}", None
    before, after = map(int, done.output.split()[-2:])
    data = folder / "sim.onnx.data"
    written = data.stat().st_size if data.is_file() else 0
    told = (
        f"{before} -> {after} nodes, {done.seconds:.1f} s, {done.peak_mb:.0f} MB, "
        f"{written / 1e9:.2f} GB of weights written"
    )
    return (f"declined, unchanged ({told})", None) if before == after else (told, done)


def _depthcut(source: Path, target: Path, weights: str) -> Measured:
    drops = "attention:" + ",".join(map(str, CUT))
    return depthcut(
        "prune", source, "-o", target, "--drop", drops, "--weights", weights, "--verify", "none"
    )


def _sites(source: Path) -> list[dict[str, object]]:
    return [
        {"add": site.residual_add, "skip": site.skip, "outputs": site.kv_outputs}
        for site in find_sites(load_model(source))
        if isinstance(site, ResidualSite) and site.kind == "attention" and site.layer in CUT
    ]


def _installed(module: str) -> bool:
    if importlib.util.find_spec(module) is not None:
        return True
    print(f"{PEERS[module]} is not installed, so it is left out: pip install 'depthcut[bench]'")
    return False


def _interleaved(ways: dict[str, Callable[[], Measured]]) -> dict[str, Measured]:
    runs: dict[str, list[Measured]] = {name: [] for name in ways}
    for _ in range(RUNS):
        for name, way in ways.items():
            runs[name].append(way())
    return {name: _median(found) for name, found in runs.items()}


def _median(runs: list[Measured]) -> Measured:
    return Measured(
        statistics.median(run.seconds for run in runs),
        statistics.median(run.peak_mb for run in runs),
        runs[-1].output,
    )


def _print_rows(medians: dict[str, Measured]) -> None:
    for name, run in medians.items():
        print(f"{name:<20} {run.seconds:8.2f} s {run.peak_mb:8.0f} MB", flush=True)


def _print_ratios(theirs: Measured, ours: Measured, name: str) -> None:
    print(
        f"{name} takes {theirs.seconds / ours.seconds:.1f} times less time (aim {AIM_TIME}) and "
        f"{theirs.peak_mb / ours.peak_mb:.1f} times less memory (aim {AIM_MEMORY})"
    )


if __name__ == "__main__":
    sys.exit(main())
