"""What `depthcut build` takes beyond the builder: ``... bench_build MODEL.onnx [MODEL.onnx ...]``.

Builds a decode engine of each graph, several times, and prints the medians of the whole process,
of the builder's own part (parsing and building), and of the difference. It asserts nothing.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from pathlib import Path

from tests.benchmarks.machine import print_machine
from tests.measured import depthcut

RUNS = 5
AIM = 0.10
_OPTIONS = ("--profile", "decode", "--context-range", "1:512:1024", "--compute-capability", "sm89")


def main(models: list[str]) -> None:
    """Prints the figures."""
    print_machine("tensorrt-rtx")
    for model in models:
        with tempfile.TemporaryDirectory(prefix="depthcut.") as folder:
            measure(Path(model), Path(folder))


def measure(model: Path, folder: Path) -> None:
    """Builds one graph's engine several times."""
    target = folder / "m.engine"
    runs = []
    for _ in range(RUNS):
        done = depthcut("build", str(model), "-o", str(target), *_OPTIONS, "--json")
        record = json.loads(done.output)
        runs.append((done.seconds, record["parse_s"] + record["build_s"], record["total_s"]))
    whole_s, builder_s, told_s = (statistics.median(each) for each in zip(*runs, strict=True))
    rest_s = statistics.median(whole - builder for whole, builder, _ in runs)
    share = statistics.median((whole - builder) / builder for whole, builder, _ in runs)
    print(f"{model}: {record['precision']}, engine {record['engine_bytes'] / 1e6:.0f} MB, "
          f"{RUNS} runs")  # fmt: skip
    print(f"whole process {whole_s:6.2f} s (total_s in the record {told_s:.2f} s)")
    print(f"builder       {builder_s:6.2f} s")
    print(f"the rest      {rest_s:6.2f} s, {share:.1%} of the builder's time (aim {AIM:.0%})")


if __name__ == "__main__":
    main(sys.argv[1:])
