"""A Llama of random weights in float32 and in several shards, for benchmarks of large models."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class RandomLlama:
    """Its measures."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    vocabulary: int
    layers_a_shard: int = 1
    scale: float = 0.02

    def write(self, folder: Path) -> int:
        """Writes config and shards; returns the bytes of the weights."""
        from safetensors.numpy import save_file

        folder.mkdir(exist_ok=True)
        rng = np.random.default_rng(0)
        places: dict[str, str] = {}
        total = 0
        for number, shapes in enumerate(self._shards()):
            file = f"model-{number:05}.safetensors"
            tensors = {name: self._values(rng, shape) for name, shape in shapes.items()}
            save_file(tensors, folder / file, metadata={"format": "pt"})
            places |= dict.fromkeys(shapes, file)
            total += sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder / "config.json").write_text(json.dumps(self._config()))
        return total

    def _config(self) -> dict[str, Any]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
            "dtype": "float32",
        }

    def _shards(self) -> list[Shapes]:
        table, step = (self.vocabulary, self.hidden), self.layers_a_shard
        groups = [range(n, min(n + step, self.layers)) for n in range(0, self.layers, step)]
        return [
            {"model.embed_tokens.weight": table},
            *({k: v for layer in group for k, v in self._layer(layer).items()} for group in groups),
            {"model.norm.weight": (self.hidden,), "lm_head.weight": table},
        ]

    def _layer(self, number: int) -> Shapes:
        name, hidden, inner = f"model.layers.{number}", self.hidden, self.intermediate
        return {
            **{f"{name}.self_attn.{part}_proj.weight": (hidden, hidden) for part in "qkvo"},
            f"{name}.mlp.gate_proj.weight": (inner, hidden),
            f"{name}.mlp.up_proj.weight": (inner, hidden),
            f"{name}.mlp.down_proj.weight": (hidden, inner),
            f"{name}.input_layernorm.weight": (hidden,),
            f"{name}.post_attention_layernorm.weight": (hidden,),
        }

    def _values(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        if len(shape) == 1:
            return np.ones(shape, dtype=np.float32)
        return rng.standard_normal(shape, dtype=np.float32) * np.float32(self.scale)
