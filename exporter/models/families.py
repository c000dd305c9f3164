"""Where each model family keeps the modules that write to the residual stream: a row a family."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Family:
    """One row: dotted paths, alternatives between versions of transformers parted by ``|``."""

    layers: str
    attention: str
    mlp: str
    attention_norm: str = ""
    mlp_norm: str = ""
    parallel_if: tuple[str, ...] = ()
    post_norm_unless: str = ""
    multiplier: str = ""
    attention_reads: str = ""
    mlp_reads: str = ""
    cross_attention: str = ""
    cross_attention_norm: str = ""


_ALWAYS = ("always",)

# Sequential pre-norm, x + f(norm(x)), as Llama has it; mixtures of experts among them.
_LLAMA = Family("layers", "self_attn", "mlp|block_sparse_moe")
# x + norm(f(norm(x))) or x + norm(f(x)): the norm after the sublayer belongs to the branch.
_SANDWICH = Family(
    "layers|model.layers",
    "post_attention_layernorm",
    "post_feedforward_layernorm",
    attention_reads="self_attn",
    mlp_reads="mlp",
)
_BERT = Family(
    "encoder.layer",
    "attention.output.dense",
    "output.dense",
    "attention.output.LayerNorm",
    "output.LayerNorm",
    attention_reads="attention",
    mlp_reads="intermediate",
)

_TYPES: dict[str, Family] = {
    "llama mistral ministral qwen2 qwen2_moe qwen3 qwen3_moe gemma phi3 smollm3 starcoder2 "
    "nemotron olmo olmoe mixtral deepseek_v3 gpt_oss glm helium seed_oss arcee persimmon "
    "ernie4_5 apertus glm4_moe phimoe eurobert": _LLAMA,
    "biogpt xglm": Family("layers", "self_attn", "fc2", mlp_reads="fc1"),
    "stablelm": Family("layers", "self_attn", "mlp", parallel_if=("use_parallel_residual",)),
    "granite granitemoe": replace(_LLAMA, multiplier="residual_multiplier"),
    "gemma2 gemma3_text olmo2 olmo3 exaone4": _SANDWICH,
    "glm4": replace(
        _SANDWICH,
        layers="layers",
        attention="post_self_attn_layernorm",
        mlp="post_mlp_layernorm",
    ),
    "gpt2 gpt_bigcode gpt_neo": Family("h", "attn", "mlp"),
    "gptj codegen": Family("h", "attn", "mlp", parallel_if=_ALWAYS),
    "gpt_neox": Family("layers", "attention", "mlp", parallel_if=("use_parallel_residual",)),
    "phi cohere cohere2": Family("layers", "self_attn", "mlp", parallel_if=_ALWAYS),
    "falcon": Family(
        "h", "self_attention", "mlp", parallel_if=("parallel_attn", "new_decoder_architecture")
    ),
    "bloom": Family(
        "h",
        "self_attention.dense",
        "mlp.dense_4h_to_h",
        attention_reads="self_attention",
        mlp_reads="mlp",
    ),
    "mpt": Family("blocks", "attn", "ffn.down_proj", mlp_reads="ffn"),
    "opt": Family(
        "decoder.layers",
        "self_attn",
        "fc2",
        "self_attn_layer_norm",
        "final_layer_norm",
        post_norm_unless="do_layer_norm_before",
        mlp_reads="fc1",
    ),
    "bert roberta xlm-roberta camembert deberta-v2 electra": _BERT,
    "mpnet": replace(
        _BERT,
        attention="attention.attn",
        attention_norm="attention.LayerNorm",
        attention_reads="",
    ),
    "esm": replace(_BERT, attention_norm="", mlp_norm="", attention_reads="attention.self"),
    "distilbert": Family(
        "transformer.layer", "attention", "ffn", "sa_layer_norm", "output_layer_norm"
    ),
    "modernbert": Family("layers", "attn", "mlp"),
    "vit deit": Family(
        "layers|encoder.layer",
        "attention.output.dense|attention",
        "mlp|output.dense",
        attention_reads="attention",
        mlp_reads="mlp|intermediate",
    ),
    "dinov2": Family(
        "layers|encoder.layer",
        "layer_scale1",
        "layer_scale2",
        attention_reads="attention",
        mlp_reads="mlp",
    ),
}
FAMILIES = {name: family for names, family in _TYPES.items() for name in names.split()}

# BART's make, with the norms before the branches.
_PRE_NORM = Family("encoder.layers", "self_attn", "fc2", mlp_reads="fc1")
_PRE_NORM_STACKS = (
    _PRE_NORM,
    replace(_PRE_NORM, layers="decoder.layers", cross_attention="encoder_attn"),
)
_POST_NORM = replace(_PRE_NORM, attention_norm="self_attn_layer_norm", mlp_norm="final_layer_norm")
_POST_NORM_STACKS = (
    _POST_NORM,
    replace(
        _POST_NORM,
        layers="decoder.layers",
        cross_attention="encoder_attn",
        cross_attention_norm="encoder_attn_layer_norm",
    ),
)

STACKS: dict[str, tuple[Family, Family]] = {
    **dict.fromkeys(("bart", "marian"), _POST_NORM_STACKS),
    **dict.fromkeys(("mbart", "pegasus", "m2m_100", "blenderbot", "whisper"), _PRE_NORM_STACKS),
    "t5": (
        Family("encoder.block", "layer.0.SelfAttention", "layer.1.DenseReluDense"),
        Family(
            "decoder.block",
            "layer.0.SelfAttention",
            "layer.2.DenseReluDense",
            cross_attention="layer.1.EncDecAttention",
        ),
    ),
}
"""Encoder-decoders: the encoder's row and the decoder's."""

GENERATING = ("ForConditionalGeneration", "MTModel")  # Marian's class has the latter
"""How the names of classes of encoder-decoders end that answer with a text."""

REVIEWED = frozenset(FAMILIES) | {
    "albert", "audio-spectrogram-transformer", "bamba", "bart", "beit", "blenderbot",
    "clip_text_model", "clip_vision_model", "falcon_h1", "gemma3n_text", "granitemoehybrid",
    "hubert", "jamba", "lfm2", "m2m_100", "mamba", "mamba2", "marian", "mbart", "pegasus",
    "qwen3_next", "siglip_vision_model", "swin", "t5", "wav2vec2", "wavlm", "whisper", "zamba2",
}  # fmt: skip
"""The model types that are loaded without being asked for, by their names in ``config.json``."""
