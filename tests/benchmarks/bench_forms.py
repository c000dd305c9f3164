"""The forms of SmolLM2, whole and cut, in float and quantised, beside other libraries.

Run it with ``python -m tests.benchmarks.bench_forms GGUF WORK --table fp32`` (``int4``).
WORK takes the models, which are made once. Every arm is a process of its own with the same number
of threads and the same tokens; arms take turns in an order that is drawn, and all are loaded anew
several times, since where weights lie in memory alone makes some percent. All get huge pages from
malloc, as depthcut's runner asks for them itself. Logits are of the last position alone where the
library can do that.

Aims: at most 1.02 of onnxruntime-genai's time; ahead of optimum and PyTorch; 15 of 30 attentions
cut: decode at 2048 at least 1.25 times as fast in fp32, 1.6 in int4, the prompt of 2048 in fp32
1.45. It prints figures and asserts nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from exporter.artifacts import PlannedDeletion, PruningPlan, ReplacementsRef, Target
from exporter.artifacts.replacement_file import Replacements, read_replacements
from exporter.files import sha256_file, staged_directory
from tests.benchmarks.forms_table import Arm, measure, print_table
from tests.benchmarks.frame import print_machine

OURS, GENAI = "depthcut", "onnxruntime-genai"
ATTENTIONS = (25, 26, 7, 28, 6, 5, 4, 14, 9, 29, 27, 3, 22, 10, 17)
"""The lowest cosine scores of SmolLM2, lowest first."""
QUANTIZED: dict[str, dict[str, Any]] = {
    "int4 plain": {"scheme": "int4", "method": "rtn", "symmetric": True},
    "int4 kept": {"scheme": "int4", "method": "gguf"},
    "int8": {"scheme": "int8", "method": "rtn"},
}
"""Forms by what the tables call them."""


class Models:
    """Makes what isn't there yet, by depthcut's own library."""

    def __init__(self, source: Path, work: Path) -> None:
        self.source, self._work = source, work

    def checkpoint(self) -> Path:
        """For PyTorch."""

        def write(folder: Path) -> None:
            from exporter.models.loading.model_files import save_checkpoint
            from exporter.models.loading.model_source import load_model

            save_checkpoint(load_model(str(self.source)), folder)

        return self._made("checkpoint", write)

    def whole(self, target: Target = "onnxruntime-cpu") -> Path:
        """In a target's form."""

        def write(folder: Path) -> None:
            from exporter.export.forms.targets import write_form
            from exporter.models.loading.model_files import save_pretrained_files
            from exporter.models.loading.model_source import load_model

            loaded = load_model(str(self.source))
            write_form(loaded, folder, target=target)
            save_pretrained_files(loaded, folder)

        return self._made(target, write)

    def cut(self, count: int, *, linear: bool = False) -> Path:
        """Without so many attentions; with a linear map of random numbers in each one's place."""

        def write(folder: Path) -> None:
            from exporter.artifacts.loaded_plan import LoadedPlan
            from exporter.cut.options import CutOptions
            from exporter.cut.surgery import prune_file

            put = "linear" if linear else "none"
            deletions = [
                PlannedDeletion(layer=n, kind="attention", replacement=put)  # type: ignore[arg-type]
                for n in ATTENTIONS[:count]
            ]
            whole = self.whole()
            plan = LoadedPlan.of(deletions, _maps(whole, deletions) if linear else None)
            how = CutOptions(verify="none")
            prune_file(whole / "model.onnx", folder / "model.onnx", plan, how)
            _copy_beside(whole, folder)

        return self._made(f"{count}-cut{'-linear' if linear else ''}", write)

    def quantized(self, name: str, count: int = 0) -> Path:
        """On ONNX Runtime, whole or cut; ``name`` is one of :data:`QUANTIZED`."""
        source = self.cut(count) if count else self.whole()
        settings = {**QUANTIZED[name]}
        if settings.get("method") == "gguf":
            settings["gguf"] = self.source

        def write(folder: Path) -> None:
            from exporter.quantize.quantize import quantize_file
            from exporter.quantize.settings import QuantizeSettings

            how = QuantizeSettings(**settings)
            quantize_file(source / "model.onnx", folder / "model.onnx", how)
            _copy_beside(source, folder)

        return self._made(f"{source.name}-{name.replace(' ', '-')}", write)

    def _made(self, name: str, write: Callable[[Path], None]) -> Path:
        folder = self._work / name
        if not folder.is_dir():
            print(f"making {folder.name} ...", flush=True)
            with staged_directory(folder) as stage:
                write(stage)
        return folder


def _copy_beside(source: Path, folder: Path) -> None:
    for file in source.iterdir():
        if not file.name.startswith("model.onnx") and file.is_file():
            shutil.copy2(file, folder)


def _maps(folder: Path, deletions: list[PlannedDeletion]) -> Replacements:
    """Random maps of the right sizes: what they compute doesn't matter for the time."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    rng, hidden = np.random.default_rng(0), config["hidden_size"]
    tensors = {}
    for deletion in deletions:
        name = f"attention.{deletion.layer}"
        tensors[f"{name}.weight"] = rng.normal(0, 1e-3, (hidden, hidden)).astype(np.float32)
        tensors[f"{name}.bias"] = np.zeros(hidden, np.float32)
    path = folder.parent / "maps.safetensors"
    save_file(tensors, path)
    named = ReplacementsRef(path=path.name, sha256=sha256_file(path))
    plan = PruningPlan(deletions=deletions, replacements=named)
    maps = read_replacements(plan, folder.parent / "plan.json")
    assert maps is not None
    return maps


def fp32(models: Models, options: argparse.Namespace) -> dict[str, Arm]:
    """The whole model in every library, and ours without 8 and 15 attentions."""
    whole, portable = models.whole(), models.whole("portable")
    return {
        "depthcut": Arm(OURS, whole, beside="onnxruntime-genai"),
        "depthcut, 8 cut": Arm(OURS, models.cut(8), beside="depthcut"),
        "depthcut, 15 cut": Arm(OURS, models.cut(15), beside="depthcut"),
        "depthcut, 15 linear": Arm(OURS, models.cut(15, linear=True), beside="depthcut"),
        "portable": Arm(OURS, portable, beside="depthcut"),
        "onnxruntime-genai": Arm(GENAI, whole, options.genai_python),
        "optimum, portable file": Arm("optimum", portable, options.optimum_python, "depthcut"),
        "PyTorch eager": Arm("torch", models.checkpoint(), beside="depthcut"),
    }


def int4(models: Models, options: argparse.Namespace) -> dict[str, Arm]:
    """Quantised forms, whole and cut."""
    return {
        "fp32": Arm(OURS, models.whole()),
        "int8": Arm(OURS, models.quantized("int8"), beside="fp32"),
        "int4 plain": Arm(OURS, models.quantized("int4 plain"), beside="in genai"),
        "int4 kept": Arm(OURS, models.quantized("int4 kept"), beside="int4 plain"),
        "int4 kept, 15 cut": Arm(OURS, models.quantized("int4 kept", 15), beside="int4 kept"),
        "in genai": Arm(GENAI, models.quantized("int4 plain"), options.genai_python),
        "llama.cpp": Arm("llama.cpp", models.source, options.llama_python, "int4 kept"),
    }


TABLES = {"fp32": fp32, "int4": int4}


def main() -> int:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="SmolLM2 as GGUF")
    parser.add_argument("work", type=Path, help="where the models are, or go")
    parser.add_argument("--table", choices=TABLES, default="fp32")
    parser.add_argument("--loads", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=6)
    for library in ("genai", "optimum", "llama"):
        parser.add_argument(f"--{library}-python", default=sys.executable)
    parser.add_argument("--only", action="append", help="this arm alone, and others so named")
    options = parser.parse_args()
    print_machine()
    arms = TABLES[options.table](Models(options.source, options.work), options)
    if options.only:
        arms = {name: arm for name, arm in arms.items() if name in options.only}
    print_table(arms, measure(arms, options.loads, options.rounds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
