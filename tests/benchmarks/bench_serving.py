"""Cut models in the runtimes that serve them: their answers held against PyTorch's, their times.

``python -m tests.benchmarks.bench_serving --llama PYTHON`` (``--mlx PYTHON``): the Python of an
environment with llama-cpp-python or mlx-lm. 256 tokens of CPython's documentation are asked.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

from exporter.artifacts.loaded_plan import LoadedPlan
from exporter.artifacts.plans import parse_drops
from exporter.artifacts.servers import Server
from exporter.checkpoint.write import write_checkpoint
from exporter.cut.branch_replacements import branch_replacements_of
from exporter.cut.gguf_surgery import cut_gguf
from exporter.heal.healed import heal
from exporter.heal.options import HealOptions
from exporter.models.ablation.branch_replacements import branches_replaced
from exporter.models.loading.model_source import load_model
from exporter.models.texts.calibration import calibration_text
from tests.benchmarks.frame import default_model, print_head, print_machine, print_row

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
_PEERS = Path(__file__).with_name("peers.py")
MOST_RATIO = 2.0  # of the KL divergence of the whole file
MOST_MLX_ERROR = 1e-3
"""Of the largest logit."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--llama", help="Python of an environment with llama-cpp-python")
    parser.add_argument("--mlx", help="Python of an environment with mlx-lm")
    parser.add_argument("--only", action="append", choices=list(CUTS))
    options = parser.parse_args()
    print_machine("torch", "transformers")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), options.only or list(CUTS))
        wrong = bench.in_llama_cpp(options.llama) if options.llama else 0
        wrong += bench.in_mlx(options.mlx) if options.mlx else 0
    return int(wrong > 0)


class Bench:
    """The model, and the tokens that are asked."""

    def __init__(self, folder: Path, cuts: list[str]) -> None:
        self._folder, self._cuts, self._source = folder, cuts, Path(default_model())
        self._loaded = load_model(str(self._source))
        text = calibration_text(self._loaded, "pydoc", samples=1, sequence_length=TOKENS)
        self._ids = text.input_ids[0]
        np.save(folder / "ids.npy", self._ids)

    def in_mlx(self, python: str) -> int:
        """Holds DeciLM folders against PyTorch, by the largest error beside the largest logit."""
        print_head("cut", "error", "mlx")
        wrong = 0
        for name, plan, target in self._plans("mlx"):
            maps = plan.replacements
            write_checkpoint(
                self._loaded, plan.plan, target, replacements=maps, form="decilm", server="mlx"
            )
            theirs, version = self._asked(python, "mlx", target)
            ours = self._logits(plan)
            error = float(np.abs(ours - theirs).max() / np.abs(ours).max())
            print_row(name, f"{error:.1e}", version)
            wrong += error > MOST_MLX_ERROR
        return wrong

    def in_llama_cpp(self, python: str) -> int:
        """Holds GGUF files against PyTorch, by the divergence of the answers."""
        print_head("cut", "MB", "KL divergence", "same top-1", "llama.cpp")
        whole, wrong = self._row(python, "whole", LoadedPlan.of([]), self._source), 0
        for name, plan, target in self._plans("llama.cpp"):
            cut_gguf(self._source, target.with_suffix(".gguf"), plan)
            wrong += self._row(python, name, plan, target.with_suffix(".gguf")) > MOST_RATIO * whole
        return wrong

    def _plans(self, server: Server) -> Iterator[tuple[str, LoadedPlan, Path]]:
        for name in self._cuts:
            plan, folder = LoadedPlan(parse_drops(CUTS[name].split())), self._folder / "healed"
            if "maps" in name:
                options = HealOptions(kind="linear", server=server, calibration=("pydoc",))
                heal(self._loaded, plan.plan, options).write(folder)
                plan = LoadedPlan.read(next(folder.glob("*plan*.json")))
            yield name, plan, self._folder / name.replace(" ", "_")

    def _row(self, python: str, name: str, plan: LoadedPlan, file: Path) -> float:
        logits, version = self._asked(python, "llama.cpp", file)
        ours, theirs = log_softmax(self._logits(plan), -1), log_softmax(logits, -1)
        kl = float((np.exp(ours) * (ours - theirs)).sum(-1).mean())
        top = float((ours.argmax(-1) == theirs.argmax(-1)).mean())
        print_row(name, f"{file.stat().st_size / 1e6:.1f}", f"{kl:.4f}", f"{top:.0%}", version)
        return kl

    def _asked(self, python: str, library: str, model: Path) -> tuple[NDArray[np.float64], str]:
        """The logits of another program, and its version."""
        out = self._folder / "answers.npy"
        paths = (model, self._folder / "ids.npy", out)
        command = [python, str(_PEERS), "answers", library, *map(str, paths)]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return np.load(out).astype(np.float64), json.loads(said.splitlines()[-1])["version"]

    def _logits(self, plan: LoadedPlan) -> NDArray[np.float64]:
        import torch

        cut = branch_replacements_of(plan.plan.deletions, plan.replacements, self._loaded.model)
        with torch.inference_mode(), branches_replaced(self._loaded.model, cut):
            logits = self._loaded.model(torch.from_numpy(self._ids)[None], use_cache=False).logits
        answer: NDArray[np.float64] = logits[0].double().numpy()
        return answer


if __name__ == "__main__":
    raise SystemExit(main())
