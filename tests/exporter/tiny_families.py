"""Random models of every family in the table, a few thousand weights each."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

# What any config may be asked for; each takes the entries that it knows.
_SIZES: dict[str, Any] = {
    "vocab_size": 64, "num_hidden_layers": 3, "n_layer": 3, "n_layers": 3, "num_layers": 3,
    "hidden_size": 32, "n_embd": 32, "d_model": 32, "dim": 32, "word_embed_proj_dim": 32,
    "embedding_size": 32, "intermediate_size": 48, "ffn_dim": 48, "hidden_dim": 48,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "rotary_dim": 4, "max_position_embeddings": 64, "n_positions": 64, "n_ctx": 64,
    "max_seq_len": 64, "sliding_window": 16, "image_size": 16, "patch_size": 8,
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 24, "residual_multiplier": 0.3,
    "encoder_layers": 3, "decoder_layers": 3, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_decoder_layers": 3,
    "d_ff": 48, "d_kv": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_SPECIAL: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]]},
    "deepseek_v3": {
        "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "kv_lora_rank": 8,
        "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
        "first_k_dense_replace": 1, "num_key_value_heads": 4,
    },
    "mpt": {"hidden_size": None},
    "esm": {
        "emb_layer_norm_before": False, "position_embedding_type": "rotary", "mask_token_id": 5,
    },
    "swin": {"hidden_size": None, "num_layers": None, "num_attention_heads": None},
}  # fmt: skip
_ENCODERS = {"bert", "roberta", "electra", "camembert", "xlm-roberta", "esm", "mpnet"}


def tiny_model(model_type: str, *, head: str = "", **changes: Any) -> Any:
    """A model in eval mode, its weights large enough that every branch counts."""
    import torch
    import transformers

    config = tiny_config(model_type, **changes)
    generates = type(config) in transformers.AutoModelForCausalLM._model_mapping
    auto = transformers.AutoModel
    if generates and model_type not in _ENCODERS:
        auto = transformers.AutoModelForCausalLM
    if head:
        auto = getattr(transformers, f"AutoModelFor{head}")
    torch.manual_seed(0)
    model = auto.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def tiny_loaded(model_type: str, tokenizer: Any = None, **changes: Any) -> Any:
    """The same as the loader would give it."""
    from pathlib import Path

    from exporter.artifacts import ModelRef
    from exporter.models.loading.model_source import LoadedModel

    model = tiny_model(model_type, **changes)
    ref = ModelRef(
        source=model_type,
        architecture=type(model).__name__,
        num_layers=model.config.get_text_config().num_hidden_layers,
        sha256="0" * 64,
    )
    return LoadedModel(model, tokenizer, ref, Path(model_type))


def tiny_tokenizer(*, special_ends: bool = False) -> Any:
    """A tokenizer of 64 words, ``w0`` to ``w59`` behind four special ones."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "<s>", "</s>", "<unk>"]
    words = {name: n for n, name in enumerate(specials + [f"w{n}" for n in range(60)])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if special_ends:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>",
    )  # fmt: skip


@contextlib.contextmanager
def skipped(model: Any, deletions: Iterable[Any]) -> Iterator[None]:
    """Makes the named branches contribute nothing while the block runs: what deleting means."""
    from exporter.models.architectures import named_sublayers, sublayers
    from exporter.models.residual_stream import silenced

    modules = {part.ref: part.contribution for part in sublayers(model)}
    with silenced([modules[name] for name in named_sublayers(deletions, len(modules) // 2)]):
        yield


def hook_count(model: Any) -> int:
    """How many hooks hang on a model."""
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )


def tiny_config(model_type: str, **changes: Any) -> Any:
    """A config of the usual sizes."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    names = set(vars(kind())) | set(kind.attribute_map.values())
    sizes = {name: value for name, value in _SIZES.items() if name in names}
    special = _SPECIAL.get(model_type, {})
    sizes |= {"layer_types": None} if vars(kind()).get("layer_types") else {}
    if model_type == "deepseek_v3":
        sizes.pop("head_dim", None)
    wanted = sizes | special | changes
    derived = {name for name, value in special.items() if value is None}
    return kind(**{name: value for name, value in wanted.items() if name not in derived})
