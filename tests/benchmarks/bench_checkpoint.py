"""The pruned Hugging Face checkpoint beside the pruned ONNX file: the same logits, exact sizes.

Run it with ``python -m tests.benchmarks.bench_checkpoint MODEL [--onnx FILE] [--folder DIR]``.
MODEL is a Hugging Face folder or a GGUF file; its export is made where none is given. For each plan
the checkpoint is written, read back, and held against the cut graph, in prefill and decode; the
files' tensors are counted in their headers. Then a random Llama of 1.5 GB in shards is written from
shards to shards, by a process that may take 40 % of that above what Python and the libraries take
before they see the model (``RLIMIT_DATA``). A wrong result makes it fail.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from exporter.artifacts import ParityCheck, PruningPlan
from exporter.artifacts.plans import parse_drops
from exporter.checkpoint.pruned_model import load_pruned
from exporter.checkpoint.write import write_checkpoint
from exporter.cut.options import CutOptions
from exporter.cut.surgery import prune_file
from exporter.export.parity import check_export
from exporter.export.torch_export import export_onnx
from exporter.models.loading.model_files import save_checkpoint
from exporter.models.loading.model_source import load_model
from tests.benchmarks.bench_streaming import MODEL, SHARE
from tests.benchmarks.machine import print_machine

PLANS = ("attention:20-27", "block:22-25", "mlp:24,26 attention:20-23")
"""What is cut out of SmolLM2's thirty layers."""


def data_bytes(folder: Path) -> int:
    """Bytes of all tensors in a folder's safetensors."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        ends = [entry["data_offsets"] for entry in header.values()]
        held = sum(end - begin for begin, end in ends)
        assert path.stat().st_size == 8 + length + held, path
        total += held
    return total


def one_plan(model: str, drops: str, onnx: Path, whole: int, folder: Path) -> bool:
    """Writes one checkpoint, holds it against the cut graph, and prints a line."""
    plan = PruningPlan(deletions=parse_drops(drops.split()).deletions)
    cut = folder / "cut.onnx"
    prune_file(onnx, cut, plan.deletions, CutOptions(verify="none"))
    began = time.perf_counter()
    facts = write_checkpoint(load_model(model), plan, folder / "hf")
    seconds = time.perf_counter() - began
    checks = check_export(load_pruned(folder / "hf"), cut, layers=facts.kept)
    worst = max((check for check in checks if "logits" in check.name), key=_excess)
    gone = whole - data_bytes(folder / "hf")
    exact = gone == facts.before.bytes - facts.after.bytes
    form = "gaps" if facts.kept is None else f"{len(facts.kept)} layers, plain"
    right = worst.max_abs_error <= worst.tolerance and exact
    print(
        f"{drops:28} {form:18} {whole / 1e6:8.1f} -> {(whole - gone) / 1e6:8.1f} MB, "
        f"{gone:,} bytes less ({'exactly what was dropped' if exact else 'NOT what was dropped'}); "
        f"logits off by {worst.max_abs_error:.1e} of {worst.tolerance:.1e}; written in "
        f"{seconds:.0f} s{'' if right else '  WRONG'}",
        flush=True,
    )
    return right


_CHILD = """
import json, resource, sys, time
from pathlib import Path
import torch
from transformers.models.llama import modeling_llama
from exporter.artifacts import PruningPlan
from exporter.checkpoint import write_checkpoint
from exporter.models.loading.meta_model import load_meta
from exporter.artifacts.plans import parse_drops

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith(name + ":"))

base, out, drops, allowed = sys.argv[1:]
torch.ones(512, 512) @ torch.ones(512, 512)  # the threads with their stacks
before = status("VmData"), status("VmRSS")
resource.setrlimit(resource.RLIMIT_DATA, (before[0] + int(allowed),) * 2)
began, meta = time.perf_counter(), load_meta(base)
plan = PruningPlan(deletions=parse_drops(drops.split()).deletions)
facts = write_checkpoint(meta, plan, Path(out))
print(json.dumps({"gone": facts.before.bytes - facts.after.bytes, "read": meta.shards.bytes_read,
                  "peak": status("VmHWM") - before[1], "seconds": time.perf_counter() - began}))
"""


def streamed(folder: Path) -> bool:
    """Writes a random model's checkpoints in little memory, and prints a line each."""
    base = folder / "large"
    base.mkdir()
    whole = MODEL.write(base)
    right = True
    for drops in ("attention:8-13", "block:12-14"):
        arguments = [str(base), str(folder / "small"), drops, str(int(SHARE * whole))]
        command = [sys.executable, "-c", _CHILD, *arguments]
        told = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        exact = whole - data_bytes(folder / "small") == told["gone"]
        right = right and exact
        print(
            f"streamed, {drops:18} {whole / 1e9:.2f} GB, {told['gone']:,} bytes less "
            f"({'exactly what was dropped' if exact else 'WRONG'}), {told['peak'] / 1e9:.2f} GB "
            f"at most above the libraries' own, {told['read'] / whole:.1f} reads of the weights, "
            f"{told['seconds']:.0f} s",
            flush=True,
        )
    return right


def _excess(check: ParityCheck) -> float:
    """Share of the tolerance, which is 1e-4 times the largest logit, or 1."""
    return check.max_abs_error / check.tolerance


def main(arguments: list[str] | None = None) -> int:
    """Runs all plans; 1 where a result is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--onnx", type=Path, help="the model's export, in float32")
    parser.add_argument("--folder", type=Path, help="for what is written; a temporary one else")
    given = parser.parse_args(arguments)
    print_machine("torch", "transformers")
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        onnx = given.onnx or export_onnx(load_model(given.model), folder / "whole", opset=20)
        save_checkpoint(load_model(given.model), folder / "base")
        whole = data_bytes(folder / "base")
        results = [one_plan(given.model, drops, onnx, whole, folder) for drops in PLANS]
        results.append(streamed(folder))
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
