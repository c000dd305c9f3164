"""What large models cost: cut, scored and exported with few of their weights in memory.

Run it with ``python -m tests.benchmarks.bench_large [PART ...]``:

- ``cut``: a graph of Llama 2 70B's shape, 40 of 80 attentions out of it, weights shared. Aim: 1.5 s
  and 200 MB.
- ``score``: a random Llama of 1.5 GB scored in memory, and streamed under a limit of 40 % of that
  (``RLIMIT_DATA``) above what Python and the libraries take. The scores must be equal to the bit.
- ``export``: one of 2.7 GB exported in memory, and streamed under 45 %; the files must be equal.
  Then it is cut, checked against PyTorch, and held against the masked oracle.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.benchmarks.frame import in_turns, print_head, print_machine, print_row
from tests.llama_shaped import LlamaShape, write_llama
from tests.measured import depthcut, script, takes_holes
from tests.reading import data_of

RUNS = 3
_TITLES = ("arm", "seconds", "of the processor", "GB above", "of the weights", "weights read")
METRICS: tuple[dict[str, Any], ...] = (
    {"metrics": ["cosine", "angular", "relative-l2"], "samples": 8, "length": 256},
    {"metrics": ["kl", "perplexity"], "samples": 2, "length": 64},
)

_CHILD = """
import json, resource, sys, threading, time
import numpy as np, torch, transformers, onnxscript.optimizer, onnx_ir.passes.common
import torch.onnx._internal.exporter._core, torch._inductor.config
from pathlib import Path
from transformers.models.llama import modeling_llama
from exporter.artifacts import PlannedDeletion
from exporter.cut.options import CutOptions
from exporter.cut.surgery import prune_file
from exporter.export import parity
from exporter.export.torch_export import export_onnx
from exporter.models.loading.meta_model import load_meta
from exporter.models.loading.model_source import load_model
from exporter.models.texts.calibration import CalibrationText
from exporter.score.scoring import score_on

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith(name + ":"))

def watch():
    while True:
        top[0] = max(top[0], status("RssAnon"))
        time.sleep(0.02)

call = json.loads(sys.argv[1])
work, folder, made, loaded = call["work"], Path(call["folder"]), {}, None
cut = [PlannedDeletion(layer=n, kind="attention") for n in (3, 5, 7, 9)]
torch.ones(512, 512) @ torch.ones(512, 512)  # the threads with their stacks
base, top = (status("VmData"), status("RssAnon")), [0]
threading.Thread(target=watch, daemon=True).start()
if call["allowed_bytes"]:
    resource.setrlimit(resource.RLIMIT_DATA, (base[0] + call["allowed_bytes"],) * 2)
start, cpu = time.perf_counter(), time.process_time()
baseline, candidate = folder / "model.onnx", folder / "cut" / "model.onnx"
if work in ("score", "export", "parity"):
    loaded = (load_meta if call["streamed"] else load_model)(call["model"])
if work == "score":
    shape = call["samples"], call["length"]
    ids = np.random.default_rng(0).integers(3, call["vocabulary"], size=shape)
    text = CalibrationText.unpadded(ids, "random", "0" * 64)
    report = score_on(loaded, text, metrics=call["metrics"])
    made = {"scores": [s.model_dump() for s in report.scores],
            "further": report.model_dump()["further"]}
elif work == "export":
    export_onnx(loaded, folder)
elif work == "cut":
    prune_file(baseline, candidate, cut, CutOptions(verify="none"))
elif work == "parity":
    parity.DEFAULT_LIMIT_BYTES = 1  # the cheaper setting, as where memory is short
    checks = parity.check_export(loaded, baseline)
    checks += parity.check_export(loaded, candidate, deletions=cut)
    made = {"passed": all(check.passed for check in checks),
            "error": max(check.max_abs_error for check in checks)}
else:
    how = CutOptions(verify_limit_bytes=1)
    report = prune_file(baseline, folder / "again" / "model.onnx", cut, how)
    made = {"passed": report.verification.passed, "error": report.verification.max_abs_error}
print(json.dumps({
    "seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu,
    "above": max(top[0], status("RssAnon")) - base[1],
    "read": loaded.shards.bytes_read if hasattr(loaded, "shards") else 0, **made,
}))
_report()
"""


def cut(folder: Path) -> bool:
    """A graph of 138 GB; the weights are holes in a file."""
    if not takes_holes(folder):
        print("cut: left out, since this file system writes every zero")
        return True
    source = write_llama(folder / "model.onnx", LlamaShape())
    drops = "attention:" + ",".join(str(layer) for layer in range(0, 80, 2))
    out = source.with_name("pruned.onnx")
    words = ("prune", source, "-o", out, "--drop", drops, "--weights", "share", "--verify", "none")
    runs = [depthcut(*words) for _ in range(RUNS)]
    seconds, peak = (
        statistics.median(getattr(run, name) for run in runs) for name in ("seconds", "peak_mb")
    )
    print(f"cut: {seconds:.2f} s, {peak:.0f} MB, medians of {RUNS}", flush=True)
    return True


def score(folder: Path) -> bool:
    """In memory and streamed, in turns."""
    weights = _write_llama(folder / "model", 18, 1280, 3456, 20, 8000)
    limit, same = int(0.40 * weights), True
    print_head("metrics", *_TITLES)
    for words in METRICS:
        run = partial(_run, folder, "score", vocabulary=8000, **words)
        arms = {"whole": partial(run, "whole", 0), "streamed": partial(run, "streamed", limit)}
        for arm, done in (runs := in_turns(arms, RUNS)).items():
            _print(done, weights, " and ".join(words["metrics"]), arm)
        scores = [(made["scores"], made["further"]) for done in runs.values() for made in done]
        same = same and all(made == scores[0] for made in scores)
    print(f"scores {'equal to the last bit' if same else 'DIFFER'}", flush=True)
    return same


def export(folder: Path) -> bool:
    """In memory and streamed, then cut and checked."""
    weights = _write_llama(folder / "model", 12, 2048, 5504, 16, 16000)
    limit, done = int(0.45 * weights), {}
    print_head("work", *_TITLES)
    _print([_run(folder, "export", "whole", 0)], weights, "export", "whole")
    for work, allowed in (("export", limit), ("cut", limit), ("parity", 0), ("oracle", 0)):
        done[work] = _run(folder, work, "streamed", allowed)
        _print([done[work]], weights, work, "streamed")
    files = ("model.onnx", data_of(folder / "whole" / "model.onnx").name)
    (matching, _, _) = filecmp.cmpfiles(folder / "whole", folder / "streamed", files, shallow=False)
    same, checks = len(matching) == len(files), [done[work] for work in ("parity", "oracle")]
    right = all(check["passed"] and check["above"] <= limit for check in checks)
    print(f"files {'equal' if same else 'DIFFER'}; checks within the limit "
          f"{'hold' if right else 'DO NOT HOLD'}, largest error "
          f"{max(check['error'] for check in checks):.1e}", flush=True)  # fmt: skip
    return same and right


def _write_llama(
    folder: Path, layers: int, hidden: int, inner: int, heads: int, vocabulary: int
) -> int:
    """Writes a Llama of random weights in float32 and in shards; returns the weights' bytes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=layers, hidden_size=hidden, intermediate_size=inner,
        num_attention_heads=heads, vocab_size=vocabulary, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="300MB")
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _run(folder: Path, work: str, arm: str, allowed: int, **more: Any) -> dict[str, Any]:
    call = {
        "model": str(folder / "model"), "folder": str(folder / arm), "work": work,
        "streamed": arm == "streamed", "allowed_bytes": allowed, **more,
    }  # fmt: skip
    measured: dict[str, Any] = json.loads(
        script(_CHILD, [json.dumps(call)]).output.splitlines()[-1]
    )
    return measured


def _print(runs: list[dict[str, Any]], weights: int, *names: str) -> None:
    seconds, cpu, above, read = (
        statistics.median(run[key] for run in runs) for key in ("seconds", "cpu", "above", "read")
    )
    print_row(*names, f"{seconds:.1f}", f"{cpu:.1f}", f"{above / 1e9:.2f}",
              f"{above / weights:.0%}", f"{read / weights:.2f} times")  # fmt: skip


PARTS: dict[str, Callable[[Path], bool]] = {"cut": cut, "score": score, "export": export}


def main() -> int:
    """Prints the figures; 1 where a result is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help=", ".join(PARTS))
    parts = parser.parse_args().parts or list(PARTS)
    print_machine("torch", "transformers", "onnxscript", "safetensors")
    place = Path("out/bench").resolve()
    place.mkdir(parents=True, exist_ok=True)
    right = True
    for part in parts:
        with tempfile.TemporaryDirectory(dir=place) as name:
            right = PARTS[part](Path(name)) and right
    return 0 if right else 1


if __name__ == "__main__":
    raise SystemExit(main())
