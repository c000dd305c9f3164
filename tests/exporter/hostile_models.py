"""Model folders that try to run code, to reach the network, to read elsewhere, or to break."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

Change = Callable[[Path, Path], None]
"""Makes a good model's folder a hostile one; the second is a folder with what isn't to be read."""

DETR = {
    "model_type": "detr", "architectures": ["DetrModel"], "use_timm_backbone": False,
    "use_pretrained_backbone": False,
}  # fmt: skip
SECRET, RAN = "secret.json", "ran"
DEEP = "[" * 200_000


def outside(folder: Path) -> Path:
    """What hostile models are after: a secret, and a place where their code would leave a trace."""
    folder.mkdir()
    (folder / SECRET).write_text(json.dumps({"secret": 1}))
    (folder / "templates").mkdir()
    (folder / "empty").mkdir()
    (folder / "templates" / "more.jinja").write_text("x")
    code = folder / "evil" / "bb"
    code.mkdir(parents=True)
    (code / "config.json").write_text(
        json.dumps({"model_type": "bb", "auto_map": {"AutoConfig": "code.C"}})
    )
    (code / "code.py").write_text(f"open({str(folder / RAN)!r}, 'w').close()\n")
    return folder


def config(**entries: Any) -> Change:
    """Changes entries of ``config.json``."""
    return json_file("config.json", **entries)


def json_file(name: str, **entries: Any) -> Change:
    """Changes entries of a JSON file, which need not be there."""

    def change(folder: Path, aim: Path) -> None:
        path = folder / name
        content = json.loads(path.read_text()) if path.exists() else {}
        filled = json.loads(json.dumps(entries).replace("AIM", str(aim)))
        path.write_text(json.dumps(content | filled))

    return change


def text(name: str, content: str | bytes) -> Change:
    """Writes a file."""

    def change(folder: Path, aim: Path) -> None:
        filled = content.replace("AIM", str(aim)) if isinstance(content, str) else content
        raw = filled.encode() if isinstance(filled, str) else filled
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(raw)

    return change


def link(name: str, target: str = f"AIM/{SECRET}") -> Change:
    """Puts a link in a file's place."""

    def change(folder: Path, aim: Path) -> None:
        place = folder / name
        place.parent.mkdir(exist_ok=True)
        place.unlink(missing_ok=True)
        place.symlink_to(target.replace("AIM", str(aim)))

    return change


def fifo(name: str) -> Change:
    """Puts a pipe in a file's place, at which a reader would wait for ever."""

    def change(folder: Path, _aim: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return change


def sparse(name: str, size: int) -> Change:
    """A file that takes no room and says that it is huge."""

    def change(folder: Path, _aim: Path) -> None:
        with (folder / name).open("wb") as file:
            file.truncate(size)

    return change


def grown(name: str, size: int) -> Change:
    """A file with nothing behind what it holds."""

    def change(folder: Path, _aim: Path) -> None:
        os.truncate(folder / name, size)

    return change


def index(**places: str) -> Change:
    """Shards in places of the index's choice."""

    def change(folder: Path, aim: Path) -> None:
        filled = {name: place.replace("AIM", str(aim)) for name, place in places.items()}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": filled}))

    return change


REFUSED: dict[str, tuple[Change, tuple[str, ...]]] = {
    # The findings of the review, as they were reported.
    "code by the arguments of a backbone": (
        config(**DETR, backbone="evil/bb", backbone_kwargs={"trust_remote_code": True}), (),
    ),
    "a request for a backbone": (config(**DETR, backbone="attacker/beacon"), ()),
    "an adapter": (
        json_file("adapter_config.json", base_model_name_or_path="attacker/base", peft_type="LORA"),
        (),
    ),
    "a template that is the environment": (
        link("chat_template.jinja", "/proc/self/environ"), (),
    ),
    "a config that is nested without end": (text("config.json", DEEP), ()),
    # Their kin: code and other models.
    "a backbone deep inside": (config(text_config={"parts": [{"backbone": "attacker/b"}]}), ()),
    "code allowed deep inside": (config(vision_config={"x": {"trust_remote_code": True}}), ()),
    "code allowed by the generation's config": (
        json_file("generation_config.json", trust_remote_code=True), (),
    ),
    "code for generating": (json_file("generation_config.json", custom_generate="a/b"), ()),
    "code for generating, in a file of its own": (
        text("custom_generate/generate.py", f"open('AIM/{RAN}', 'w').close()\n"), (),
    ),
    "code of a type that nobody knows": (
        config(model_type="kid", auto_map={"AutoConfig": "code.C"}),
        ("allow_any_model_type: true",),
    ),
    "code at a path": (
        config(auto_map={"AutoConfig": "../outside/evil/bb/code.C"}), ("--trust-remote-code",),
    ),
    "a kernel for the attention": (config(attn_implementation="attacker/kernel"), ()),
    "a kernel for the experts": (config(_experts_implementation={"": "a/kernel@main:f"}), ()),
    "a timm backbone": (config(**DETR | {"use_timm_backbone": True}), ()),
    "a model of two others": (
        config(
            model_type="encoder-decoder",
            encoder={"model_type": "llama"}, decoder={"model_type": "llama"},
        ), (),
    ),
    "a type deep inside": (config(parts=[{"model_type": "timm_wrapper"}]), ()),
    "a type that is no text": (config(model_type=["llama"]), ()),
    "another config in its place": (config(configuration_files=["config.4.0.0.json"]), ()),
    "code of another repository": (
        config(auto_map={"AutoConfig": "attacker/code--code.C"}), ("--trust-remote-code",),
    ),
    "a tokenizer's code of another repository": (
        json_file("tokenizer_config.json", auto_map={"AutoTokenizer": ["a/b--c.T", None]}),
        ("--trust-remote-code",),
    ),
    # Files elsewhere.
    "a tokenizer's file elsewhere": (
        json_file("tokenizer_config.json", tokenizer_file=f"AIM/{SECRET}"), (),
    ),
    "a vocabulary elsewhere": (json_file("tokenizer_config.json", vocab=f"AIM/{SECRET}"), ()),
    "a vocabulary elsewhere, by the special tokens": (
        json_file("special_tokens_map.json", vocab_file=f"AIM/{SECRET}"), (),
    ),
    "a tokenizer's arguments by order": (
        json_file("tokenizer_config.json", init_inputs=[f"AIM/{SECRET}"]), (),
    ),
    "a sentencepiece model elsewhere": (
        json_file("tokenizer_config.json", sp_model_kwargs={"model_file": f"AIM/{SECRET}"}), (),
    ),
    "a tokenizer of several models": (
        json_file("tokenizer_config.json", tokenizer_class="RagTokenizer"), (),
    ),
    "a tokenizer with a program": (
        json_file("tokenizer_config.json", tokenizer_class="BertJapaneseTokenizer"), (),
    ),
    "weights elsewhere": (config(transformers_weights=f"../outside/{SECRET}"), ()),
    "shards above": (index(a=f"../outside/{SECRET}"), ()),
    "shards at an absolute path": (index(a=f"AIM/{SECRET}"), ()),
    "a config that is a link": (link("config.json"), ()),
    "a tokenizer that is a link": (link("tokenizer.json"), ()),
    "weights that are a link": (link("model.safetensors"), ()),
    "code that is a link": (link("code.py"), ("--trust-remote-code",)),
    "a further template that is a link": (link("additional_chat_templates/rag.jinja"), ()),
    "a folder of templates that is a link": (
        link("additional_chat_templates", "AIM/templates"), (),
    ),
    "a folder of templates that is a link to an empty one": (
        link("additional_chat_templates", "AIM/empty"), (),
    ),
    "code for generating in a folder that is a link": (
        link("custom_generate", "AIM/templates"), ("--trust-remote-code",),
    ),
    # No files, and files of no sane size.
    "a circle of links": (link("generation_config.json", "generation_config.json"), ()),
    "a config that is a pipe": (fifo("config.json"), ()),
    "a tokenizer that is a pipe": (fifo("tokenizer.json"), ()),
    "weights that are a pipe": (fifo("model.safetensors"), ()),
    "a config without end": (link("config.json", "/dev/zero"), ()),
    "a config of a gigabyte of nothing": (sparse("config.json", 1 << 30), ()),
    "a tokenizer of a terabyte of nothing": (sparse("tokenizer.json", 1 << 40), ()),
    "a tokenizer that is nested without end": (text("tokenizer.json", DEEP), ()),
    "a tokenizer's config that is nested without end": (text("tokenizer_config.json", DEEP), ()),
    "layers without end": (config(num_hidden_layers=1 << 64), ()),
    "layers without end, deep inside": (config(text_config={"n_layers": 1 << 31}), ()),
    "far more layers than weights": (config(num_hidden_layers=9_000), ()),
    "many more layers than weights": (config(num_hidden_layers=600), ()),
    "a width without end": (config(hidden_size=1_000_000_000), ()),
    "a vocabulary without end": (config(vocab_size=1 << 40), ()),
    "half a character": (text("config.json", r'{"model_type": "llama", "x": "\ud800"}'), ()),
    "a header of no sane size": (
        text("model.safetensors", (1 << 62).to_bytes(8, "little") + b"{}"), (),
    ),
    "a header that is nested without end": (
        text("model.safetensors", (200_000).to_bytes(8, "little") + DEEP.encode()), (),
    ),
    "an index that is nested without end": (text("model.safetensors.index.json", DEEP), ()),
    "a type with control characters": (config(model_type="\x1b[2J\n::error::x\u202e"), ()),
    "a shard with control characters": (index(a="../\x1b]0;x\x07\n::error::y"), ()),
}  # fmt: skip
"""Each must end with exit code 2 and one line; with the options that it is given."""

BROKEN: dict[str, Change] = {
    "a size in words": config(vocab_size="many"),
    "an epsilon in words": config(rms_norm_eps="\x1b[2J"),
    "a model without layers": config(num_hidden_layers=0),
    "weights of a terabyte of nothing": grown("model.safetensors", 1 << 40),
    "a terabyte of nothing beside the weights": sparse("extra.safetensors", 1 << 40),
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


def made(good: Path, folder: Path, change: Change, aim: Path) -> Path:
    """A copy of a good model's folder, changed."""
    shutil.copytree(good, folder)
    change(folder, aim)
    return folder
