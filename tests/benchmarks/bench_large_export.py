"""What it takes to export, cut and check a model whose weights never come into memory together."""

from __future__ import annotations

import filecmp
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.benchmarks.machine import print_machine
from tests.benchmarks.random_llama import RandomLlama
from tests.written_files import data_of

MODEL = RandomLlama(12, 2048, 5504, 16, 16000)
SHARE = 0.45
CUT = (3, 5, 7, 9)

_CHILD = """
import json, resource, sys, threading, time
from pathlib import Path
import torch, transformers, onnxscript.optimizer, onnx_ir.passes.common
from transformers.models.llama import modeling_llama
import torch.onnx._internal.exporter._core, torch._inductor.config
from exporter import parity
from exporter.artifacts import PlannedDeletion
from exporter.models.loading.meta_model import load_meta
from exporter.models.loading.model_source import load_model
from exporter.progress import Quiet
from exporter.cut.options import CutOptions
from exporter.cut.surgery import prune_file
from exporter.export.torch_export import export_onnx

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith(name + ":"))

class Heard(Quiet):
    def say(self, message):
        print(message, file=sys.stderr)

asked = json.loads(sys.argv[1])
torch.ones(512, 512) @ torch.ones(512, 512)  # the threads with their stacks
base, top = (status("VmData"), status("RssAnon")), [0]

def watch():
    while True:
        top[0] = max(top[0], status("RssAnon"))
        time.sleep(0.02)

threading.Thread(target=watch, daemon=True).start()
if asked["allowed_bytes"]:
    resource.setrlimit(resource.RLIMIT_DATA, (base[0] + asked["allowed_bytes"],) * 2)
cut = [PlannedDeletion(layer=n, kind="attention") for n in asked["cut"]]
folder, read, found = Path(asked["folder"]), 0, {}
baseline, candidate = folder / "model.onnx", folder / "cut" / "model.onnx"
start, cpu = time.perf_counter(), time.process_time()
if asked["work"] == "export":
    loaded = (load_meta if asked["streamed"] else load_model)(asked["model"])
    export_onnx(loaded, folder)
    read = loaded.shards.bytes_read if asked["streamed"] else 0
elif asked["work"] == "cut":
    prune_file(baseline, candidate, cut, CutOptions(verify="none"))
elif asked["work"] == "parity":
    parity.DEFAULT_LIMIT_BYTES = 1  # the cheaper setting, as where memory is short
    meta = load_meta(asked["model"])
    checks = parity.check_export(meta, baseline, progress=Heard())
    checks += parity.check_export(meta, candidate, deletions=cut, progress=Heard())
    found = {"passed": all(check.passed for check in checks),
             "error": max(check.max_abs_error for check in checks)}
    read = meta.shards.bytes_read
else:
    again, how = folder / "again" / "model.onnx", CutOptions(verify_limit_bytes=1)
    report = prune_file(baseline, again, cut, how)
    found = {"passed": report.verification.passed, "error": report.verification.max_abs_error}
top[0] = max(top[0], status("RssAnon"))
print(json.dumps({
    "seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu,
    "above": top[0] - base[1], "read": read, **found,
}))
"""


def main() -> int:
    """Prints the figures; 1 when files differ or a check does not hold."""
    print_machine("torch", "transformers", "onnxscript", "safetensors")
    place = Path("out/bench").resolve()
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place) as name:
        folder = Path(name)
        weights = MODEL.write(folder / "model")
        allowed = int(SHARE * weights)
        print(f"{weights / 1e9:.2f} GB of weights in float32, {MODEL.layers} layers; streamed with "
              f"at most {allowed / 1e9:.2f} GB (RLIMIT_DATA, above the libraries)")  # fmt: skip
        _print_the_limit(folder, allowed)
        whole = _run(folder, "export", "whole", weights)
        streamed = _run(folder, "export", "streamed", weights, allowed=allowed)
        same = all(
            filecmp.cmp(folder / "whole" / file, folder / "streamed" / file, shallow=False)
            for file in ("model.onnx", data_of(folder / "whole" / "model.onnx").name)
        )
        print(f"  files {'equal to the last bit' if same else 'DIFFER'}; time "
              f"{streamed['seconds'] / whole['seconds']:.2f} times", flush=True)  # fmt: skip
        _run(folder, "cut", "streamed", weights, allowed=allowed)
        checks = [_run(folder, work, "streamed", weights) for work in ("parity", "oracle")]
        within = all(check["above"] <= allowed for check in checks)
        passed = all(check["passed"] for check in checks)
    print(f"checks {'hold' if passed else 'DO NOT HOLD'}, "
          f"{'within' if within else 'NOT WITHIN'} the limit")  # fmt: skip
    return 0 if same and passed and within else 1


def _print_the_limit(folder: Path, allowed: int) -> None:
    """The whole model under the limit of the streamed one."""
    done = _child(folder, "export", "limited", allowed)
    last = (done.stderr.strip().splitlines() or ["no error"])[-1]
    print(f"the whole model under that limit: exit {done.returncode}, {last[:90]}", flush=True)


def _run(folder: Path, work: str, arm: str, weights: int, *, allowed: int = 0) -> dict[str, Any]:
    done = _child(folder, work, arm, allowed)
    if done.returncode:
        raise SystemExit(f"{work}, {arm}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    error = f"; largest error {found['error']:.1e}" if "error" in found else ""
    print(
        f"  {work:<7} {arm:<9} {found['seconds']:6.1f} s ({found['cpu']:.1f} of the processor), "
        f"{found['above'] / 1e9:.2f} GB anonymous above the libraries, "
        f"{found['above'] / weights:.0%} of the weights; tensors read "
        f"{found['read'] / weights:.2f} times{error}",
        flush=True,
    )
    return found


def _child(folder: Path, work: str, arm: str, allowed: int) -> subprocess.CompletedProcess[str]:
    call = {
        "model": str(folder / "model"), "folder": str(folder / arm), "work": work,
        "streamed": arm == "streamed", "allowed_bytes": allowed, "cut": CUT,
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "-c", _CHILD, json.dumps(call)],
        capture_output=True,
        text=True,
        check=False,
    )


if __name__ == "__main__":
    raise SystemExit(main())
