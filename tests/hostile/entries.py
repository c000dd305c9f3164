"""What stands in the text files of a folder: entries that libraries act on, odd values, texts."""

from __future__ import annotations

import hashlib
import json
import os
import random
from typing import Any

from tests.hostile.place import payload
from tests.hostile.spoilt import (
    ACTIVE,
    ELSEWHERE,
    NUMBERS,
    ODD,
    Spoilt,
    contents,
    entries,
    mutation,
    odd_json,
    odd_values,
    read,
    values,
)

_CONFIG, _TOKENIZER, _FAST = ("config.json",), ("tokenizer_config.json",), "tokenizer.json"
_CONFIGS = ("config.json",) * 5 + ("generation_config.json", "tokenizer_config.json",
"preprocessor_config.json", "special_tokens_map.json", "processor_config.json",
"video_preprocessor_config.json",)  # fmt: skip
_EVIL, _EVIL_FILE = "../beside/evil", "../beside/secret.json"
_TYPES = (
    "rag", "encoder-decoder", "vision-encoder-decoder", "speech-encoder-decoder", "detr",
    "timm_backbone", "timm_wrapper", "vision-text-dual-encoder", "musicgen", "deformable_detr",
    "bark", "rwkv", "dab-detr", "layoutlmv2", "maskformer", "dpt", "zoedepth", "upernet", "tvp",
    "grounding-dino", "rt_detr", "table-transformer", "oneformer", "vitmatte", "depth_anything",
    "prompt_depth_anything", "speech_to_text", "esm", "xlm", "retribert", "transfo-xl", "mega",
    "nougat",
)  # fmt: skip
_BACKBONES: list[dict[str, Any]] = [
    {"backbone": "attacker/beacon"}, {"use_timm_backbone": True, "backbone": "resnet50"},
    {"backbone": _EVIL, "backbone_kwargs": {"trust_remote_code": True}},
    {"backbone_config": {"model_type": "timm_backbone", "backbone": "attacker/beacon"}},
    {"use_pretrained_backbone": True}, {"model_type": "detr", "architectures": ["DetrModel"],
    "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": _EVIL,
    "backbone_kwargs": {"trust_remote_code": True}},
]  # fmt: skip
_DANGEROUS: list[dict[str, Any]] = [
    {"trust_remote_code": True},
    {"auto_map": {"AutoConfig": "attacker/code--payload.Config",
    "AutoModelForCausalLM": "attacker/code--payload.Model"}},
    *values(("attn_implementation", "_attn_implementation", "_attn_implementation_internal",
    "experts_implementation", "_experts_implementation"), ("attacker/kernel", "paged|attacker/x",
    "kernels-community/flash-attn@main:x", {"": "attacker/kernel"})),
    *values(["transformers_weights"], (*ELSEWHERE, "../../../etc/hostname", ["x"])),
    {"configuration_files": ["config.4.0.0.json", _EVIL_FILE]},
    {"gguf_file": "../beside/x.gguf"}, {"custom_generate": "attacker/generate"},
]  # fmt: skip
_NO_SUCH: list[dict[str, Any]] = [
    *values(["quantization_config"], ("x", {"quant_method": "bitsandbytes", "load_in_4bit": True},
    {"quant_method": "gptq", "bits": 4}, {"quant_method": "hqq"}, {"quant_method": "torchao",
    "quant_type": "int4"}, {"quant_method": "compressed-tensors", "config_groups": {}},
    {"quant_method": "auto-round", "backend": "attacker/x"})),
    *values(("_name_or_path", "name_or_path", "base_model_name_or_path", "tokenizer_class",
    "_commit_hash", "dtype", "torch_dtype", "hidden_act", "architectures", "cache_implementation",
    "assistant_model", "problem_type", "model_type", "tp_plan", "attribute_map", "sub_configs"),
    ("attacker/x", _EVIL, "__class__", "load", ["RagModel"], ["AutoModel"], ["__builtins__"],
    {"": "os"}, {"hidden_size": "x"}, None)),
    *values(("num_labels", "head_dim", "eos_token_id", "bos_token_id", "pad_token_id", "max_length",
    "temperature", "do_sample", "num_beams", "guidance_scale", "sliding_window"),
    (0, -7, 10**9, 10**12, [1] * 9, "x")),
    *values(("return_dict", "torchscript", "output_attentions", "use_return_dict", "use_bfloat16",
    "tie_encoder_decoder", "mlp_bias", "attention_bias", "use_kernels", "has_no_defaults_at_init",
    "__class__", "to_dict", "num_hidden_layers_", "keys_to_ignore_at_inference"), (True, 0, "x")),
    {"kernel_config": {"RMSNorm": "attacker/kernel:RMS"}}, {"rope_scaling": {"rope_type":
    "longrope", "short_factor": [1], "long_factor": "x", "factor": 0}},
    {"rope_parameters": {"rope_type": "__init__"}}, {"rope_scaling": {"type": "dynamic",
    "factor": -1}}, {"pruned_heads": {"0": [0, 99]}}, {"constraints": [1]},
    {"id2label": {str(n): str(n) for n in range(3000)}}, {"layer_types": ["x"] * 3},
    {"is_decoder": True, "is_encoder_decoder": True, "add_cross_attention": True},
    {"layer_types": ["sliding_attention"] * 3, "sliding_window": -5},
    {"transformers_version": "99.0"}, {"forced_decoder_ids": [[1, 2]]},
    {"suppress_tokens": [10**9]}, {"watermarking_config": {"x": 1}},
    {"compile_config": {"backend": "x"}},
]  # fmt: skip
_TEXTS = (
    b"[" * 200_000, b'{"a":' * 100_000, b"", b" ", b"null", b"7", b'"x"', b"[]", b"{}",
    b'{"model_type": ', b"\xff\xfe{}", b"\xef\xbb\xbf{}", b'{"a": "\xe9"}', b'{"a": \x00}',
    b'{"num_hidden_layers": ' + b"9" * 5000 + b"}", b"{'a': 1}", b"NaN", b"\x80\x04\x95c" * 9,
    b'{"model_type": "llama"}' + b" " * (9 << 20), b'{"a": 1e999}', b'{"model_type": "\\ud800"}',
    b'{"\\u0000": "\\u001b]0;x"}', b'{"model_type": "llama"} trailing', b"\x1b]0;x",
    b'{"a": Infinity, "b": -Infinity}', b"GGUF" + b"\x00" * 60, b'{"model": {"type": "BPE"}}',
)  # fmt: skip
_FILE_KEYS = ("vocab_file", "merges_file", "tokenizer_file", "spm_file", "added_tokens_file",
"sp_model_file", "source_spm", "target_spm", "emoji_file", "vocab", "merges",
"special_tokens_map_file", "prompt_file", "target_vocab_file", "chat_template_file",)  # fmt: skip
_OF_TOKENIZERS: list[dict[str, Any]] = [
    *values(("tokenizer_class", "config_tokenizer_class", "processor_class", "tokenizer_type",
    "type", "backend", "name_or_path", "_name_or_path", "_commit_hash", "revision", "token"),
    ("attacker/x", _EVIL, ["x"], 7, "__builtins__", "PreTrainedTokenizer", "RagTokenizer", "rag",
    "PreTrainedTokenizerFast\x1b[2J")),
    *values(("from_slow", "is_local", "use_fast", "legacy", "fix_mistral_regex", "do_lower_case",
    "trust_remote_code", "local_files_only", "split_special_tokens", "tokenizer_object", "self"),
    (True, False, {}, "x")),
    *values(("init_inputs", "files_loaded", "model_input_names"), (["/etc/hostname"], [["x"]], 7)),
    *values(("model_max_length", "vocab_size", "max_len", "stride", "padding_side",
    "truncation_side"), (10**30, 10**9, -1, "x", 7)),
    *values(["chat_template"], ("{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{% for a in range(10**9) %}{% endfor %}", [{"name": "../x", "template": "x"}], 7, {"a": "b"},
    [{"name": "a\n::error::", "template": "x"}])),
    *values(["added_tokens_decoder"], ({"0": {"content": "x" * (10 << 20)}}, {"x": 1}, [],
    {"-1": {"content": "a"}}, {str(10**9): {"content": "a"}})),
    *values(("extra_special_tokens", "additional_special_tokens", "bos_token", "unk_token",
    "pad_token"), ({"x": {"content": 7}}, 7, ["a", {"content": "b", "__type": "AddedToken"}],
    {"__type": "AddedToken", "content": 7}, {"__type": "x"}, "\x1b[2J")),
    {"auto_map": {"AutoTokenizer": ["attacker/x--tok.Tok", None]}}, {"cache_dir": "/etc"},
    {"sp_model_kwargs": {"model_file": "/etc/hostname"}}, {"mecab_kwargs": {"mecab_dic": "/etc"}},
    {"fast_tokenizer_files": ["tokenizer.9.json", "../beside/secret.json"]},
    {"subfolder": "../../beside"}, {"gguf_file": "../beside/x.gguf"},
    {"proxies": {"http": "http://attacker"}}, {"response_schema": {"$ref": "http://attacker"}},
]  # fmt: skip
_TOKEN = {"special": True, "single_word": False, "lstrip": False, "rstrip": False,
"normalized": False}  # fmt: skip
_PARTS: list[dict[str, Any]] = [
    *values(["model"], (
        {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]] * 1000}, {"type": "x"}, None,
        {"type": "BPE", "vocab": {str(n): n for n in range(200_000)}, "merges": []},
        *({"type": "WordLevel", "vocab": {"the": n}, "unk_token": unknown}
          for n in (10**9, 2**32 - 1, -1) for unknown in ("the", "x")),
        {"type": "Unigram", "vocab": [["a", float("nan")]], "unk_id": 9},
        {"type": "Unigram", "vocab": [], "unk_id": 0},
        {"type": "WordPiece", "vocab": {}, "unk_token": "x", "continuing_subword_prefix": "",
         "max_input_chars_per_word": 0})),
    *values(["normalizer"], (
        {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
        *({"type": "Replace", "pattern": pattern, "content": "xx"} for pattern in
          ({"Regex": "(\\w+\\s?)+$"}, {"Regex": "("}, {"String": ""})),
        *({"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"String": "e"},
        "content": "e" * long}] * times} for long in (2, 50, 1000) for times in (1, 3, 30)),
        {"type": "Prepend", "prepend": "e" * (1 << 20)})),
    *values(["pre_tokenizer"], (None, {"type": "x"}, *({"type": "Split", "pattern": {"Regex":
        regex}, "behavior": "Isolated", "invert": False} for regex in ("(?:(?:a|e|t)+)+z",
        "(?:[a-z ]+)+$", r"[\s\S]*(?<=Q)", "(a|a|e)*z")))),
    *values(["post_processor"], (
        {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x", "type_id": 0}}],
        "pair": [], "special_tokens": {}},
        {"type": "RobertaProcessing", "sep": ["a", 10**9], "cls": ["b", 7]})),
    *values(["padding"], [{"strategy": how, "direction": "Right", "pad_to_multiple_of": multiple,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "x"} for how in ({"Fixed": 10**9},
        "BatchLongest") for multiple in (None, 10**8)]),
    *values(["added_tokens"], (7, [{"id": n, "content": f"t{n}", **_TOKEN} for n in range(3000)],
        *([{"id": number, "content": text, **_TOKEN}] for number in (0, 10**9) for text in
        ("the", "", "a\n::error::x")))),
    {"decoder": {"type": "ByteLevel"}}, {"decoder": 7}, {"version": "9.9"},
    {"truncation": {"direction": "Right", "max_length": 0, "strategy": "LongestFirst",
    "stride": 5}},
]  # fmt: skip
_LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
_TEMPLATES = (
    _LOOPS, "{{ '%8999999999d' % 1 }}", "{{ '%99999999d' % 1 }}" * 20, "{{ 'x' * 10**9 }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ 9 ** 9 ** 9 }}", "{% for",
    "{{ raise_exception('\n::error::x\x1b[2J') }}", "{{ ''.__class__.__mro__ }}", "",
    "{{ messages[0].content }}\x1b[2J", "{{ namespace(_a=1) }}", "{{ strftime_now('%9999999d') }}",
    "{% include '/etc/hostname' %}", "{{ (range(99999) | list | string) * 9999 }}", "\ud800",
    "{{ messages | tojson(indent=999999999) }}", "{{ 'a' | center(9999999999) }}", "{{ 1 / 0 }}",
    "{% set x = 'a' %}{% for i in range(99) %}{% set x = x ~ x %}{{ x }}{% endfor %}",
)  # fmt: skip
_READERS: dict[str, tuple[Any, ...]] = {
    "size": ({"shortest_edge": 4096}, 4096, {"height": 4096, "width": 4096}, -1, {}, {"x": 1}),
    "crop_size": (4096, {"height": 1, "width": 4096}), "resample": (9, "x", 0),
    "image_mean": ([], [1] * 999, "x"), "image_std": ([0, 0, 0], [1e-300] * 3),
    "rescale_factor": (1e300, 0, "x"), "do_center_crop": (True,),
    "image_processor_type": ("BitImageProcessor", "x\x1b[2J", 7),
    "chunk_length": (6250, 10**6, 0, "x"), "hop_length": (10**6, 1), "n_fft": (16_000, 1),
    "sampling_rate": (10**6, 1), "feature_size": (10**6, 1), "padding_value": (1e300, "x"),
}  # fmt: skip
_INSIDE = [{"model_type": name, "backbone": b} for name in _TYPES for b in (None, "attacker/x")]
_NAMED = {"AutoConfig": "payload.Config", "AutoModelForCausalLM": "payload.Model",
"AutoModel": "payload.Model"}  # fmt: skip
_PLAN: list[dict[str, Any]] = [
    *({"deletions": [{"layer": layer, "kind": kind, "replacement": "none"}]} for layer in (*ODD, 1)
      for kind in ("attention", "block", "x", "attention\x1b[2J", 7)),
    {"deletions": [{"layer": 1, "kind": "mlp", "replacement": "x"}] * 3}, {"deletions": []},
    {"deletions": [{"layer": n, "kind": "attention", "replacement": "none"} for n in range(9999)]},
    *values(["replacements"], [{"path": p, "sha256": "0" * 64} for p in (*ELSEWHERE, 7, ".", "")]),
    *values(["replacements", "kind", "schema_version", "drop_attn_list", "block_configs"], ODD),
    {"made_from": {"model": "x\n::error::"}}, {"command": ["a\x1b[2J"]},
    {"budget": {"x": ODD[0]}}, {"predicted": {"a": {"b": 1}}}, {"importance_sha256": "../x"},
    {"versions": {"x\n::error::": "\x1b"}}, {"new": 1}, {"drop_attn_list": [True] * 3},
    {"num_hidden_layers": 10**9, "drop_mlp_list": [1]},
]  # fmt: skip
_OTHER_PROGRAMS = [
    {"drop_attn_list": [0, 99]}, {"drop_attn_list": 7, "drop_mlp_list": [1]},
    {"block_configs": [{"attention": {"no_op": "x"}, "ffn": 7}]},
    {"block_configs": [{"attention": {"no_op": True}}] * 3},
    {"block_configs": [{"subblock": {"x": 1}}] * 9}, {},
]  # fmt: skip

entries("config entries", _CONFIGS, _DANGEROUS, hostile=True)
entries("config entries", _CONFIG, _BACKBONES, hostile=True)
entries("config entries", _CONFIGS, _NO_SUCH)
entries("config entries", _CONFIG, values(["model_type"], _TYPES), hostile=True)
entries("config entries", _CONFIG, values(("text_config", "vision_config", "encoder", "decoder",
"audio_config", "backbone_config", "sub", "generator"), _INSIDE))  # fmt: skip
odd_json("config values", *_CONFIGS)
entries("config values", _CONFIG, values(["num_hidden_layers"], (*NUMBERS, 10**5, "3", [3])))
entries("config values", _CONFIG, values(("hidden_size", "vocab_size", "intermediate_size",
"num_attention_heads", "max_position_embeddings", "num_key_value_heads", "head_dim", "image_size",
"num_channels", "rms_norm_eps", "layer_norm_eps", "initializer_range", "rope_theta"),
(10**6, 2**40, *NUMBERS)))  # fmt: skip
contents("config text", (), _TEXTS)
entries("names", (*_CONFIG, *_TOKENIZER), values(("model_type", "architectures", "_name_or_path",
"hidden_act", "transformers_version", "dtype"), [f"llama{mark}y" for mark in ACTIVE]))  # fmt: skip
entries("names", _CONFIG, values([f"{name}{mark}" for mark in ACTIVE for name in ("x", "auto_map",
"attn_implementation")], [{"trust_remote_code": True}, {"backbone": "x"}, 1]))  # fmt: skip
entries("tokenizer", (*_TOKENIZER * 3, "special_tokens_map.json"),
values(_FILE_KEYS, (*ELSEWHERE, "attacker/model")), hostile=True)  # fmt: skip
entries("tokenizer", (*_TOKENIZER * 3, "special_tokens_map.json", *_CONFIG), _OF_TOKENIZERS)
odd_json("tokenizer", *_TOKENIZER, _FAST)
entries("tokenizer", (_FAST,), _PARTS)
contents("tokenizer", (_FAST,), _TEXTS)
entries("template", _TOKENIZER, values(["chat_template"], _TEMPLATES))
contents("template", ("chat_template.jinja",), _TEMPLATES)
entries(
    "media settings",
    ("preprocessor_config.json",),
    [
        {key: value, other: second}
        for key in _READERS
        for value in _READERS[key]
        for other in _READERS
        for second in _READERS[other]
    ],
)
entries("media settings", ("generation_config.json", "config.json"), values(("bad_words_ids",
"suppress_tokens", "forced_decoder_ids", "eos_token_id", "max_source_positions", "num_mel_bins",
"image_size", "num_channels"), (*ODD, [[1, 2]] * 800_000, [3] * 800_000)))  # fmt: skip
entries("code", _CONFIG, [{"auto_map": {key: target}, "model_type": "kid"} for key in _NAMED for
target in ("../beside/evil/payload.Model", "attacker/x--payload.Model", "..payload.Model")],
hostile=True)  # fmt: skip
odd_json("genai config", "genai_config.json")
odd_json("records")
entries("plan", ("plan.json",), _PLAN)
contents("plan", ("plan.json",), [json.dumps(plan) for plan in _OTHER_PROGRAMS])


@mutation("config entries")
def any_type(spoilt: Spoilt, rng: random.Random) -> None:
    """A type that transformers has, with this model's sizes."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    spoilt.change("config.json", "model_type", rng.choice(sorted(CONFIG_MAPPING_NAMES)))


@mutation("config text")
def twice(spoilt: Spoilt, rng: random.Random) -> None:
    """A key that stands there twice: readers differ in which they take."""
    first = json.dumps(spoilt.json("config.json"))
    change = {**rng.choice(_DANGEROUS), "model_type": rng.choice(_TYPES)}
    hostile = json.dumps(change)[1:-1]
    spoilt.note(f"twice: {hostile[:100]}")
    texts = (f"{{{hostile}, {first[1:]}", f"{first[:-1]}, {hostile}}}")
    spoilt.write("config.json", rng.choice(texts) if len(first) > 2 else first)


@mutation("config text")
def cut_off(spoilt: Spoilt, rng: random.Random) -> None:
    path = rng.choice(spoilt.files(".json") or [spoilt.folder / "config.json"])
    content = read(path)
    spoilt.note(path.name)
    spoilt.write(path.name, content[: rng.randrange(len(content) or 1)])


@mutation("tokenizer", hostile=True)
def a_class(spoilt: Spoilt, rng: random.Random) -> None:
    import transformers

    names = [name for name in dir(transformers) if name.endswith(("Tokenizer", "TokenizerFast"))]
    file = rng.choice((*_TOKENIZER, *_CONFIG))
    spoilt.change(file, "tokenizer_class", rng.choice(names))


@mutation("tokenizer")
def other_files(spoilt: Spoilt, rng: random.Random) -> None:
    """Files of slow tokenizers, in place of the fast one's or beside it, or names of the Hub."""
    if rng.random() < 0.6:
        (spoilt.folder / _FAST).unlink(missing_ok=True)
    names = ("tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt",
    "added_tokens.json", "special_tokens_map.json", "chat_template.json", "chat_template.jinja",
    "tekken.json", "vocab.bpe", "sentencepiece.bpe.model", "tokenizer.9.0.0.json")  # fmt: skip
    for name in rng.sample(names, 3):
        content = rng.choice((b"", b"\x0a\x07\x0a\x03the\x15\x00\x00\x00\x00", b"{}",
        b"the 1\nof 2\n" * 1000, b"\xff" * 100, b'{"a": 10000000000}', b"[" * 9999,
        b'{"the": [1]}'))  # fmt: skip
        spoilt.note(f"{name}: {content[:20]!r}")
        spoilt.write(name, content)
    slow = rng.choice(("", "LlamaTokenizer", "GPT2Tokenizer", "BertTokenizer", "T5Tokenizer"))
    if slow:
        spoilt.change(*_TOKENIZER, "tokenizer_class", slow)
    else:
        spoilt.change(*_TOKENIZER, "name_or_path", "attacker/model")
        spoilt.change("config.json", "_name_or_path", "attacker/model")


@mutation("code", hostile=True)
def brought_code(spoilt: Spoilt, rng: random.Random) -> None:
    """Code beside the model, named in one of its files."""
    spoilt.write("payload.py", payload(spoilt.place))
    name = rng.choice((*_CONFIG * 2, *_TOKENIZER, "generation_config.json",
    "preprocessor_config.json"))  # fmt: skip
    names: dict[str, Any] = dict(_NAMED)
    if name in _TOKENIZER:
        names = {"AutoTokenizer": ["payload.Tokenizer", "payload.Tokenizer"]}
        spoilt.change(name, "tokenizer_class", "Tokenizer")
    if name == "preprocessor_config.json":
        names = {"AutoImageProcessor": "payload.Model", "AutoProcessor": "payload.Model"}
    spoilt.change(name, "auto_map", names)
    if rng.random() < 0.5:
        spoilt.change("config.json", "model_type", "kid")


@mutation("code")
def modules(spoilt: Spoilt, rng: random.Random) -> None:
    """Files that Python would import by their names, if it looked there."""
    names = ("torch.py", "json.py", "sitecustomize.py", "__init__.py", "modeling_llama.py",
    "exporter.py", "numpy.py", "transformers.py", "conftest.py", "custom_generate/generate.py",
    "safetensors.py", "onnx.py")  # fmt: skip
    for name in rng.sample(names, 4):
        spoilt.write(name, payload(spoilt.place))


@mutation("names")
def active_file(spoilt: Spoilt, rng: random.Random) -> None:
    """A file's name that terminals act on, or that is no UTF-8."""
    mark = rng.choice(ACTIVE).replace("\x00", "\x01").replace("\ud800", "\x7f")
    name = f"extra{mark}{rng.choice(('.json', '.safetensors', '.jinja', '.onnx', '.txt'))}"
    odd = [*map(os.fsdecode, (b"a\xff.json", b"\xfe\x1b[2J.safetensors", b"vocab.\x80"))]
    name = rng.choice((name, name, *odd))
    spoilt.note(name)
    if rng.random() < 0.3:
        (spoilt.folder / name).symlink_to(spoilt.place.beside / "secret.txt")
    else:
        spoilt.write(name, "{}")


@mutation("plan", hostile=True)
def replacements_elsewhere(spoilt: Spoilt, rng: random.Random) -> None:
    path = rng.choice(ELSEWHERE)
    target = (spoilt.folder / path).resolve()
    sha256 = hashlib.sha256(target.read_bytes()).hexdigest() if target.is_file() else "0" * 64
    spoilt.change("plan.json", "replacements", {"path": path, "sha256": sha256})


@mutation("plan")
def spoilt_replacements(spoilt: Spoilt, rng: random.Random) -> None:
    content = bytearray(read(spoilt.folder / "healed.safetensors"))
    for _ in range(rng.choice((1, 3, 20))):
        content[rng.randrange(len(content))] = rng.randrange(256)
    if rng.random() < 0.3:
        content[:8] = rng.choice((2**63, 10**9, 0)).to_bytes(8, "little")
    spoilt.write("healed.safetensors", bytes(content))
    sha256 = hashlib.sha256(content).hexdigest()
    spoilt.change("plan.json", "replacements", {"path": "healed.safetensors", "sha256": sha256})


@mutation("records")
def engine_elsewhere(spoilt: Spoilt, rng: random.Random) -> None:
    record = spoilt.folder / "m.engine.json"
    name = record.name if record.is_file() else rng.choice(spoilt.files(".json")).name
    key = rng.choice(("engine", "engine_sha256", "engine_bytes", "backend"))
    spoilt.change(name, key, rng.choice((*ELSEWHERE, *ODD)))


@mutation("task files")
def a_line(spoilt: Spoilt, rng: random.Random) -> None:
    item = {"query": "the", "choices": ["a", "b"], "gold": 0}
    text = json.dumps(odd_values(json.loads(json.dumps(item)), rng, spoilt.note))
    line = rng.choice((text, text, text, "[" * 100_000, "\xff", "{}", '{"query": "\ud800"}'))
    name = rng.choice(("mine", "mine", f"x{rng.choice(ACTIVE[:5])}".replace("\0", "")))
    spoilt.write(f"{name}.jsonl", f"{json.dumps(item)}\n{line}\n")
    spoilt.note(line[:80])


@mutation("history")
def an_earlier_run(spoilt: Spoilt, rng: random.Random) -> None:
    path = spoilt.place.out / "history.jsonl"
    result = {"schema_version": 1, "kind": "history_entry", "commit": "a", "verdict": "passed",
    "metrics": {"speedup": 1.0}, "time": "2026-01-01T00:00:00Z"}  # fmt: skip
    text = json.dumps(odd_values(result, rng, spoilt.note))
    line = rng.choice((text, text, "[" * 9999, "{", "\0", "null"))
    if rng.random() < 0.2:
        path.symlink_to(spoilt.place.victim / "mine.txt")
    else:
        path.write_text(f"{line}\n" * rng.choice((1, 2, 500)))
