"""Cut models in the runtimes that serve them: their answers held against PyTorch's, their times."""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.artifacts.loaded_plan import LoadedPlan
from exporter.artifacts.plans import parse_drops
from exporter.artifacts.servers import Server
from exporter.checkpoint.write import write_checkpoint
from exporter.cut.branch_replacements import branch_replacements_of
from exporter.cut.gguf_layers import place_in_layer
from exporter.cut.gguf_surgery import GgufFacts, cut_gguf
from exporter.heal.healed import heal
from exporter.heal.options import HealOptions
from exporter.models.ablation.branch_replacements import branches_replaced
from exporter.models.gguf_header import Tensor, read_header
from exporter.models.loading.model_source import load_model
from exporter.models.texts.calibration import calibration_text
from tests.benchmarks.machine import print_machine
from tests.benchmarks.small_model import default_model

RUNS = Path(__file__).with_name("llama_cpp_runs.py")
MLX_RUNS = Path(__file__).with_name("mlx_runs.py")
VLLM_RUNS = Path(__file__).with_name("vllm_runs.py")
FIRST = "25,26,28,7,9,6,29,12"
CUTS = {
    "8 attentions": f"attention:{FIRST}",
    "15 attentions": f"attention:{FIRST},27,3,22,10,14,13,5",
    "8 attentions, maps": f"attention:{FIRST}",
    "4 blocks": "block:13,14,12,25",
    "2 MLPs": "mlp:13,25",
    "4 attentions, 2 blocks, 1 MLP": "attention:26,28,7,9 block:13,14 mlp:25",
}
"""By the cosines of attentions and blocks on WikiText-2's valid part, MLPs aside."""
TOKENS = 256
MOST_KL_RATIO = 2.0
MOST_MLX_ERROR = 1e-3
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 32, 32, 32


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench_serving")
    parser.add_argument("--llama", help="Python of an environment with llama-cpp-python")
    parser.add_argument("--mlx", help="Python of an environment with mlx-lm")
    parser.add_argument("--vllm", help="Python of an environment with vllm")
    parser.add_argument("--only", action="append", choices=list(CUTS))
    parser.add_argument("--times", type=int, default=0, metavar="ROUNDS")
    options = parser.parse_args()
    print_machine("torch", "transformers")
    with tempfile.TemporaryDirectory() as folder:
        failed = 0
        if options.llama:
            failed += _in_llama_cpp(options, Path(folder))
        if options.mlx:
            failed += _in_mlx(options, Path(folder))
        if options.vllm:
            failed += _in_vllm(options, Path(folder))
    return int(failed > 0)


def _opened(folder: Path) -> tuple[Path, Any, Any]:
    """The file, the model, and the tokens that are asked."""
    source = Path(default_model())
    loaded = load_model(str(source))
    ids = calibration_text(loaded, "pydoc", samples=1, sequence_length=TOKENS).input_ids[0]
    np.save(folder / "ids.npy", ids)
    return source, loaded, ids


def _in_mlx(options: Any, folder: Path) -> int:
    """Holds DeciLM folders against PyTorch, by the largest error beside the largest logit."""
    _, loaded, ids = _opened(folder)
    failed = 0
    for name in options.only or CUTS:
        plan, target = _plan(name, loaded, folder, "mlx"), folder / name.replace(" ", "_")
        write_checkpoint(
            loaded, plan.plan, target, replacements=plan.replacements, form="decilm", server="mlx"
        )
        out = folder / "answers.npy"
        words = [options.mlx, str(MLX_RUNS), str(target), str(folder / "ids.npy"), str(out)]
        told = subprocess.run(words, check=True, capture_output=True, text=True).stdout
        ours, theirs = _logits(loaded, plan, ids), np.load(out)
        error = float(np.abs(ours - theirs).max() / np.abs(ours).max())
        version = json.loads(told.splitlines()[-1])["version"]
        print(f"| {name} | {error:.1e} | {version} |", flush=True)
        failed += error > MOST_MLX_ERROR
    return failed


def _in_vllm(options: Any, folder: Path) -> int:
    """Counts the greedy continuations that are PyTorch's, token for token."""
    loaded = load_model(default_model())
    ids = calibration_text(loaded, "pydoc", samples=PROMPTS, sequence_length=PROMPT_TOKENS)
    np.save(folder / "prompts.npy", ids.input_ids)
    failed = 0
    for name in options.only or [name for name in CUTS if "maps" not in name]:
        plan, target = _plan(name, loaded, folder, "vllm"), folder / name.replace(" ", "_")
        write_checkpoint(loaded, plan.plan, target, form="decilm", server="vllm")
        out = folder / "new.npy"
        words = [options.vllm, str(VLLM_RUNS), str(target), str(folder / "prompts.npy")]
        told = subprocess.run(
            [*words, str(NEW_TOKENS), str(out)], check=True, capture_output=True, text=True
        ).stdout
        ours, theirs = _continued(loaded, plan, ids.input_ids), np.load(out)
        same = (ours == theirs).all(axis=1)
        version = json.loads(told.splitlines()[-1])["version"]
        print(f"| {name} | {int(same.sum())} of {PROMPTS} | {version} |", flush=True)
        for row in np.flatnonzero(~same):
            _tell_margin(loaded, plan, ids.input_ids[row], ours[row], theirs[row])
        failed += int((~same).sum())
    return failed


def _continued(loaded: Any, plan: LoadedPlan, prompts: Any) -> NDArray[np.int64]:
    """PyTorch's greedy continuations, ``[prompts, NEW_TOKENS]``."""
    import torch

    cut = branch_replacements_of(plan.plan.deletions, plan.replacements, loaded.model)
    text = torch.from_numpy(np.asarray(prompts))
    with torch.inference_mode(), branches_replaced(loaded.model, cut):
        for _ in range(NEW_TOKENS):
            logits = loaded.model(text, use_cache=False).logits[:, -1]
            text = torch.cat([text, logits.argmax(-1, keepdim=True)], 1)
    found: NDArray[np.int64] = text[:, -NEW_TOKENS:].numpy()
    return found


def _tell_margin(loaded: Any, plan: LoadedPlan, prompt: Any, ours: Any, theirs: Any) -> None:
    """Where two texts part, and how far apart PyTorch's logits of both tokens are."""
    at = int(np.flatnonzero(ours != theirs)[0])
    logits = _logits(loaded, plan, np.concatenate([prompt, ours[:at]]))[-1]
    apart = float(logits[ours[at]] - logits[theirs[at]])
    print(f"  parts at token {at}: logits {apart:.1e} apart", flush=True)


def _in_llama_cpp(options: Any, folder: Path) -> int:
    source, loaded, ids = _opened(folder)
    whole_kl = _row("whole", source, loaded, LoadedPlan.of([]), ids, options.llama, folder)
    failed = 0
    for name in options.only or CUTS:
        plan, target = (
            _plan(name, loaded, folder, "llama.cpp"),
            folder / f"{name.replace(' ', '_')}.gguf",
        )
        facts = cut_gguf(source, target, plan)
        _hold_bytes(source, target, facts)
        kl = _row(name, target, loaded, plan, ids, options.llama, folder)
        failed += kl > MOST_KL_RATIO * whole_kl
        if options.times:
            words = [
                options.llama,
                str(RUNS),
                "times",
                str(options.times),
                str(source),
                str(target),
            ]
            told = subprocess.run(words, check=True, capture_output=True, text=True).stdout
            print(f"  {told.strip()}", flush=True)
    return failed


def _plan(name: str, loaded: Any, folder: Path, server: Server) -> LoadedPlan:
    plan = parse_drops(CUTS[name].split())
    if "maps" not in name:
        return LoadedPlan(plan)
    options = HealOptions(kind="linear", server=server, calibration=("pydoc",))
    heal(loaded, plan, options).write(folder / "healed")
    return LoadedPlan.read(next((folder / "healed").glob("*plan*.json")))


def _row(
    name: str, file: Path, loaded: Any, plan: LoadedPlan, ids: Any, python: str, folder: Path
) -> float:
    """Prints the divergence of llama.cpp's answers from PyTorch's."""
    out = folder / "answers.npy"
    words = [python, str(RUNS), "answers", str(file), str(folder / "ids.npy"), str(out)]
    told = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    ours, theirs = _log_shares(_logits(loaded, plan, ids)), _log_shares(np.load(out))
    kl = float((np.exp(ours) * (ours - theirs)).sum(-1).mean())
    top = float((ours.argmax(-1) == theirs.argmax(-1)).mean())
    size = file.stat().st_size
    version = json.loads(told)["version"]
    print(f"| {name} | {size / 1e6:.1f} | {kl:.4f} | {top:.0%} | {version} |", flush=True)
    return kl


def _logits(loaded: Any, plan: LoadedPlan, ids: Any) -> NDArray[np.float32]:
    import torch

    cut = branch_replacements_of(plan.plan.deletions, plan.replacements, loaded.model)
    with torch.inference_mode(), branches_replaced(loaded.model, cut):
        logits: NDArray[np.float32] = loaded.model(torch.from_numpy(ids)[None]).logits[0].numpy()
    return logits


def _log_shares(logits: Any) -> NDArray[np.float64]:
    numbers = logits.astype(np.float64)
    numbers -= numbers.max(-1, keepdims=True)
    shares: NDArray[np.float64] = numbers - np.log(np.exp(numbers).sum(-1, keepdims=True))
    return shares


def _hold_bytes(source: Path, target: Path, facts: GgufFacts) -> None:
    """Every kept tensor is the source's, and no byte is there that no tensor accounts for."""
    before = {tensor.name: tensor for tensor in read_header(source).tensors}
    same = added = 0
    for tensor in read_header(target).tensors:
        place = place_in_layer(tensor.name)
        name = tensor.name if place is None else f"blk.{facts.kept[place[0]]}.{place[1]}"
        if (
            name in before
            and before[name].shape == tensor.shape
            and _sha(before[name]) == _sha(tensor)
        ):
            same += 1
        else:
            added += tensor.nbytes
    assert same == facts.tensors_kept, (same, facts)
    removed = facts.bytes_before - facts.bytes_after + added
    print(f"  {same} tensors the same by hash, {facts.tensors_removed} gone with {removed} bytes, "
          f"{facts.tensors_added} added with {added}", flush=True)  # fmt: skip


def _sha(tensor: Tensor) -> str:
    with tensor.file.open("rb") as file:
        file.seek(tensor.start)
        return hashlib.sha256(file.read(tensor.nbytes)).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
