"""Random PyTorch models of a few thousand weights, as the loader would give them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SMALL = {
    "vocab_size": 128,
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
DECODER = {**SMALL, "num_key_value_heads": 2}
# GPT-2 and bloom have names of their own.
GPT2 = {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
BLOOM = {"vocab_size": 128, "hidden_size": 64, "n_layer": 2, "n_head": 4}
T5 = {"vocab_size": 128, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}

FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", DECODER),
    "llama_tied": ("LlamaConfig", "LlamaForCausalLM", DECODER | {"tie_word_embeddings": True}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", DECODER | {"head_dim": 24}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", GPT2),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", SMALL),
    "bloom": ("BloomConfig", "BloomForCausalLM", BLOOM),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", DECODER | {"num_local_experts": 4}),
    "bert": ("BertConfig", "BertModel", SMALL),
    "t5": ("T5Config", "T5ForConditionalGeneration", T5),
    "mamba": ("MambaConfig", "MambaForCausalLM", {"vocab_size": 128, "hidden_size": 32}),
}


def tiny_loaded(family: str, *, dtype: str = "float32", seed: int = 0, **changes: Any) -> Any:
    """A ``LoadedModel`` with random weights and no tokenizer; ``changes`` go into the config."""
    import torch
    import transformers

    from exporter.artifacts import ModelRef
    from exporter.models.loading.model_source import LoadedModel

    config_name, model_name, settings = FAMILIES[family]
    config = getattr(transformers, config_name)(**settings | changes)
    torch.manual_seed(seed)
    model = getattr(transformers, model_name)(config).to(getattr(torch, dtype)).eval()
    model.requires_grad_(False)
    layers = getattr(config, "num_hidden_layers", 0)
    ref = ModelRef(source=family, architecture=model_name, num_layers=layers, sha256="0" * 64)
    return LoadedModel(model, None, ref, Path(family))
