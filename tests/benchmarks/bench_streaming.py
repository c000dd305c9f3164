"""What it costs to score a model with the weights of two layers in memory, against all of them."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.benchmarks.machine import print_machine
from tests.benchmarks.random_llama import RandomLlama

MODEL = RandomLlama(18, 1280, 3456, 20, 8000, layers_a_shard=4, scale=0.03)
SHARE, AIM_RATIO = 0.40, 1.3
PARTS = {
    "cosine and the other metrics of the stream": {
        "metrics": ["cosine", "angular", "relative-l2"], "samples": 8, "length": 256,
    },
    "kl and perplexity": {"metrics": ["kl", "perplexity"], "samples": 2, "length": 64},
}  # fmt: skip

_CHILD = """
import json, resource, sys, time
import numpy as np, torch, transformers
from pathlib import Path
from transformers.models.llama import modeling_llama
from exporter.score import CalibrationText, score_on
from exporter.models.loading.meta_model import load_meta
from exporter.models.loading.model_source import load_model

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith(name + ":"))

asked = json.loads(sys.argv[1])
torch.ones(512, 512) @ torch.ones(512, 512)  # the threads with their stacks
base = status("VmData"), status("VmRSS")
if asked["allowed_bytes"]:
    resource.setrlimit(resource.RLIMIT_DATA, (base[0] + asked["allowed_bytes"],) * 2)
shape = asked["samples"], asked["length"]
ids = np.random.default_rng(0).integers(3, asked["vocabulary"], size=shape)
text = CalibrationText.unpadded(ids, "random", "0" * 64)
read, start, cpu = 0, time.perf_counter(), time.process_time()
if asked["streamed"]:
    meta = load_meta(asked["model"])
    opened = time.perf_counter()
    report = score_on(meta, text, metrics=asked["metrics"],
                      stream_dir=Path(asked["states"]) if asked["states"] else None)
    read = meta.shards.bytes_read
else:
    loaded = load_model(asked["model"])
    opened = time.perf_counter()
    report = score_on(loaded, text, metrics=asked["metrics"])
end = time.perf_counter()
print(json.dumps({
    "seconds": end - start, "opened": opened - start, "cpu": time.process_time() - cpu,
    "base": base[1], "peak": status("VmHWM"), "read": read,
    "scores": [s.model_dump() for s in report.scores],
    "further": [m.model_dump() for m in report.further],
}))
"""


def main() -> int:
    """Prints the figures; 1 when scores differ."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    print_machine("torch", "transformers", "safetensors")
    place = Path("out/bench").resolve()
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place) as name:
        weights = MODEL.write(Path(name))
        allowed = int(SHARE * weights)
        print(f"{weights / 1e9:.2f} GB of weights in float32, {MODEL.layers} layers; streamed with "
              f"at most {allowed / 1e9:.2f} GB (RLIMIT_DATA, above the libraries)")  # fmt: skip
        _print_the_limit(Path(name), allowed)
        same = [_compare(part, asked, Path(name), weights, allowed, rounds)
                for part, asked in PARTS.items()]  # fmt: skip
    return 0 if all(same) else 1


def _print_the_limit(model: Path, allowed: int) -> None:
    """The whole model under the limit of the streamed one."""
    first = next(iter(PARTS.values()))
    done = _run(model, first, streamed=False, allowed=allowed)
    last = (done.stderr.strip().splitlines() or ["no error"])[-1]
    print(f"the whole model under that limit: exit {done.returncode}, {last[-90:]}", flush=True)


def _compare(
    part: str, asked: dict[str, Any], model: Path, weights: int, allowed: int, rounds: int
) -> bool:
    arms: dict[str, dict[str, Any]] = {
        "whole": {"streamed": False},
        "streamed": {"streamed": True, "allowed": allowed},
        "streamed, states in a file": {"streamed": True, "allowed": allowed, "in_file": True},
    }
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, how in arms.items():
            done = _run(model, asked, **how)
            if done.returncode:
                raise SystemExit(f"{name}: {done.stderr[-2000:]}")
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    print(f"{part}: {asked['samples']} x {asked['length']} tokens, medians of {rounds}")
    expected = found["whole"][0]
    for name, runs in found.items():
        _print_arm(name, runs, found["whole"], weights)
    same = all(run[key] == expected[key] for runs in found.values() for run in runs
               for key in ("scores", "further"))  # fmt: skip
    print(f"  scores {'equal to the last bit' if same else 'DIFFER'}", flush=True)
    return same


def _print_arm(
    name: str, runs: list[dict[str, Any]], whole: list[dict[str, Any]], weights: int
) -> None:
    def median(key: str, of: list[dict[str, Any]] = runs) -> float:
        return float(statistics.median(run[key] for run in of))

    ratios = [a["seconds"] / b["seconds"] for a, b in zip(runs, whole, strict=True)]
    above = median("peak") - median("base")
    print(
        f"  {name:<27} {median('seconds'):6.1f} s (opening {median('opened'):.1f}), ratio "
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}; aim "
        f"{AIM_RATIO}), of processor time {median('cpu') / median('cpu', whole):.2f}; "
        f"{above / 1e9:.2f} GB above the libraries, {above / weights:.0%} of the weights; "
        f"tensors read {median('read') / weights:.2f} times",
    )


def _run(
    model: Path,
    asked: dict[str, Any],
    *,
    streamed: bool,
    allowed: int = 0,
    in_file: bool = False,
) -> subprocess.CompletedProcess[str]:
    call = {
        **asked, "model": str(model), "streamed": streamed, "allowed_bytes": allowed,
        "states": str(model / "states") if in_file else None, "vocabulary": MODEL.vocabulary,
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "-c", _CHILD, json.dumps(call)],
        capture_output=True,
        text=True,
        check=False,
    )


if __name__ == "__main__":
    raise SystemExit(main())
