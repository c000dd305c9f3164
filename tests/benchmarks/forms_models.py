"""The models of bench_forms, made by depthcut's own library, once each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from exporter.artifacts import PlannedDeletion, PruningPlan, ReplacementsRef, Target
from exporter.artifacts.replacement_file import Replacements, read_replacements
from exporter.files import sha256_file, staged_directory
from tests.benchmarks.bench_speedup import ATTENTIONS

QUANTIZED: dict[str, dict[str, Any]] = {
    "int4 plain": {"scheme": "int4", "method": "rtn", "symmetric": True},
    "int4 kept": {"scheme": "int4", "method": "gguf"},
    "int4 hqq": {"scheme": "int4", "method": "hqq"},
    "int8": {"scheme": "int8", "method": "rtn"},
}
"""Forms by what the tables call them."""


class Models:
    """Makes what isn't there yet."""

    def __init__(self, source: Path, work: Path, half: int | None = None) -> None:
        self.source, self._work, self.half = source, work, half or 15
        self._every_second = half is not None

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

    def own_passes(self) -> Path:
        """Written by PyTorch's exporter and fused by our own passes, not by the builder."""

        def write(folder: Path) -> None:
            from exporter.export.forms.onnxruntime import write_fused_export
            from exporter.models.loading.model_files import save_pretrained_files
            from exporter.models.loading.model_source import load_model
            from exporter.progress import QUIET

            loaded = load_model(str(self.source))
            write_fused_export(loaded, folder, QUIET)
            save_pretrained_files(loaded, folder)

        return self._made("own-passes", write)

    def cut(self, count: int, target: Target = "onnxruntime-cpu", *, linear: bool = False) -> Path:
        """Without so many attentions; with a linear map of random numbers in each one's place."""

        def write(folder: Path) -> None:
            from exporter.artifacts.loaded_plan import LoadedPlan
            from exporter.cut.options import CutOptions
            from exporter.cut.surgery import prune_file

            deletions = self._deletions(count, linear=linear)
            whole = self.whole(target)
            plan = LoadedPlan.of(deletions, _maps(whole, deletions) if linear else None)
            how = CutOptions(verify="none")
            prune_file(whole / "model.onnx", folder / "model.onnx", plan, how)
            for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
                if (whole / name).is_file():
                    (folder / name).write_bytes((whole / name).read_bytes())

        return self._made(f"{target}-{count}-cut{'-linear' if linear else ''}", write)

    def quantized(self, name: str, count: int = 0) -> Path:
        """On ONNX Runtime, whole or cut; ``name`` is one of :data:`QUANTIZED`."""
        source = self.cut(count) if count else self.whole()
        settings = {**QUANTIZED[name]}
        if settings.get("method") == "gguf":
            settings["gguf"] = self.source
        made = f"{source.name}-{name.replace(' ', '-')}"
        return self._made(made, lambda folder: _quantize(source, folder, settings))

    def _deletions(self, count: int, *, linear: bool) -> list[PlannedDeletion]:
        layers = range(0, 2 * count, 2) if self._every_second else ATTENTIONS[:count]
        put = "linear" if linear else "none"
        return [PlannedDeletion(layer=n, kind="attention", replacement=put) for n in layers]

    def _made(self, name: str, write: Callable[[Path], None]) -> Path:
        folder = self._work / name
        if not folder.is_dir():
            print(f"making {folder.name} ...", flush=True)
            with staged_directory(folder) as stage:
                write(stage)
        return folder


def llama_1b(work: Path) -> Path:
    """A Hugging Face folder of Llama-3.2-1B's shape, its weights random."""
    folder = work / "llama-1b"
    if not folder.is_dir():
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        print("making a Llama of 1.2 billion parameters ...", flush=True)
        config = LlamaConfig(
            vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
            num_attention_heads=32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
            max_position_embeddings=4096,
        )  # fmt: skip
        torch.manual_seed(0)
        with staged_directory(folder) as stage:
            LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(stage)
    return folder


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
    found = read_replacements(plan, folder.parent / "plan.json")
    assert found is not None
    return found


def _quantize(source: Path, folder: Path, settings: dict[str, Any]) -> None:
    from exporter.quantize.quantize import quantize_file
    from exporter.quantize.settings import QuantizeSettings

    quantize_file(source / "model.onnx", folder / "model.onnx", QuantizeSettings(**settings))
    for file in source.iterdir():
        if not file.name.startswith("model.onnx") and file.is_file():
            shutil.copy2(file, folder)
