"""A tokenizer's files."""

from __future__ import annotations

import random
from typing import Any

from tests.hostile.configs import ACTIVE, ODD
from tests.hostile.spoilt import Spoilt, mutation

_CONFIG, _FAST = "tokenizer_config.json", "tokenizer.json"
_PATHS = ("/etc/hostname", "../beside/secret.json", "../beside/secret.txt", "/dev/zero",
"secret.txt", "attacker/model",)  # fmt: skip
_FILE_KEYS = ("vocab_file", "merges_file", "tokenizer_file", "spm_file", "added_tokens_file",
"sp_model_file", "source_spm", "target_spm", "emoji_file", "vocab", "merges",
"special_tokens_map_file", "prompt_file", "target_vocab_file", "chat_template_file",)  # fmt: skip
_ENTRIES: list[dict[str, Any]] = [
    {"tokenizer_class": "attacker/x"}, {"tokenizer_class": ["x"]}, {"tokenizer_class": 7},
    {"tokenizer_class": "../x"}, {"tokenizer_class": "__builtins__"},
    {"tokenizer_class": "PreTrainedTokenizer"},
    {"tokenizer_class": "PreTrainedTokenizerFast\x1b[2J"},
    {"name_or_path": "attacker/model"}, {"_name_or_path": "../beside/evil"}, {"from_slow": True},
    {"is_local": False}, {"_commit_hash": "x"},
    {"config_tokenizer_class": "RagTokenizer"}, {"processor_class": "attacker/x"},
    {"tokenizer_type": "rag"}, {"type": "rag"}, {"tokenizer_object": {}},
    {"auto_map": {"AutoTokenizer": ["attacker/x--tok.Tok", None]}},
    {"init_inputs": ["/etc/hostname"]}, {"init_inputs": [["x"]]},
    {"sp_model_kwargs": {"model_file": "/etc/hostname"}}, {"mecab_kwargs": {"mecab_dic": "/etc"}},
    {"fast_tokenizer_files": ["tokenizer.9.json", "../beside/secret.json"]},
    {"chat_template": "{{ ''.__class__.__mro__[1].__subclasses__() }}"},
    {"chat_template": "{% for a in range(10**9) %}{% endfor %}"},
    {"chat_template": [{"name": "../x", "template": "x"}]}, {"chat_template": 7},
    {"chat_template": {"a": "b"}}, {"chat_template": [{"name": "a\n::error::", "template": "x"}]},
    {"added_tokens_decoder": {"0": {"content": "x" * (10 << 20)}}},
    {"added_tokens_decoder": {"x": 1}}, {"added_tokens_decoder": {"-1": {"content": "a"}}},
    {"added_tokens_decoder": {str(10**9): {"content": "a"}}}, {"added_tokens_decoder": []},
    {"extra_special_tokens": {"x": {"content": 7}}}, {"additional_special_tokens": 7},
    {"extra_special_tokens": ["a", {"content": "b", "__type": "AddedToken"}]},
    {"bos_token": {"__type": "AddedToken", "content": 7}}, {"unk_token": {"__type": "x"}},
    {"pad_token": "\x1b[2J"},
    {"model_max_length": 10**30}, {"model_max_length": "x"}, {"model_max_length": -1},
    {"padding_side": "x"}, {"truncation_side": 7}, {"backend": "attacker/x"}, {"backend": "custom"},
    {"model_input_names": ["../x"]}, {"model_input_names": 7}, {"trust_remote_code": True},
    {"subfolder": "../../beside"}, {"gguf_file": "../beside/x.gguf"}, {"cache_dir": "/etc"},
    {"local_files_only": False},
    {"use_fast": False}, {"proxies": {"http": "http://attacker"}}, {"token": "x"},
    {"revision": "x"}, {"self": 1}, {"legacy": "x"}, {"fix_mistral_regex": True},
    {"response_schema": {"$ref": "http://attacker"}},
    {"split_special_tokens": True, "clean_up_tokenization_spaces": "x"}, {"do_lower_case": {}},
    {"files_loaded": ["/etc/hostname"]}, {"vocab_size": 10**9}, {"max_len": 3, "stride": -1},
]  # fmt: skip


@mutation("tokenizer", hostile=True)
def named_file(spoilt: Spoilt, rng: random.Random) -> None:
    name = rng.choice((_CONFIG, _CONFIG, _CONFIG, "special_tokens_map.json"))
    spoilt.change(name, rng.choice(_FILE_KEYS), rng.choice(_PATHS))


@mutation("tokenizer", hostile=True)
def a_class(spoilt: Spoilt, rng: random.Random) -> None:
    import transformers

    names = [name for name in dir(transformers) if name.endswith(("Tokenizer", "TokenizerFast"))]
    spoilt.change(rng.choice((_CONFIG, "config.json")), "tokenizer_class", rng.choice(names))


@mutation("tokenizer")
def odd_entry(spoilt: Spoilt, rng: random.Random) -> None:
    for key, value in rng.choice(_ENTRIES).items():
        spoilt.change(
            rng.choice((_CONFIG, _CONFIG, _CONFIG, "special_tokens_map.json", "config.json")),
            key,
            value,
        )


@mutation("tokenizer")
def odd_value(spoilt: Spoilt, rng: random.Random) -> None:
    result = spoilt.json(_CONFIG)
    spoilt.change(_CONFIG, rng.choice(sorted(result) or ["x"]), rng.choice(ODD))


@mutation("tokenizer")
def part(spoilt: Spoilt, rng: random.Random) -> None:
    """Another part of tokenizer.json, which a library in Rust reads."""
    key, result = rng.choice((
        ("model", {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]] * 1000}), ("model",
        {"type": "x"}), ("model", None),
        ("model", {"type": "WordLevel", "vocab": {"the": 10**9, "[UNK]": 5}, "unk_token": "[UNK]"}),
        ("model", {"type": "WordLevel", "vocab": {"the": 2**32 - 1}, "unk_token": "x"}),
        ("model", {"type": "WordLevel", "vocab": {"the": -1}, "unk_token": "the"}), ("model",
        {"type": "Unigram", "vocab": [["a", float("nan")]], "unk_id": 9}),
        ("model", {"type": "BPE", "vocab": {str(n): n for n in range(200_000)}, "merges": []}),
        ("model", {"type": "Unigram", "vocab": [], "unk_id": 0}),
        ("model", {"type": "WordPiece", "vocab": {}, "unk_token": "x",
        "continuing_subword_prefix": "", "max_input_chars_per_word": 0}),
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}), ("normalizer",
        {"type": "Replace", "pattern": {"Regex": "(\\w+\\s?)+$"}, "content": ""}),
        ("normalizer", {"type": "Replace", "pattern": {"Regex": "("}, "content": ""}),
        ("normalizer", {"type": "Replace", "pattern": {"String": ""}, "content": "xx"}),
        ("normalizer", {"type": "Sequence", "normalizers": [{"type": "Replace",
        "pattern": {"String": "e"}, "content": "e" * 1000}] * 3}),
        ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "(?:(?:a|e|t)+)+z"},
        "behavior": "Isolated", "invert": False}), ("pre_tokenizer", None), ("pre_tokenizer",
        {"type": "x"}),
        ("post_processor", {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x",
        "type_id": 0}}], "pair": [], "special_tokens": {}}),
        ("post_processor", {"type": "RobertaProcessing", "sep": ["a", 10**9], "cls": ["b", 7]}),
        ("decoder", {"type": "ByteLevel"}), ("decoder", 7),
        ("truncation", {"direction": "Right", "max_length": 0, "strategy": "LongestFirst",
        "stride": 5}), ("padding", {"strategy": {"Fixed": 10**9}, "direction": "Right",
        "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}),
        ("padding", {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": 10**8,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}),
        ("added_tokens", [{"id": n, "content": f"t{n}", "special": True, "single_word": False,
        "lstrip": False, "rstrip": False, "normalized": False} for n in range(3000)]),
        ("added_tokens", [{"id": 10**9, "content": "the", "special": True, "single_word": False,
        "lstrip": False, "rstrip": False, "normalized": False}]),
        ("added_tokens", [{"id": 0, "content": "", "special": False, "single_word": True,
        "lstrip": True, "rstrip": True, "normalized": True}]), ("added_tokens", 7), ("version",
        "9.9"),
        ("added_tokens", [{"id": 1, "content": f"a{rng.choice(ACTIVE)}", "special": True,
        "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}]),
    ))  # fmt: skip
    whole = spoilt.json(_FAST)
    spoilt.note(f"{key}: {str(result)[:100]}")
    spoilt.put_json(_FAST, {**(whole if isinstance(whole, dict) else {}), key: result})


@mutation("tokenizer")
def fast_text(spoilt: Spoilt, rng: random.Random) -> None:
    content = rng.choice((b"", b"{}", b"[" * 200_000, b'{"a":' * 5000, b"\xff\xfe", b"null",
    b"[]", b"\x1b]0;x", b'{"model": {"type": "BPE"}}', b"{" + b" " * (1 << 20),))  # fmt: skip
    spoilt.note(content[:30])
    spoilt.write(_FAST, content)


@mutation("tokenizer")
def other_files(spoilt: Spoilt, rng: random.Random) -> None:
    """Files of slow tokenizers, in place of the fast one's or beside it."""
    if rng.random() < 0.6:
        (spoilt.folder / _FAST).unlink(missing_ok=True)
    for name in rng.sample(
        (
            "tokenizer.model",
            "spiece.model",
            "vocab.json",
            "merges.txt",
            "vocab.txt",
            "added_tokens.json",
            "special_tokens_map.json",
            "chat_template.json",
            "chat_template.jinja",
            "tekken.json",
            "vocab.bpe",
            "sentencepiece.bpe.model",
            "tokenizer.9.0.0.json",
        ),
        3,
    ):
        content = rng.choice((b"", b"\x0a\x07\x0a\x03the\x15\x00\x00\x00\x00", b"{}",
        b"the 1\nof 2\n" * 1000, b"\xff" * 100, b'{"a": 10000000000}', b"[" * 9999,
        b'{"the": [1]}',))  # fmt: skip
        spoilt.note(f"{name}: {content[:20]!r}")
        spoilt.write(name, content)
    if rng.random() < 0.4:
        spoilt.change(
            _CONFIG,
            "tokenizer_class",
            rng.choice(("LlamaTokenizer", "GPT2Tokenizer", "BertTokenizer", "T5Tokenizer")),
        )


@mutation("tokenizer")
def hub_name(spoilt: Spoilt, rng: random.Random) -> None:
    """No tokenizer, and names of where there would be one."""
    (spoilt.folder / _FAST).unlink(missing_ok=True)
    spoilt.change(_CONFIG, "name_or_path", "attacker/model")
    spoilt.change("config.json", "_name_or_path", "attacker/model")
    spoilt.write(rng.choice(("vocab.txt", "tokenizer.model", "vocab.json")), "")
