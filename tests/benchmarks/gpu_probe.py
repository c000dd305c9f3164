"""Whether TensorRT-RTX serves this card at all: sm_90 and sm_100 stand in none of its tables.

For each target a tiny Llama is built in a process of its own, which also asks the runtime what it
thinks of the engine; then it is loaded, run and held against ONNX Runtime as any engine is. Each
outcome is one line, a refusal and a crash too. Run ``python -m tests.benchmarks.gpu_probe`` for it
alone.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from exporter.artifacts.latency import Shape
from exporter.engines.build.build import build_engines
from exporter.engines.build.driver import ask_driver
from exporter.engines.build.profiles import Ranges, Span, graph_inputs, profile
from exporter.engines.build.settings import BuildSettings
from exporter.engines.build.sidecar import EngineRecord, sidecar_path
from exporter.engines.inputs import make_inputs, random_tokens
from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
from exporter.engines.runners.tensorrt import open_engine
from exporter.errors import DepthcutError
from exporter.files import sha256_file
from tests.llama_shaped import LlamaShape, write_llama

TARGETS = ("default", "CURRENT", "SM80", "SM89", "SM120")
PRECISIONS = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16}
STEP = Shape("decode", 1, 1, 64)
_RANGES = Ranges(context=Span(1, 64, 128))

# Builds and asks; whatever it says last is the outcome.
_CHILD = """
import sys
from pathlib import Path
import tensorrt_rtx as trt
from exporter.engines.build.config import builder_config
from exporter.engines.build.logs import Listener, make_monitor
from exporter.engines.build.network import Builder
from exporter.engines.build.settings import BuildSettings
from exporter.engines.build.sidecar import EngineRecord
onnx, engine, record, target = sys.argv[1:]
builder = Builder(trt)
parsed = builder.parse(Path(onnx))
assert not parsed.obstacles, parsed.obstacles
profiles = EngineRecord.read(Path(record)).profiles
monitor = make_monitor(trt, lambda done: None)
config = builder_config(builder, BuildSettings(), profiles, monitor)
if target != "default":
    config.num_compute_capabilities = 1
    assert config.set_compute_capability(getattr(trt.ComputeCapability, target), 0), "not settable"
made = builder.builder.build_serialized_network(parsed.network, config)
if made is None:
    sys.exit("no engine: " + (builder.listener.errors() or ["no reason"])[-1])
data = bytes(made)
Path(engine).write_bytes(data)
listener = Listener(trt)
runtime = trt.Runtime(listener.log)
print(*runtime.get_engine_validity(data[: runtime.engine_header_size]))
"""


def probe(folder: Path) -> list[dict[str, Any]]:
    """Tries every target in every precision, and prints what came of it."""
    rows = []
    for precision, dtype in PRECISIONS.items():
        shape = LlamaShape(
            layers=2, hidden=64, heads=4, kv_heads=2, intermediate=128, vocabulary=97, dtype=dtype
        )
        onnx = write_llama(folder / precision / "model.onnx", shape, noise=0.1)
        inputs = graph_inputs(onnx)
        ((base, _),) = build_engines(
            onnx,
            folder / precision / "base.engine",
            profiles=[profile(inputs, "decode", _RANGES)],
            settings=BuildSettings(compute_capabilities=("sm89",)),
        )
        for target in TARGETS:
            row = {"part": "probe", "precision": precision, "target": target}
            rows.append({**row, **_outcome(onnx, base, target)})
            told = {name: value for name, value in rows[-1].items() if name != "part"}
            print("  " + ", ".join(f"{name} {value}" for name, value in told.items()), flush=True)
    return rows


def _outcome(onnx: Path, base: Path, target: str) -> dict[str, Any]:
    engine = base.with_name(f"{target}.engine")
    command = [sys.executable, "-c", _CHILD, onnx, engine, sidecar_path(base), target]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or "no word").splitlines()[-1]
        return {"built": False, "why": f"{last} (exit code {done.returncode})"}
    record = EngineRecord.read(sidecar_path(base))
    changes = {
        "engine": engine.name, "engine_bytes": engine.stat().st_size,
        "engine_sha256": sha256_file(engine), "settings": BuildSettings(),
    }  # fmt: skip
    record.model_copy(update=changes).write(sidecar_path(engine))
    found: dict[str, Any] = {"built": True, "validity": done.stdout.strip()}
    try:
        return {**found, "ran": True, **_run(onnx, engine)}
    except DepthcutError as error:
        return {**found, "ran": False, "why": error.message}


def _run(onnx: Path, engine: Path) -> dict[str, Any]:
    with open_engine(engine) as runner, OnnxRuntimeRunner(onnx, threads=1) as reference:
        inputs = make_inputs(runner.inputs, STEP, random_tokens(STEP, 97))
        found, wanted = (
            each.run(inputs, ["logits"])["logits"].astype(np.float32)
            for each in (runner, reference)
        )
        call = runner.prepare(inputs, phase=STEP.phase)
        times = [call.timed() if call.timed else float("nan") for _ in range(50)]
    error = float(np.abs(found - wanted).max() / np.abs(wanted).max())
    return {"median_ms": round(statistics.median(times), 4), "largest_error": f"{error:.1e}"}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        probe(Path(name))
    if ask_driver().problem:
        sys.exit(f"{ask_driver().problem}: nothing was measured")
