"""The architectures that the surgery is held against: the one list of their names."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

GraphKind = Literal[
    "decoder", "encoder", "vision", "audio", "hybrid decoder", "seq2seq encoder", "seq2seq decoder"
]
Paths = dict[str, str]


@dataclass(frozen=True)
class Architecture:
    """One row of the table."""

    name: str
    graph: GraphKind
    paths: Paths = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    traced_length_only: bool = False
    refused: str = ""
    not_exported: str = ""

    @property
    def type_name(self) -> str:
        """The model type."""
        return re.split("[ ,]", self.name)[0]


def _layer(prefix: str, **parts: str) -> Paths:
    return {kind: f"{prefix}.{{}}.{part}" for kind, part in parts.items()}


def _of(graph: GraphKind, *names: str, **more: Any) -> list[Architecture]:
    """Rows that differ in their names alone."""
    return [Architecture(name, graph, **more) for name in names]


_ENCODER = _layer("model.encoder.layers", attention="self_attn", mlp="fc2")
_DECODER = _layer(
    "model.decoder.layers", attention="self_attn", cross_attention="encoder_attn", mlp="fc2"
)


def _both(*types: str, encoder: Paths = _ENCODER, decoder: Paths = _DECODER) -> list[Architecture]:
    """The encoders and the decoders of models that have both."""
    return [
        Architecture(f"{name} {side}", f"seq2seq {side}", paths)
        for name in types
        for side, paths in (("encoder", encoder), ("decoder", decoder))
    ]


def _hybrid(name: str, paths: Paths, *, traced: bool = False, **settings: Any) -> Architecture:
    return Architecture(name, "hybrid decoder", paths, settings, traced_length_only=traced)


_VIT = _layer("layers", attention="attention", mlp="mlp")
_CLIP = _layer("encoder.layers", attention="self_attn", mlp="mlp")
_BERT_LIKE = _layer("encoder.layer", attention="attention.output.dense", mlp="output.dense")
_MPNET = _BERT_LIKE | _layer("encoder.layer", attention="attention.attn")
_SPEECH = _layer("encoder.layers", attention="attention", mlp="feed_forward")
_LLAMA = _layer("model.layers", attention="self_attn", mlp="mlp|block_sparse_moe|feed_forward")
_MAMBA = _layer("model.layers", attention="self_attn", mixer="mamba", mlp="feed_forward")
_MIXER = _layer("backbone.layers", mixer="mixer")
_T5 = _layer("encoder.block", attention="layer.0.SelfAttention", mlp="layer.1.DenseReluDense")
_T5_DECODER = _layer(
    "decoder.block",
    attention="layer.0.SelfAttention",
    cross_attention="layer.1.EncDecAttention",
    mlp="layer.2.DenseReluDense",
)
_ALBERT = "encoder.albert_layer_groups.0.albert_layers.0"
_MIDDLE: Any = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
_MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 4}
_WINDOW = {"sliding_window": 4, "use_sliding_window": True}
_BEIT = {"layer_scale_init_value": 0.5, "use_relative_position_bias": True}
_SWIN: Any = {
    "image_size": 32, "patch_size": 4, "window_size": 2, "embed_dim": 32, "depths": [2, 1],
    "num_heads": [4, 4],
}  # fmt: skip
_QWEN3_NEXT = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}  # fmt: skip
_ZAMBA2: Any = {
    "layers_block_type": ["linear_attention", "hybrid", "linear_attention"],
    "n_mamba_heads": 4, "mamba_d_state": 8, "chunk_size": 4,
}  # fmt: skip
_GEMMA3N = {
    "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8, "laurel_rank": 8,
    "vocab_size_per_layer_input": 64,
}  # fmt: skip

CATALOGUE: tuple[Architecture, ...] = (
    *_of("decoder", "llama", "qwen2", "qwen3", "gemma", "gpt2", "opt", "bloom", "stablelm"),
    *_of("decoder", "starcoder2", "smollm3", "nemotron", "olmo", "gpt_neo", "gpt_bigcode", "glm"),
    *_of("decoder", "helium", "arcee", "seed_oss"),
    *_of("decoder", "mistral", "phi3", settings=_WINDOW),
    *_of("decoder", "mpt", not_exported="inconsistencies"),
    *_of("decoder", "persimmon", "ernie4_5", "apertus", paths=_LLAMA),
    *_of("decoder", "biogpt", paths=_layer("biogpt.layers", attention="self_attn", mlp="fc2")),
    *_of("decoder", "xglm", paths=_layer("model.layers", attention="self_attn", mlp="fc2")),
    # Mixtures of experts, some with shared ones beside.
    *_of("decoder", "mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v3", "olmoe"),
    *_of("decoder", "glm4_moe", "phimoe", paths=_LLAMA),
    # Branches that are multiplied, or have a norm on both sides.
    *_of("decoder", "granite", "granitemoe", "olmo2", "glm4"),
    *_of("decoder", "gemma2", "gemma3_text", "olmo3", "exaone4", settings=_WINDOW),
    # Attention and MLP beside one another.
    *_of("decoder", "gpt_neox", "gptj", "codegen", "phi", "falcon", "cohere", "cohere2"),
    *_of("decoder", "opt, post-norm", settings={"do_layer_norm_before": False}),
    *_of("encoder", "bert", "roberta", "electra", "distilbert", "xlm-roberta"),
    *_of("encoder", "deberta-v2", paths=_BERT_LIKE),
    *_of("encoder", "mpnet", paths=_MPNET),
    *_of(
        "encoder",
        "albert",
        paths={"attention": f"{_ALBERT}.attention.dense", "mlp": f"{_ALBERT}.ffn_output"},
    ),
    *_of("encoder", "modernbert"),
    *_of("encoder", "eurobert", paths=_layer("layers", attention="self_attn", mlp="mlp")),
    *_of("encoder", "esm", paths=_BERT_LIKE),
    *_of("encoder", "clip_text_model", paths=_CLIP),
    *_of("vision", "vit"),
    *_of("vision", "deit", paths=_VIT),
    *_of("vision", "beit", paths=_VIT, settings=_BEIT),
    *_of("vision", "dinov2", paths=_layer("encoder.layer", attention="attention", mlp="mlp")),
    *_of("vision", "siglip_vision_model", "clip_vision_model", paths=_CLIP),
    *_of(
        "vision",
        "swin",
        paths=_layer("encoder.layers.{}.blocks", attention="attention", mlp="mlp"),
        settings=_SWIN,
    ),
    *_of("audio", "wav2vec2", "hubert", "wavlm", paths=_SPEECH),
    *_of("audio", "audio-spectrogram-transformer", paths=_VIT),
    *_both("bart", "mbart", "pegasus", "m2m_100", "marian", "blenderbot", "whisper"),
    *_both("t5", encoder=_T5, decoder=_T5_DECODER),
    _hybrid(
        "lfm2",
        _layer("model.layers", attention="self_attn", mixer="conv", mlp="feed_forward"),
        layer_types=["conv", "full_attention", "conv"],
    ),
    _hybrid("mamba", _MIXER),
    _hybrid(
        "mamba2", _MIXER, traced=True,
        num_heads=8, head_dim=8, n_groups=2, state_size=8, chunk_size=4,
    ),
    _hybrid("jamba", _MAMBA, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8),
    _hybrid(
        "granitemoehybrid",
        _MAMBA | _layer("model.layers", mlp="shared_mlp&block_sparse_moe"),
        traced=True,
        **_MIDDLE,
        **_MAMBA2,
    ),
    _hybrid("bamba", _MAMBA, traced=True, attn_layer_indices=[1], **_MAMBA2),
    _hybrid("falcon_h1", _MAMBA, traced=True, mamba_d_ssm=64, **_MAMBA2),
    _hybrid(
        "qwen3_next",
        _layer("model.layers", attention="self_attn", mixer="linear_attn", mlp="mlp"),
        **_MIDDLE,
        **_QWEN3_NEXT,
    ),
    # A hybrid layer's attention joins the stream through its mixer, as one branch.
    _hybrid(
        "zamba2",
        _layer("model.layers", attention="mamba_decoder.mamba", mixer="mamba"),
        traced=True,
        **_ZAMBA2,
    ),
    *_of("decoder", "gemma3n_text", settings=_GEMMA3N, refused="several residual streams"),
)  # fmt: skip
