"""What was reported once, or is like it: the same every time, on one command."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.hostile.place import payload
from tests.hostile.spoilt import Spoilt

Case = Callable[[Spoilt], object]

_DETR = {
    "model_type": "detr", "architectures": ["DetrModel"], "use_timm_backbone": False,
    "use_pretrained_backbone": False,
}  # fmt: skip
_SECRET = "../beside/secret.json"  # from the working directory
_DEEP = "[" * 200_000


def json_file(name: str, **entries: Any) -> Case:
    """Changes entries of a JSON file, which need not be there."""
    return lambda spoilt: [spoilt.change(name, key, value) for key, value in entries.items()]


def config(**entries: Any) -> Case:
    return json_file("config.json", **entries)


def index(**places: str) -> Case:
    """Shards in places of the index's choice."""
    return json_file("model.safetensors.index.json", weight_map=places)


def text(name: str, content: str | bytes) -> Case:
    return lambda spoilt: spoilt.write(name, content)


def grown(name: str, size: int) -> Case:
    """A file with nothing behind what it holds, which takes no room."""

    def grow(spoilt: Spoilt) -> None:
        (spoilt.folder / name).touch()
        os.truncate(spoilt.folder / name, size)

    return grow


def _free(spoilt: Spoilt, name: str) -> Path:
    path = spoilt.folder / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    return path


def link(name: str, target: str = "beside/secret.json") -> Case:
    """A link in a file's place; a relative target begins at the place's root."""
    return lambda spoilt: _free(spoilt, name).symlink_to(spoilt.place.root / target)


def fifo(name: str) -> Case:
    """A pipe in a file's place, at which a reader would wait for ever."""
    return lambda spoilt: os.mkfifo(_free(spoilt, name))


def _generates(spoilt: Spoilt) -> None:
    spoilt.write("custom_generate/generate.py", payload(spoilt.place))


REFUSED: dict[str, Case] = {
    # The findings of the review, as they were reported.
    "code by the arguments of a backbone": config(
        **_DETR, backbone="../beside/evil", backbone_kwargs={"trust_remote_code": True}
    ),
    "a request for a backbone": config(**_DETR, backbone="attacker/beacon"),
    "an adapter": json_file(
        "adapter_config.json", base_model_name_or_path="attacker/base", peft_type="LORA"
    ),
    "a template that is the environment": link("chat_template.jinja", "/proc/self/environ"),
    "a config that is nested without end": text("config.json", _DEEP),
    # Their kin: code and other models.
    "a backbone deep inside": config(text_config={"parts": [{"backbone": "attacker/b"}]}),
    "code allowed deep inside": config(vision_config={"x": {"trust_remote_code": True}}),
    "code allowed by the generation's config": json_file(
        "generation_config.json", trust_remote_code=True
    ),
    "code for generating": json_file("generation_config.json", custom_generate="a/b"),
    "code for generating, in a file of its own": _generates,
    "code of a type that nobody knows": config(model_type="kid", auto_map={"AutoConfig": "code.C"}),
    "code at a path": config(auto_map={"AutoConfig": "../beside/evil/payload.Config"}),
    "a kernel for the attention": config(attn_implementation="attacker/kernel"),
    "a kernel for the experts": config(_experts_implementation={"": "a/kernel@main:f"}),
    "a timm backbone": config(**_DETR | {"use_timm_backbone": True}),
    "a model of two others": config(
        model_type="encoder-decoder",
        encoder={"model_type": "llama"},
        decoder={"model_type": "llama"},
    ),
    "a type deep inside": config(parts=[{"model_type": "timm_wrapper"}]),
    "a type that is no text": config(model_type=["llama"]),
    "another config in its place": config(configuration_files=["config.4.0.0.json"]),
    "code of another repository": config(auto_map={"AutoConfig": "attacker/code--code.C"}),
    "a tokenizer's code of another repository": json_file(
        "tokenizer_config.json", auto_map={"AutoTokenizer": ["a/b--c.T", None]}
    ),
    # Files elsewhere.
    "a tokenizer's file elsewhere": json_file("tokenizer_config.json", tokenizer_file=_SECRET),
    "a vocabulary elsewhere": json_file("tokenizer_config.json", vocab=_SECRET),
    "a vocabulary elsewhere, by the special tokens": json_file(
        "special_tokens_map.json", vocab_file=_SECRET
    ),
    "a tokenizer's arguments by order": json_file("tokenizer_config.json", init_inputs=[_SECRET]),
    "a sentencepiece model elsewhere": json_file(
        "tokenizer_config.json", sp_model_kwargs={"model_file": _SECRET}
    ),
    "a tokenizer of several models": json_file(
        "tokenizer_config.json", tokenizer_class="RagTokenizer"
    ),
    "a tokenizer with a program": json_file(
        "tokenizer_config.json", tokenizer_class="BertJapaneseTokenizer"
    ),
    "weights elsewhere": config(transformers_weights=f"../{_SECRET}"),
    "shards above": index(a=f"../{_SECRET}"),
    "shards at an absolute path": index(a="/etc/hostname"),
    "a config that is a link": link("config.json"),
    "a tokenizer that is a link": link("tokenizer.json"),
    "weights that are a link": link("model.safetensors"),
    "code that is a link": link("code.py"),
    "a further template that is a link": link("additional_chat_templates/rag.jinja"),
    "a folder of templates that is a link": link("additional_chat_templates", "beside"),
    "a folder of templates that is a link to an empty one": link(
        "additional_chat_templates", "tmp"
    ),
    "code for generating in a folder that is a link": link("custom_generate", "beside"),
    # No files, and files of no sane size.
    "a circle of links": link("generation_config.json", "work/llama/generation_config.json"),
    "a config that is a pipe": fifo("config.json"),
    "a tokenizer that is a pipe": fifo("tokenizer.json"),
    "weights that are a pipe": fifo("model.safetensors"),
    "a config without end": link("config.json", "/dev/zero"),
    "a config of a gigabyte of nothing": grown("config.json", 1 << 30),
    "a tokenizer of a terabyte of nothing": grown("tokenizer.json", 1 << 40),
    "a tokenizer that is nested without end": text("tokenizer.json", _DEEP),
    "a tokenizer's config that is nested without end": text("tokenizer_config.json", _DEEP),
    "layers without end": config(num_hidden_layers=1 << 64),
    "layers without end, deep inside": config(text_config={"n_layers": 1 << 31}),
    "far more layers than weights": config(num_hidden_layers=9_000),
    "many more layers than weights": config(num_hidden_layers=600),
    "a width without end": config(hidden_size=1_000_000_000),
    "a vocabulary without end": config(vocab_size=1 << 40),
    "half a character": text("config.json", r'{"model_type": "llama", "x": "\ud800"}'),
    "a header of no sane size": text("model.safetensors", (1 << 62).to_bytes(8, "little") + b"{}"),
    "a header that is nested without end": text(
        "model.safetensors", (200_000).to_bytes(8, "little") + _DEEP.encode()
    ),
    "an index that is nested without end": text("model.safetensors.index.json", _DEEP),
    "a type with control characters": config(model_type="\x1b[2J\n::error::x\u202e"),
    "a shard with control characters": index(a="../\x1b]0;x\x07\n::error::y"),
}
"""Each must end with exit code 2 and one line; with the leave that it is given."""

LEAVE = {
    "code of a type that nobody knows": "--config in/any.yaml",
    "code at a path": "--trust-remote-code",
    "code of another repository": "--trust-remote-code",
    "a tokenizer's code of another repository": "--trust-remote-code",
    "code that is a link": "--trust-remote-code",
    "code for generating in a folder that is a link": "--trust-remote-code",
}

BROKEN: dict[str, Case] = {
    "a size in words": config(vocab_size="many"),
    "an epsilon in words": config(rms_norm_eps="\x1b[2J"),
    "a model without layers": config(num_hidden_layers=0),
    "weights of a terabyte of nothing": grown("model.safetensors", 1 << 40),
    "a terabyte of nothing beside the weights": grown("extra.safetensors", 1 << 40),
    "a config that is no UTF-8": text("config.json", b'{"model_type": "\xff"}'),
    "a config that is cut off": text("config.json", '{"model_type": "lla'),
    "a config with sizes that are no numbers": config(hidden_size=float("nan")),
    "a number of a million digits": text(
        "config.json", '{"model_type": "llama", "hidden_size": 1' + "0" * 1_000_000 + "}"
    ),
    "a generation's config that is a list": text("generation_config.json", "[]"),
    "a tokenizer at which its library panics": json_file(
        "tokenizer.json", normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    ),
    "a length that is no number": json_file("tokenizer_config.json", model_max_length="x"),
    "a shard that is not there": index(a="none.safetensors"),
}
"""What is no attack and can't be loaded either: one line, and any code but 0."""
CASES: dict[str, Case] = {"nothing": lambda _: None, **REFUSED, **BROKEN}
