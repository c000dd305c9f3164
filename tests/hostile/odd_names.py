"""Names that terminals and CI systems act on, in files and of files."""

from __future__ import annotations

import os
import random

from tests.hostile.configs import ACTIVE
from tests.hostile.spoilt import Spoilt, mutation


@mutation("names")
def active_name(spoilt: Spoilt, rng: random.Random) -> None:
    key = rng.choice(("model_type", "architectures", "_name_or_path", "hidden_act",
    "transformers_version", "dtype",))  # fmt: skip
    word = rng.choice(("llama", "LlamaForCausalLM", "x")) + rng.choice(ACTIVE) + "y"
    spoilt.change(
        rng.choice(("config.json", "tokenizer_config.json")),
        key,
        [word] if key == "architectures" else word,
    )


@mutation("names")
def active_key(spoilt: Spoilt, rng: random.Random) -> None:
    key = rng.choice(("x", "auto_map", "attn_implementation")) + rng.choice(ACTIVE)
    spoilt.change(
        "config.json",
        key,
        rng.choice(({"trust_remote_code": True}, {"backbone": "x" + rng.choice(ACTIVE)}, 1)),
    )


@mutation("names")
def active_file(spoilt: Spoilt, rng: random.Random) -> None:
    mark = rng.choice(ACTIVE).replace("\x00", "\x01").replace("\ud800", "\x7f")
    spoilt.note(repr(mark))
    kind = rng.choice(("link", "plain", "shard"))
    name = f"extra{mark}{rng.choice(('.json', '.safetensors', '.jinja', '.onnx', '.txt'))}"
    if kind == "link":
        (spoilt.folder / name).symlink_to(spoilt.place.beside / "secret.txt")
    else:
        spoilt.write(name, "{}")


@mutation("names")
def no_text(spoilt: Spoilt, rng: random.Random) -> None:
    """A file's name that is no UTF-8."""
    name = rng.choice((b"a\xff.json", b"\xfe\x1b[2J.safetensors", b"vocab.\x80", b"\xff"))
    spoilt.write(os.fsdecode(name), "{}")
