"""Indexes, safetensors files and pickles."""

from __future__ import annotations

import json
import os
import random
import struct
from pathlib import Path
from typing import Any

from tests.hostile.configs import ACTIVE
from tests.hostile.place import PWNED
from tests.hostile.spoilt import Spoilt, mutation, read

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_TARGETS = ("../beside/evil/model.safetensors", "/etc/hostname", "/dev/zero", "", ".", "..",
"sub/model.safetensors", "nowhere.safetensors", "../../beside/secret.txt", "model.safetensors/",
"a\x00b", "config.json", 7, None, ["x"], {"a": "b"}, "x" * 300, "~/x",
"model\n::error::x.safetensors")  # fmt: skip


def _header(path: Path) -> tuple[dict[str, Any], bytes]:
    content = read(path)
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _file(header: Any, data: bytes, *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length % 2**64) + text + data


@mutation("index", hostile=True)
def shard_elsewhere(spoilt: Spoilt, rng: random.Random) -> None:
    header, _ = _header(spoilt.folder / _SINGLE)
    names = [name for name in header if name != "__metadata__"]
    places: dict[str, Any] = dict.fromkeys(names, "model-1.safetensors")
    target = rng.choice(_TARGETS[:3])
    places[rng.choice(names)] = target
    spoilt.note(f"shard {target!r}")
    (spoilt.folder / _SINGLE).rename(spoilt.folder / "model-1.safetensors")
    spoilt.put_json(_INDEX, {"metadata": {}, "weight_map": places})


@mutation("index")
def odd_shard(spoilt: Spoilt, rng: random.Random) -> None:
    header, _ = _header(spoilt.folder / _SINGLE)
    names = [name for name in header if name != "__metadata__"]
    places: dict[Any, Any] = dict.fromkeys(names, "model-1.safetensors")
    places[rng.choice([*names, "new", "\x1b[31m"])] = target = rng.choice(_TARGETS)
    if rng.random() < 0.3:
        del places[names[0]]
    spoilt.note(f"shard {target!r}")
    if rng.random() < 0.8:
        (spoilt.folder / _SINGLE).rename(spoilt.folder / "model-1.safetensors")
    metadata = rng.choice(({}, None, {"total_size": 10**30}, [1], {"total_size": "x"}))
    spoilt.put_json(_INDEX, {"metadata": metadata, "weight_map": places})


@mutation("index")
def odd_index(spoilt: Spoilt, rng: random.Random) -> None:
    if rng.random() < 0.7:
        (spoilt.folder / _SINGLE).rename(spoilt.folder / "model-1.safetensors")
    result = rng.choice((
        {}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"a": {"b": "c"}}}, [], 7, None,
        {"weight_map": "x"},
        {"weight_map": {"a" * 100_000: "b"}}, {"weight_map": {"model.norm.weight": _INDEX}},
        {"weight_map": {str(n): f"m{n}.safetensors" for n in range(20_000)}},
    ))  # fmt: skip
    spoilt.note(str(result)[:80])
    spoilt.put_json(rng.choice((_INDEX, _INDEX, "pytorch_model.bin.index.json")), result)


@mutation("safetensors")
def length(spoilt: Spoilt, rng: random.Random) -> None:
    header, data = _header(spoilt.folder / _SINGLE)
    result = rng.choice((2**63, 2**64 - 1, 10**9, 100_000_001, 0, 1, len(data), 8))
    spoilt.note(result)
    spoilt.write(_SINGLE, _file(header, data, length=result))


@mutation("safetensors")
def entry(spoilt: Spoilt, rng: random.Random) -> None:
    header, data = _header(spoilt.folder / _SINGLE)
    name = rng.choice([name for name in header if name != "__metadata__"])
    change = rng.choice((
        {"data_offsets": [0, 8]}, {"data_offsets": [-8, 8]}, {"data_offsets": [8, 0]},
        {"data_offsets": [2**62, 2**63]},
        {"data_offsets": [0, len(data)]}, {"data_offsets": "x"}, {"data_offsets": [0]},
        {"data_offsets": [0.5, 1.5]},
        {"shape": [2**40, 2**40]}, {"shape": [-1]}, {"shape": [0]}, {"shape": "x"},
        {"shape": [1] * 100_000}, {"shape": [10**30]},
        {"dtype": "F999"}, {"dtype": None}, {"dtype": "I8"}, {"dtype": "BF16"}, {"dtype": ["F32"]},
        {"dtype": "F4"}, {"dtype": "F32\n::error::x"},
        {"shape": [True]}, {"extra": 1}, {"shape": None}, {"data_offsets": [len(data) - 4,
        len(data) + 4]}, {"shape": []},
    ))  # fmt: skip
    spoilt.note(f"{name}: {str(change)[:80]}")
    header[name] = (
        {**header[name], **change} if rng.random() < 0.9 else rng.choice((7, None, [], "x"))
    )
    spoilt.write(_SINGLE, _file(header, data))


@mutation("safetensors")
def odd_header(spoilt: Spoilt, rng: random.Random) -> None:
    header, data = _header(spoilt.folder / _SINGLE)
    metadata = rng.choice((
        {"format": "tf"}, {"format": "flax"}, {"format": "mlx"}, {}, {"format": 7}, None, "x",
        {"format": "pt", "x": "y" * 10**6},
        {"format": "\x1b[2J"}, {"format": "../x"}, [1],
    ))  # fmt: skip
    text = rng.choice((
        {**header, "__metadata__": metadata}, {**header, "__metadata__": metadata},
        {**header, f"evil{rng.choice(ACTIVE)}": header[next(reversed(header))]}, [], 7, b"\xff\xfe",
        b"[" * 50_000, b"",
        b'{"a":' * 2000 + b"1" + b"}" * 2000, b"{" + b'"a":1,' * 9, {}, {"x": {"dtype": "F32",
        "shape": [0], "data_offsets": [0, 0]}},
    ))  # fmt: skip
    spoilt.note(str(text)[-80:])
    spoilt.write(_SINGLE, _file(text, data))


@mutation("safetensors")
def length_of_file(spoilt: Spoilt, rng: random.Random) -> None:
    path = spoilt.write(_SINGLE, read(spoilt.folder / _SINGLE))
    size = rng.choice(
        (0, 3, 8, 100, path.stat().st_size - 1, path.stat().st_size + 1, 1 << 40, 1 << 33)
    )
    spoilt.note(size)
    os.truncate(path, size)


@mutation("safetensors")
def not_finite(spoilt: Spoilt, rng: random.Random) -> None:
    header, data = _header(spoilt.folder / _SINGLE)
    changed = bytearray(data)
    for _ in range(rng.choice((1, 9, 400))):
        place = rng.randrange(len(data) // 4) * 4
        changed[place : place + 4] = struct.pack(
            "<f", rng.choice((float("nan"), float("inf"), 1e38, -1e38))
        )
    spoilt.write(_SINGLE, _file(header, bytes(changed)))


@mutation("safetensors")
def whole_terabyte(spoilt: Spoilt, rng: random.Random) -> None:
    """A valid header over a hole in the file."""
    size = rng.choice((1 << 40, 3 << 30))
    result = {"model.embed_tokens.weight": {"dtype": "F32", "shape": [size // 4 // 32, 32],
    "data_offsets": [0, size]}}  # fmt: skip
    path = spoilt.write(_SINGLE, _file(result, b""))
    os.truncate(path, path.stat().st_size + size)
    if rng.random() < 0.5:
        spoilt.change("config.json", "vocab_size", size // 4 // 32)


@mutation("safetensors")
def missing(spoilt: Spoilt, rng: random.Random) -> None:
    header, data = _header(spoilt.folder / _SINGLE)
    name = rng.choice([name for name in header if name != "__metadata__"])
    header[rng.choice(("other", f"{name}.weight", "lm_head.weight"))] = header.pop(name)
    spoilt.write(_SINGLE, _file(header, data))


def _pickle(spoilt: Spoilt, rng: random.Random) -> bytes:
    """Code that tells that it ran, or that reads a secret, as a pickle of the oldest protocol."""
    target = spoilt.place.beside / PWNED
    call = rng.choice((
        f"cposix\nsystem\n(S'touch {target}'\ntR.", f"cbuiltins\nopen\n(S'{target}'\nS'w'\ntR.",
        f"cbuiltins\neval\n(S\"open('{target}','w')\"\ntR.", f"cpathlib\nPath\n(S'{target}'\ntR.",
        f"ctorch.serialization\nload\n(S'{target}'\ntR.",
    ))  # fmt: skip
    return call.encode()


@mutation("pickle")
def pickled_weights(spoilt: Spoilt, rng: random.Random) -> None:
    import io
    import zipfile

    if rng.random() < 0.8:
        (spoilt.folder / _SINGLE).unlink()
    name = rng.choice(("pytorch_model.bin", "pytorch_model.bin", "model.pt",
    "pytorch_model-00001-of-00002.bin", "adapter_model.bin", "tf_model.h5",
    "flax_model.msgpack",))  # fmt: skip
    content = _pickle(spoilt, rng)
    if rng.random() < 0.5:
        whole = io.BytesIO()
        with zipfile.ZipFile(whole, "w") as archive:
            archive.writestr("archive/data.pkl", content)
            archive.writestr("archive/version", "3\n")
            archive.writestr("archive/byteorder", "little")
        content = whole.getvalue()
    spoilt.note(name)
    spoilt.write(name, content)
    if rng.random() < 0.3:
        spoilt.put_json(
            "pytorch_model.bin.index.json",
            {"weight_map": {"a": rng.choice((name, "../beside/x.bin"))}},
        )


@mutation("pickle")
def other_pickles(spoilt: Spoilt, rng: random.Random) -> None:
    for name in (
        "training_args.bin",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "tokenizer.pkl",
        "vocab.pkl",
        "spiece.model",
        "custom_ops.so",
    ):
        if rng.random() < 0.6:
            spoilt.write(name, _pickle(spoilt, rng))


@mutation("adapter", hostile=True)
def adapter(spoilt: Spoilt, rng: random.Random) -> None:
    base = rng.choice(("attacker/model", "../beside/evil", str(spoilt.place.beside / "evil")))
    result = rng.choice((
        {"peft_type": "LORA", "base_model_name_or_path": base, "r": 1,
        "target_modules": ["q_proj"]},
        {"peft_type": "LORA", "base_model_name_or_path": base,
        "auto_mapping": {"base_model_class": "Model", "parent_library": "payload"}},
        {"base_model_name_or_path": base}, {}, [], {"peft_type": "../x"},
    ))  # fmt: skip
    spoilt.note(str(result)[:80])
    spoilt.put_json("adapter_config.json", result)
    if rng.random() < 0.5:
        spoilt.write("adapter_model.bin", _pickle(spoilt, rng))


@mutation("adapter")
def adapter_alone(spoilt: Spoilt, rng: random.Random) -> None:
    adapter(spoilt, rng)
    (spoilt.folder / "config.json").unlink()
