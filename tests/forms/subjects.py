"""The architectures on which fusers are tried: tiny, random, heads of a usual size."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

HEADS, SIZE, POSITIONS = 4, 64, 128
# A vocabulary as wide as no other layer: the builder would take that for the head.
_SIZES: dict[str, Any] = {
    "vocab_size": 130, "num_hidden_layers": 2, "hidden_size": HEADS * SIZE,
    "num_attention_heads": HEADS, "intermediate_size": 96, "max_position_embeddings": POSITIONS,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.1,
}  # fmt: skip
_GROUPED = {"num_key_value_heads": 2}
_WINDOW = _GROUPED | {"head_dim": SIZE, "sliding_window": 8}
_GPT2 = {"n_embd": HEADS * SIZE, "n_layer": 2, "n_head": HEADS, "n_positions": POSITIONS}
_OPT = {"ffn_dim": 96, "word_embed_proj_dim": HEADS * SIZE}
_DISTILBERT = {"dim": HEADS * SIZE, "n_layers": 2, "n_heads": HEADS, "hidden_dim": 96}
_GRANITE = {"residual_multiplier": 0.3, "embedding_multiplier": 3.0, "logits_scaling": 2.0}


@dataclass(frozen=True)
class Subject:
    """A model to write."""

    name: str
    prefix: str
    kind: Literal["decoder", "encoder"] = "decoder"
    settings: dict[str, Any] = field(default_factory=dict)
    config_prefix: str = ""
    refused: str = ""

    def loaded(self) -> Any:
        """The model as the loader gives it, its norms and biases off their usual 1 and 0."""
        import torch
        import transformers

        from exporter.artifacts import ModelRef
        from exporter.models.loading.model_source import LoadedModel

        config = getattr(transformers, f"{self.config_prefix or self.prefix}Config")(
            **_SIZES | self.settings
        )
        classes = ("ForCausalLM", "LMHeadModel") if self.kind == "decoder" else ("Model",)
        names = [self.prefix + suffix for suffix in classes]
        kind = next(filter(None, (getattr(transformers, name, None) for name in names)))
        torch.manual_seed(0)
        model = kind(config).eval().requires_grad_(False)
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.add_(torch.randn_like(weight) * 0.1)
        ref = ModelRef(source=self.name, architecture=kind.__name__, num_layers=2, sha256="0" * 64)
        return LoadedModel(model, None, ref, Path(self.name))


SUBJECTS = (
    Subject("llama", "Llama", settings=_GROUPED),
    Subject("mistral", "Mistral", settings=_WINDOW),
    Subject("qwen2", "Qwen2", settings=_GROUPED),
    Subject("qwen3", "Qwen3", settings=_GROUPED | {"head_dim": SIZE}),
    Subject("gemma2", "Gemma2", settings=_WINDOW),
    Subject("gemma3_text", "Gemma3", settings=_WINDOW, config_prefix="Gemma3Text"),
    Subject("phi3", "Phi3", settings=_GROUPED),
    Subject("gpt2", "GPT2", settings=_GPT2),
    Subject("gpt_neox", "GPTNeoX"),
    Subject("falcon", "Falcon"),
    Subject("olmo2", "Olmo2", settings=_GROUPED),
    Subject("granite", "Granite", settings=_GROUPED | _GRANITE),
    Subject("smollm3", "SmolLM3", settings=_GROUPED | {"no_rope_layer_interval": 2}),
    Subject("opt", "OPT", settings=_OPT),
    Subject("mixtral", "Mixtral", settings=_GROUPED | {"num_local_experts": 4}),
    Subject("bloom", "Bloom", settings={"n_layer": 2, "n_head": HEADS}, refused="no attention"),
    Subject("bert", "Bert", "encoder"),
    Subject("roberta", "Roberta", "encoder", {"pad_token_id": 1}),
    Subject("distilbert", "DistilBert", "encoder", _DISTILBERT),
    Subject("modernbert", "ModernBert", "encoder", {"local_attention": 8}),
)
