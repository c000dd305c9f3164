"""Where each model family keeps the modules that write to the residual stream: a row a family."""

from __future__ import annotations

from dataclasses import dataclass


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
_POST_NORMS = ("attention.output.LayerNorm", "output.LayerNorm")

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
_GRANITE = Family("layers", "self_attn", "mlp|block_sparse_moe", multiplier="residual_multiplier")
_GPT2 = Family("h", "attn", "mlp")
_GPTJ = Family("h", "attn", "mlp", parallel_if=_ALWAYS)
_COHERE = Family("layers", "self_attn", "mlp", parallel_if=_ALWAYS)
_FC2 = Family("layers", "self_attn", "fc2", mlp_reads="fc1")
_BERT = Family(
    "encoder.layer",
    "attention.output.dense",
    "output.dense",
    *_POST_NORMS,
    attention_reads="attention",
    mlp_reads="intermediate",
)

_VIT = Family(
    "layers|encoder.layer",
    "attention.output.dense|attention",
    "mlp|output.dense",
    attention_reads="attention",
    mlp_reads="mlp|intermediate",
)

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "ministral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen2_moe": _LLAMA,
    "qwen3": _LLAMA,
    "qwen3_moe": _LLAMA,
    "gemma": _LLAMA,
    "phi3": _LLAMA,
    "smollm3": _LLAMA,
    "starcoder2": _LLAMA,
    "nemotron": _LLAMA,
    "olmo": _LLAMA,
    "olmoe": _LLAMA,
    "mixtral": _LLAMA,
    "deepseek_v3": _LLAMA,
    "gpt_oss": _LLAMA,
    "glm": _LLAMA,
    "helium": _LLAMA,
    "seed_oss": _LLAMA,
    "arcee": _LLAMA,
    "persimmon": _LLAMA,
    "ernie4_5": _LLAMA,
    "apertus": _LLAMA,
    "glm4_moe": _LLAMA,
    "phimoe": _LLAMA,
    "eurobert": _LLAMA,
    "biogpt": _FC2,
    "xglm": _FC2,
    "stablelm": Family("layers", "self_attn", "mlp", parallel_if=("use_parallel_residual",)),
    "granite": _GRANITE,
    "granitemoe": _GRANITE,
    "gemma2": _SANDWICH,
    "gemma3_text": _SANDWICH,
    "olmo2": _SANDWICH,
    "olmo3": _SANDWICH,
    "exaone4": _SANDWICH,
    "glm4": Family(
        "layers",
        "post_self_attn_layernorm",
        "post_mlp_layernorm",
        attention_reads="self_attn",
        mlp_reads="mlp",
    ),
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "gpt_neo": _GPT2,
    "gptj": _GPTJ,
    "codegen": _GPTJ,
    "gpt_neox": Family("layers", "attention", "mlp", parallel_if=("use_parallel_residual",)),
    "phi": Family("layers", "self_attn", "mlp", parallel_if=_ALWAYS),
    "cohere": _COHERE,
    "cohere2": _COHERE,
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
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "camembert": _BERT,
    "deberta-v2": _BERT,
    "mpnet": Family(
        "encoder.layer",
        "attention.attn",
        "output.dense",
        "attention.LayerNorm",
        "output.LayerNorm",
        mlp_reads="intermediate",
    ),
    "esm": Family(
        "encoder.layer",
        "attention.output.dense",
        "output.dense",
        attention_reads="attention.self",
        mlp_reads="intermediate",
    ),
    "electra": _BERT,
    "distilbert": Family(
        "transformer.layer", "attention", "ffn", "sa_layer_norm", "output_layer_norm"
    ),
    "modernbert": Family("layers", "attn", "mlp"),
    "vit": _VIT,
    "deit": _VIT,
    "dinov2": Family(
        "layers|encoder.layer",
        "layer_scale1",
        "layer_scale2",
        attention_reads="attention",
        mlp_reads="mlp",
    ),
}

_BART_NORMS = ("self_attn_layer_norm", "final_layer_norm")
# BART's make, with the norms before the branches.
_PRE_NORM_STACKS = (
    Family("encoder.layers", "self_attn", "fc2", mlp_reads="fc1"),
    Family("decoder.layers", "self_attn", "fc2", mlp_reads="fc1", cross_attention="encoder_attn"),
)
_POST_NORM_STACKS = (
    Family("encoder.layers", "self_attn", "fc2", *_BART_NORMS, mlp_reads="fc1"),
    Family(
        "decoder.layers",
        "self_attn",
        "fc2",
        *_BART_NORMS,
        mlp_reads="fc1",
        cross_attention="encoder_attn",
        cross_attention_norm="encoder_attn_layer_norm",
    ),
)

STACKS: dict[str, tuple[Family, Family]] = {
    "bart": _POST_NORM_STACKS,
    "marian": _POST_NORM_STACKS,
    "mbart": _PRE_NORM_STACKS,
    "pegasus": _PRE_NORM_STACKS,
    "m2m_100": _PRE_NORM_STACKS,
    "blenderbot": _PRE_NORM_STACKS,
    "whisper": _PRE_NORM_STACKS,
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
