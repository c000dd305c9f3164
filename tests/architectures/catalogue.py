"""The architectures that the surgery is held against: the one list of their names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

GraphKind = Literal[
    "decoder", "encoder", "vision", "audio", "hybrid decoder", "seq2seq encoder", "seq2seq decoder"
]
Form = Literal[
    "pre-norm", "sandwich", "multiplier", "parallel", "post-norm", "hybrid", "several streams"
]
Paths = dict[str, str]


@dataclass(frozen=True)
class Architecture:
    """One row of the table."""

    name: str
    graph: GraphKind
    form: Form
    model_class: str = ""
    model_type: str = ""
    paths: Paths = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    traced_length_only: bool = False
    refused: str = ""
    not_exported: str = ""

    @property
    def type_name(self) -> str:
        """The model type."""
        return self.model_type or self.name


def _layer(prefix: str, **parts: str) -> Paths:
    return {kind: f"{prefix}.{{}}.{part}" for kind, part in parts.items()}


def _encoder(prefix: str = "model.encoder.layers") -> Paths:
    return _layer(prefix, attention="self_attn", mlp="fc2")


def _decoder(prefix: str = "model.decoder.layers") -> Paths:
    return _layer(prefix, attention="self_attn", cross_attention="encoder_attn", mlp="fc2")


def _of(graph: GraphKind, form: Form, *names: str) -> list[Architecture]:
    return [Architecture(name, graph, form) for name in names]


def _both(model_type: str, model_class: str, form: Form, **settings: Any) -> list[Architecture]:
    """The encoder and the decoder of a model of BART's make."""
    return [
        Architecture(
            f"{model_type} encoder", "seq2seq encoder", form, model_class, model_type,
            _encoder(), settings,
        ),
        Architecture(
            f"{model_type} decoder", "seq2seq decoder", form, model_class, model_type,
            _decoder(), settings,
        ),
    ]  # fmt: skip


_VIT = _layer("layers", attention="attention", mlp="mlp")
_CLIP = _layer("encoder.layers", attention="self_attn", mlp="mlp")
_BERT_LIKE = _layer("encoder.layer", attention="attention.output.dense", mlp="output.dense")
_SPEECH = _layer("encoder.layers", attention="attention", mlp="feed_forward")
_LLAMA = _layer("model.layers", attention="self_attn", mlp="mlp|block_sparse_moe|feed_forward")
_T5 = "{}.block.{{}}.layer.{}"
_HYBRID = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
_MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 4}
_WINDOW = {"sliding_window": 4, "use_sliding_window": True}

CATALOGUE: tuple[Architecture, ...] = (
    *_of("decoder", "pre-norm", "llama", "qwen2", "qwen3", "gemma", "gpt2", "opt", "bloom"),
    *_of("decoder", "pre-norm", "stablelm", "starcoder2", "smollm3", "nemotron", "olmo"),
    *_of("decoder", "pre-norm", "gpt_neo", "gpt_bigcode", "glm", "helium", "arcee", "seed_oss"),
    Architecture("mistral", "decoder", "pre-norm", settings=_WINDOW),
    Architecture("phi3", "decoder", "pre-norm", settings=_WINDOW),
    Architecture("mpt", "decoder", "pre-norm", not_exported="inconsistencies"),
    Architecture("persimmon", "decoder", "pre-norm", paths=_LLAMA),
    Architecture("ernie4_5", "decoder", "pre-norm", paths=_LLAMA),
    Architecture("apertus", "decoder", "pre-norm", paths=_LLAMA),
    Architecture(
        "biogpt",
        "decoder",
        "pre-norm",
        paths=_layer("biogpt.layers", attention="self_attn", mlp="fc2"),
    ),
    Architecture(
        "xglm",
        "decoder",
        "pre-norm",
        paths=_layer("model.layers", attention="self_attn", mlp="fc2"),
    ),
    # Mixtures of experts, some with shared ones beside.
    *_of("decoder", "pre-norm", "mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v3"),
    *_of("decoder", "pre-norm", "olmoe"),
    Architecture("glm4_moe", "decoder", "pre-norm", paths=_LLAMA),
    Architecture("phimoe", "decoder", "pre-norm", paths=_LLAMA),
    *_of("decoder", "multiplier", "granite", "granitemoe"),
    *_of("decoder", "sandwich", "olmo2", "glm4"),
    Architecture("gemma2", "decoder", "sandwich", settings=_WINDOW),
    Architecture("gemma3_text", "decoder", "sandwich", settings=_WINDOW),
    Architecture("olmo3", "decoder", "sandwich", settings=_WINDOW),
    Architecture("exaone4", "decoder", "sandwich", settings=_WINDOW),
    *_of(
        "decoder", "parallel", "gpt_neox", "gptj", "codegen", "phi", "falcon", "cohere", "cohere2"
    ),
    Architecture(
        "opt, post-norm",
        "decoder",
        "post-norm",
        model_type="opt",
        settings={"do_layer_norm_before": False},
    ),
    *_of("encoder", "post-norm", "bert", "roberta", "electra", "distilbert", "xlm-roberta"),
    Architecture("deberta-v2", "encoder", "post-norm", paths=_BERT_LIKE),
    Architecture(
        "mpnet",
        "encoder",
        "post-norm",
        paths=_layer("encoder.layer", attention="attention.attn", mlp="output.dense"),
    ),
    Architecture(
        "albert",
        "encoder",
        "post-norm",
        paths={
            "attention": "encoder.albert_layer_groups.0.albert_layers.0.attention.dense",
            "mlp": "encoder.albert_layer_groups.0.albert_layers.0.ffn_output",
        },
    ),
    *_of("encoder", "pre-norm", "modernbert"),
    Architecture(
        "eurobert", "encoder", "pre-norm", paths=_layer("layers", attention="self_attn", mlp="mlp")
    ),
    Architecture(
        "esm",
        "encoder",
        "pre-norm",
        paths=_layer("encoder.layer", attention="attention.output.dense", mlp="output.dense"),
        settings={
            "emb_layer_norm_before": False,
            "position_embedding_type": "rotary",
            "mask_token_id": 5,
        },
    ),
    Architecture("clip_text_model", "encoder", "pre-norm", paths=_CLIP),
    *_of("vision", "pre-norm", "vit"),
    Architecture("deit", "vision", "pre-norm", paths=_VIT),
    Architecture(
        "beit",
        "vision",
        "multiplier",
        paths=_VIT,
        settings={"layer_scale_init_value": 0.5, "use_relative_position_bias": True},
    ),
    Architecture(
        "dinov2",
        "vision",
        "multiplier",
        paths=_layer("encoder.layer", attention="attention", mlp="mlp"),
    ),
    Architecture("siglip_vision_model", "vision", "pre-norm", paths=_CLIP),
    Architecture("clip_vision_model", "vision", "pre-norm", paths=_CLIP),
    Architecture(
        "swin",
        "vision",
        "pre-norm",
        paths=_layer("encoder.layers.{}.blocks", attention="attention", mlp="mlp"),
        settings={
            "image_size": 32,
            "patch_size": 4,
            "window_size": 2,
            "embed_dim": 32,
            "depths": [2, 1],
            "num_heads": [4, 4],
        },
    ),
    Architecture("wav2vec2", "audio", "post-norm", paths=_SPEECH),
    Architecture("hubert", "audio", "post-norm", paths=_SPEECH),
    Architecture("wavlm", "audio", "post-norm", paths=_SPEECH),
    Architecture("audio-spectrogram-transformer", "audio", "pre-norm", paths=_VIT),
    *_both("bart", "BartForConditionalGeneration", "post-norm"),
    *_both("mbart", "MBartForConditionalGeneration", "pre-norm"),
    *_both("pegasus", "PegasusForConditionalGeneration", "pre-norm"),
    *_both("m2m_100", "M2M100ForConditionalGeneration", "pre-norm"),
    *_both("marian", "MarianMTModel", "post-norm"),
    *_both("blenderbot", "BlenderbotForConditionalGeneration", "pre-norm"),
    *_both("whisper", "WhisperForConditionalGeneration", "pre-norm"),
    Architecture(
        "t5 encoder",
        "seq2seq encoder",
        "pre-norm",
        "T5ForConditionalGeneration",
        "t5",
        {
            "attention": _T5.format("encoder", "0.SelfAttention"),
            "mlp": _T5.format("encoder", "1.DenseReluDense"),
        },
    ),
    Architecture(
        "t5 decoder",
        "seq2seq decoder",
        "pre-norm",
        "T5ForConditionalGeneration",
        "t5",
        {
            "attention": _T5.format("decoder", "0.SelfAttention"),
            "cross_attention": _T5.format("decoder", "1.EncDecAttention"),
            "mlp": _T5.format("decoder", "2.DenseReluDense"),
        },
    ),
    Architecture(
        "lfm2",
        "hybrid decoder",
        "hybrid",
        paths=_layer("model.layers", attention="self_attn", mixer="conv", mlp="feed_forward"),
        settings={"layer_types": ["conv", "full_attention", "conv"]},
    ),
    Architecture(
        "mamba", "hybrid decoder", "hybrid", paths=_layer("backbone.layers", mixer="mixer")
    ),
    Architecture(
        "mamba2",
        "hybrid decoder",
        "hybrid",
        traced_length_only=True,
        paths=_layer("backbone.layers", mixer="mixer"),
        settings={"num_heads": 8, "head_dim": 8, "n_groups": 2, "state_size": 8, "chunk_size": 4},
    ),
    Architecture(
        "jamba",
        "hybrid decoder",
        "hybrid",
        paths=_layer("model.layers", attention="self_attn", mixer="mamba", mlp="feed_forward"),
        settings={"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8},
    ),
    Architecture(
        "granitemoehybrid",
        "hybrid decoder",
        "hybrid",
        traced_length_only=True,
        paths=_layer(
            "model.layers", attention="self_attn", mixer="mamba", mlp="shared_mlp&block_sparse_moe"
        ),
        settings=_HYBRID | _MAMBA2,
    ),
    Architecture(
        "bamba",
        "hybrid decoder",
        "hybrid",
        traced_length_only=True,
        paths=_layer("model.layers", attention="self_attn", mixer="mamba", mlp="feed_forward"),
        settings={"attn_layer_indices": [1]} | _MAMBA2,
    ),
    Architecture(
        "falcon_h1",
        "hybrid decoder",
        "hybrid",
        traced_length_only=True,
        paths=_layer("model.layers", attention="self_attn", mixer="mamba", mlp="feed_forward"),
        settings=_MAMBA2 | {"mamba_d_ssm": 64},
    ),
    Architecture(
        "qwen3_next",
        "hybrid decoder",
        "hybrid",
        paths=_layer("model.layers", attention="self_attn", mixer="linear_attn", mlp="mlp"),
        settings=_HYBRID
        | {
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
    Architecture(
        "zamba2",
        "hybrid decoder",
        "hybrid",
        traced_length_only=True,
        # A hybrid layer's attention joins the stream through its mixer, as one branch.
        paths=_layer("model.layers", attention="mamba_decoder.mamba", mixer="mamba"),
        settings={
            "layers_block_type": ["linear_attention", "hybrid", "linear_attention"],
            "n_mamba_heads": 4,
            "mamba_d_state": 8,
            "chunk_size": 4,
        },
    ),
    Architecture(
        "gemma3n_text",
        "decoder",
        "several streams",
        settings={
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 8,
            "vocab_size_per_layer_input": 64,
        },
        refused="several residual streams",
    ),
)
