"""What a config may say: entries that libraries act on, values of every type, odd texts."""

from __future__ import annotations

import json
import random
from typing import Any

from tests.hostile.spoilt import Spoilt, mutation, read

ACTIVE = (
    "\n::error::x",
    "\x1b]0;title\x07",
    "\x1b[2J",
    "\u202e",
    "\x9b31m",
    "##[error]",
    "\r",
    "\x00",
    "\u2028",
    "\ud800",
)
"""What terminals and CI systems act on."""
NUMBERS: list[Any] = [10**9, 2**31, 2**63, 2**64, 10**30, -1, 0, 1, 1.5, float("nan"),
float("inf"), -(10**9)]  # fmt: skip
ODD: list[Any] = [*NUMBERS, "7", "", None, [], {}, True, [1] * 50, {"a": {"b": []}}, "x" * 5000,
[[]], "1e9", *ACTIVE]  # fmt: skip
"""Values of every type."""
CONFIGS = ("config.json",) * 5 + ("generation_config.json", "tokenizer_config.json",
"preprocessor_config.json", "special_tokens_map.json", "processor_config.json",
"video_preprocessor_config.json",)  # fmt: skip
EVIL, EVIL_FILE = "../beside/evil", "../beside/secret.json"
_TYPES = (
    "rag", "encoder-decoder", "vision-encoder-decoder", "speech-encoder-decoder", "detr",
    "timm_backbone", "timm_wrapper",
    "vision-text-dual-encoder", "musicgen", "deformable_detr", "bark", "rwkv", "dab-detr",
    "layoutlmv2", "maskformer",
    "dpt", "zoedepth", "upernet", "tvp", "grounding-dino", "rt_detr", "table-transformer",
    "oneformer", "vitmatte",
    "depth_anything", "prompt_depth_anything", "speech_to_text", "esm", "xlm", "retribert",
    "transfo-xl", "mega", "nougat",
)  # fmt: skip
_BACKBONES: list[dict[str, Any]] = [
    {"backbone": "attacker/beacon"},
    {"backbone": EVIL, "backbone_kwargs": {"trust_remote_code": True}},
    {"backbone_config": {"model_type": "timm_backbone", "backbone": "attacker/beacon"}},
    {"use_timm_backbone": True, "backbone": "resnet50"},
    {"use_pretrained_backbone": True},
    {"model_type": "detr", "architectures": ["DetrModel"], "use_timm_backbone": False,
    "use_pretrained_backbone": False,
     "backbone": EVIL, "backbone_kwargs": {"trust_remote_code": True}},
]  # fmt: skip
_ENTRIES: list[dict[str, Any]] = [
    {"trust_remote_code": True},
    {"auto_map": {"AutoConfig": "attacker/code--payload.Config",
    "AutoModelForCausalLM": "attacker/code--payload.Model"}},
    {"attn_implementation": "attacker/kernel"}, {"_attn_implementation": "attacker/kernel"},
    {"attn_implementation": "kernels-community/flash-attn@main:x"},
    {"attn_implementation": {"": "attacker/kernel"}},
    {"_attn_implementation_internal": "attacker/kernel"},
    {"experts_implementation": "attacker/kernel"},
    {"_experts_implementation": "attacker/kernel"},
    {"attn_implementation": "paged|attacker/kernel"},
    {"transformers_weights": "../beside/evil/model.safetensors"},
    {"transformers_weights": "../../../etc/hostname"},
    {"transformers_weights": ["x"]}, {"configuration_files": ["config.4.0.0.json", EVIL_FILE]},
    {"gguf_file": "../beside/x.gguf"}, {"custom_generate": "attacker/generate"},
]  # fmt: skip
_NAMES: list[dict[str, Any]] = [
    {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    {"quantization_config": {"quant_method": "hqq"}},
    {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {}}},
    {"quantization_config": {"quant_method": "torchao", "quant_type": "int4"}},
    {"quantization_config": "x"},
    {"quantization_config": {"quant_method": "auto-round", "backend": "attacker/x"}},
    {"_name_or_path": "attacker/model"}, {"_name_or_path": EVIL},
    {"name_or_path": "attacker/model"},
    {"base_model_name_or_path": "attacker/model"}, {"_commit_hash": "../../x"},
    {"tokenizer_class": "attacker/x"},
    {"dtype": "__class__"}, {"torch_dtype": "float99"}, {"dtype": {"": "os"}},
    {"torch_dtype": "load"},
    {"hidden_act": "attacker/act"}, {"hidden_act": "__class__"}, {"architectures": ["RagModel"]},
    {"architectures": ["AutoModel"]}, {"architectures": ["__builtins__"]},
    {"architectures": "Llama"},
    {"kernel_config": {"RMSNorm": "attacker/kernel:RMS"}}, {"use_kernels": True},
    {"rope_scaling": {"rope_type": "longrope", "short_factor": [1], "long_factor": "x",
    "factor": 0}},
    {"rope_parameters": {"rope_type": "__init__"}}, {"rope_scaling": {"type": "dynamic",
    "factor": -1}},
    {"cache_implementation": "attacker/cache"}, {"assistant_model": "attacker/x"},
    {"pruned_heads": {"0": [0, 99]}},
    {"problem_type": "x"}, {"id2label": {str(n): str(n) for n in range(3000)}},
    {"num_labels": 10**9}, {"return_dict": False},
    {"is_decoder": True, "is_encoder_decoder": True, "add_cross_attention": True},
    {"tie_encoder_decoder": True},
    {"layer_types": ["x"] * 3}, {"layer_types": ["sliding_attention"] * 3, "sliding_window": -5},
    {"model_type": None},
    {"head_dim": 0}, {"use_bfloat16": "x"}, {"transformers_version": "99.0"},
    {"tp_plan": {"x": "colwise"}}, {"base_model_tp_plan": {"layers.*": "x"}},
    {"torchscript": True}, {"output_attentions": True}, {"use_return_dict": 1}, {"__class__": "x"},
    {"to_dict": 1}, {"num_hidden_layers_": 3},
    {"attribute_map": {"hidden_size": "x"}}, {"sub_configs": {}},
    {"keys_to_ignore_at_inference": 7}, {"has_no_defaults_at_init": True},
    {"mlp_bias": "yes"}, {"attention_bias": True}, {"eos_token_id": [1] * 9},
    {"eos_token_id": 10**12}, {"pad_token_id": -7}, {"pad_token_id": 10**9},
    {"bos_token_id": "x"}, {"max_length": 10**9}, {"temperature": -1}, {"do_sample": "x"},
    {"num_beams": 10**6}, {"constraints": [1]},
    {"forced_decoder_ids": [[1, 2]]}, {"suppress_tokens": [10**9]}, {"guidance_scale": 9},
    {"watermarking_config": {"x": 1}}, {"compile_config": {"backend": "x"}},
]  # fmt: skip


@mutation("config entries", hostile=True)
def dangerous_entry(spoilt: Spoilt, rng: random.Random) -> None:
    _merge(spoilt, rng.choice(CONFIGS), rng.choice(_ENTRIES), rng)


@mutation("config entries", hostile=True)
def backbone(spoilt: Spoilt, rng: random.Random) -> None:
    _merge(spoilt, "config.json", rng.choice(_BACKBONES), rng)


@mutation("config entries")
def odd_entry(spoilt: Spoilt, rng: random.Random) -> None:
    _merge(spoilt, rng.choice(CONFIGS), rng.choice(_NAMES), rng)


@mutation("config entries", hostile=True)
def other_type(spoilt: Spoilt, rng: random.Random) -> None:
    spoilt.change("config.json", "model_type", rng.choice(_TYPES))


@mutation("config entries")
def type_inside(spoilt: Spoilt, rng: random.Random) -> None:
    inside = {
        "model_type": rng.choice((*_TYPES, "llama", "bert")),
        "backbone": rng.choice((None, "attacker/x")),
    }
    key = rng.choice(("text_config", "vision_config", "encoder", "decoder", "audio_config",
    "backbone_config", "sub", "generator",))  # fmt: skip
    spoilt.change("config.json", key, rng.choice((inside, [inside], {"deeper": inside})))


@mutation("config entries")
def any_type(spoilt: Spoilt, rng: random.Random) -> None:
    """A type that transformers has, with this model's sizes."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    spoilt.change("config.json", "model_type", rng.choice(sorted(CONFIG_MAPPING_NAMES)))


def _merge(spoilt: Spoilt, name: str, entries: dict[str, Any], rng: random.Random) -> None:
    if rng.random() < 0.7:
        for key, value in entries.items():
            spoilt.change(name, key, value)
    else:
        key = rng.choice(("text_config", "vision_config", "x", "id2label", "rope_scaling"))
        spoilt.change(name, key, rng.choice((entries, [entries], {"y": [entries]})))


@mutation("config values")
def number(spoilt: Spoilt, rng: random.Random) -> None:
    keys = [
        key for key, value in spoilt.json("config.json").items() if isinstance(value, int | float)
    ]
    spoilt.change("config.json", rng.choice(keys or ["hidden_size"]), rng.choice(NUMBERS))


@mutation("config values")
def layers(spoilt: Spoilt, rng: random.Random) -> None:
    spoilt.change(
        "config.json",
        "num_hidden_layers",
        rng.choice((10**9, 10**5, 2**63, -3, 0, 3.5, "3", None, [3], 10**400)),
    )


@mutation("config values")
def value(spoilt: Spoilt, rng: random.Random) -> None:
    name = rng.choice(CONFIGS)
    result = spoilt.json(name) or spoilt.json("config.json")
    spoilt.change(name, rng.choice(sorted(result) or ["x"]), rng.choice(ODD))


@mutation("config values")
def several_values(spoilt: Spoilt, rng: random.Random) -> None:
    for _ in range(rng.randint(2, 6)):
        value(spoilt, rng)


@mutation("config values")
def without(spoilt: Spoilt, rng: random.Random) -> None:
    result = spoilt.json("config.json")
    key = rng.choice(sorted(result) or ["x"])
    spoilt.note(f"without {key}")
    spoilt.put_json("config.json", {k: v for k, v in result.items() if k != key})


@mutation("config values")
def huge_sizes(spoilt: Spoilt, rng: random.Random) -> None:
    for key in rng.sample(
        (
            "hidden_size",
            "vocab_size",
            "intermediate_size",
            "num_attention_heads",
            "max_position_embeddings",
            "num_key_value_heads",
            "head_dim",
            "image_size",
            "num_channels",
        ),
        2,
    ):
        spoilt.change("config.json", key, rng.choice((10**6, 10**9, 2**40)))


_TEXTS: list[bytes] = [
    b"[" * 200_000, b'{"a":' * 100_000, b"", b" ", b"null", b"7", b'"x"', b"[]", b"{}",
    b"{\"model_type\": ", b"\xff\xfe{}",
    b"\xef\xbb\xbf{}", b'{"a": "\xe9"}', b'{"a": \x00}',
    b'{"num_hidden_layers": ' + b"9" * 5000 + b"}", b"{'a': 1}", b"NaN",
    b'{"model_type": "llama"}' + b" " * (9 << 20), b'{"a": 1e999}', b'{"model_type": "\\ud800"}',
    b'{"\\u0000": "\\u001b]0;x"}',
    b'{"model_type": "llama"} trailing', b'{"a": Infinity, "b": -Infinity}', b"GGUF" + b"\x00" * 60,
    b"\x80\x04\x95c" * 9,
]  # fmt: skip


@mutation("config text")
def text(spoilt: Spoilt, rng: random.Random) -> None:
    names = [path.name for path in spoilt.files(".json")] or ["config.json"]
    name, content = rng.choice(names), rng.choice(_TEXTS)
    spoilt.note(f"{name}: {content[:30]!r}")
    spoilt.write(name, content)


@mutation("config text")
def twice(spoilt: Spoilt, rng: random.Random) -> None:
    """A key that stands there twice: readers differ in which they take."""
    first = json.dumps(spoilt.json("config.json"))
    if len(first) < 3:
        return
    entries = {**rng.choice(_ENTRIES), "model_type": rng.choice(_TYPES)}
    hostile = json.dumps(entries)[1:-1]
    spoilt.note(f"twice: {hostile[:100]}")
    spoilt.write(
        "config.json",
        f"{{{hostile}, {first[1:]}" if rng.random() < 0.5 else f"{first[:-1]}, {hostile}}}",
    )


@mutation("config text")
def not_a_number(spoilt: Spoilt, rng: random.Random) -> None:
    key = rng.choice(
        ("hidden_size", "rms_norm_eps", "layer_norm_eps", "initializer_range", "rope_theta", "new")
    )
    spoilt.change("config.json", key, rng.choice((float("nan"), float("inf"), float("-inf"))))


@mutation("config text")
def cut_off(spoilt: Spoilt, rng: random.Random) -> None:
    path = rng.choice(spoilt.files(".json") or [spoilt.folder / "config.json"])
    content = read(path)
    spoilt.note(path.name)
    spoilt.write(path.name, content[: rng.randrange(len(content) or 1)])
