"""What `depthcut build` takes beyond the builder: ``... bench_build MODEL.onnx ...``."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from exporter.engines.build.build import adapt, read_graph
from exporter.engines.build.profiles import graph_inputs, has_fixed_caches
from exporter.engines.build.settings import BuildSettings
from tests.benchmarks.machine import print_machine
from tests.measured import depthcut

RUNS = 5
AIM = 0.10
_OPTIONS = ("--profile", "decode", "--compute-capability", "sm89")
_CONTEXT = ("--context-range", "1:512:1024")
_BARE = """
import json, sys
import tensorrt_rtx as trt
from exporter.engines.build.network import set_lengths
path, graph, lengths, shapes, target = sys.argv[1:]
logger = trt.Logger(trt.Logger.ERROR)
builder = trt.Builder(logger)
network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
with open(graph, "rb") as file:
    assert trt.OnnxParser(network, logger).parse(file.read(), path)
if lengths:
    set_lengths(network, trt, lengths)
config, profile = builder.create_builder_config(), builder.create_optimization_profile()
config.num_compute_capabilities = 1
config.set_compute_capability(trt.ComputeCapability.SM89, 0)
for name, span in json.loads(shapes).items():
    profile.set_shape(name, span["low"], span["usual"], span["high"])
config.add_optimization_profile(profile)
with open(target, "wb") as file:
    file.write(builder.build_serialized_network(network, config))
"""


def main(models: list[str]) -> None:
    """Prints the figures."""
    print_machine("tensorrt-rtx")
    for model in models:
        with tempfile.TemporaryDirectory(prefix="depthcut.") as folder:
            measure(Path(model), Path(folder))


def measure(model: Path, folder: Path) -> None:
    """Builds one graph's engine several times."""
    target = folder / "m.engine"
    context = () if has_fixed_caches(graph_inputs(model)) else _CONTEXT
    runs = []
    for _ in range(RUNS):
        done = depthcut("build", str(model), "-o", str(target), *_OPTIONS, *context, "--json")
        record = json.loads(done.output)
        builder_s = record["parse_s"] + record["build_s"]
        runs.append((done.seconds, record["total_s"], builder_s, bare_s(model, folder, record)))
    whole, told, builder, bare = (statistics.median(each) for each in zip(*runs, strict=True))
    print(f"{model}: {record['precision']}, engine {record['engine_bytes'] / 1e6:.0f} MB, "
          f"{RUNS} runs in turns, medians (aim {AIM:.0%} more)")  # fmt: skip
    print(f"the builder's own part         {builder:6.2f} s")
    print(f"a bare script with it          {bare:6.2f} s")
    for name, taken in (("depthcut build, whole process", whole), ("  as its record tells", told)):
        print(f"{name:30} {taken:6.2f} s: {taken / builder - 1:.1%} more than the builder, "
              f"{taken / bare - 1:.1%} more than the script")  # fmt: skip


def bare_s(model: Path, folder: Path, record: dict[str, Any]) -> float:
    """Seconds that a process takes for the engine of a record without anything of depthcut's."""
    made = adapt(read_graph(model), BuildSettings(), ["decode"], has_lengths=True)
    graph = made.write(folder / "graph.onnx") or model
    shapes = json.dumps(record["profiles"][0]["shapes"])
    call = [sys.executable, "-c", _BARE, model, graph, made.lengths, shapes, folder / "bare"]
    begin = time.perf_counter()
    subprocess.run(call, check=True)
    return time.perf_counter() - begin


if __name__ == "__main__":
    main(sys.argv[1:])
