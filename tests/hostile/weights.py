"""What libraries read as bytes: weights and their indexes, pickles, pictures and recordings."""

from __future__ import annotations

import io
import json
import os
import random
import struct
import zipfile
from typing import Any

from tests.hostile.place import PWNED
from tests.hostile.spoilt import ACTIVE, ELSEWHERE, Spoilt, mutation, read

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_TARGETS = (*ELSEWHERE, "", ".", "..", "sub/model.safetensors", "nowhere.safetensors",
"model.safetensors/", "a\x00b", "config.json", 7, None, ["x"], {"a": "b"}, "x" * 300, "~/x",
"model\n::error::x.safetensors")  # fmt: skip
_INDEXES: list[Any] = [
    {}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"a": {"b": "c"}}}, [], 7, None,
    {"weight_map": "x"}, {"weight_map": {"a" * 100_000: "b"}},
    {"weight_map": {"model.norm.weight": _INDEX}},
    {"weight_map": {str(n): f"m{n}.safetensors" for n in range(20_000)}},
]  # fmt: skip
_ENTRIES: list[dict[str, Any]] = [
    *({"data_offsets": offsets} for offsets in ([0, 8], [-8, 8], [8, 0], [2**62, 2**63], "x", [0],
      [0.5, 1.5], None, [0, 1 << 20])),
    *({"shape": shape} for shape in ([2**40, 2**40], [-1], [0], "x", [1] * 100_000, [10**30],
      [True], None, [])),
    *({"dtype": dtype} for dtype in ("F999", None, "I8", "BF16", ["F32"], "F4",
      "F32\n::error::x")), {"extra": 1},
]  # fmt: skip
_METADATA: list[Any] = [
    {"format": "tf"}, {"format": "flax"}, {"format": "mlx"}, {}, {"format": 7}, None, "x",
    {"format": "pt", "x": "y" * 10**6}, {"format": "\x1b[2J"}, {"format": "../x"}, [1],
]  # fmt: skip
_HEADERS: list[Any] = [
    [], 7, b"\xff\xfe", b"[" * 50_000, b"", b'{"a":' * 2000 + b"1" + b"}" * 2000,
    b"{" + b'"a":1,' * 9, {}, {"x": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}},
]  # fmt: skip


def _parts(spoilt: Spoilt) -> tuple[dict[str, Any], bytes, list[str]]:
    """A safetensors file's header, its data, and the names of its weights."""
    content = read(spoilt.folder / _SINGLE)
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    return header, content[8 + length :], [name for name in header if name != "__metadata__"]


def _write(spoilt: Spoilt, header: Any, data: bytes, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = struct.pack("<Q", len(text) if length is None else length % 2**64)
    spoilt.write(_SINGLE, size + text + data)


@mutation("index", hostile=True)
def shard_elsewhere(spoilt: Spoilt, rng: random.Random) -> None:
    names = _parts(spoilt)[2]
    places = dict.fromkeys(names, "model-1.safetensors")
    places[rng.choice(names)] = target = rng.choice(ELSEWHERE)
    spoilt.note(target)
    (spoilt.folder / _SINGLE).rename(spoilt.folder / "model-1.safetensors")
    spoilt.put_json(_INDEX, {"metadata": {}, "weight_map": places})


@mutation("index")
def odd_index(spoilt: Spoilt, rng: random.Random) -> None:
    names = _parts(spoilt)[2]
    places: dict[str, Any] = dict.fromkeys(names, "model-1.safetensors")
    places[rng.choice([*names, "new", "\x1b[31m"])] = rng.choice(_TARGETS)
    if rng.random() < 0.3:
        del places[names[0]]
    metadata = rng.choice(({}, None, {"total_size": 10**30}, [1], {"total_size": "x"}))
    result = {"metadata": metadata, "weight_map": places}
    result = result if rng.random() < 0.5 else rng.choice(_INDEXES)
    spoilt.note(result)
    if rng.random() < 0.8:
        (spoilt.folder / _SINGLE).rename(spoilt.folder / "model-1.safetensors")
    spoilt.put_json(rng.choice((_INDEX, _INDEX, "pytorch_model.bin.index.json")), result)


@mutation("safetensors")
def entry(spoilt: Spoilt, rng: random.Random) -> None:
    """A weight's entry is none, is another weight's name, or says what can't be."""
    header, data, names = _parts(spoilt)
    name, change = rng.choice(names), rng.choice(_ENTRIES)
    spoilt.note(f"{name}: {change}")
    value = {**header.pop(name), **change}
    if rng.random() < 0.2:
        name = rng.choice(("other", f"{name}.weight", "lm_head.weight", f"evil{ACTIVE[0]}"))
    header[name] = value if rng.random() < 0.9 else rng.choice((7, None, [], "x"))
    _write(spoilt, header, data)


@mutation("safetensors")
def odd_header(spoilt: Spoilt, rng: random.Random) -> None:
    header, data, _ = _parts(spoilt)
    with_metadata = {**header, "__metadata__": rng.choice(_METADATA)}
    text = rng.choice((with_metadata, *_HEADERS))
    length = rng.choice((2**63, 2**64 - 1, 10**9, 100_000_001, 0, 1, len(data), 8))
    spoilt.note(f"{str(text)[-80:]} {length}")
    if rng.random() < 0.5:
        _write(spoilt, text, data)
    else:
        _write(spoilt, header, data, length)


@mutation("safetensors")
def length_of_file(spoilt: Spoilt, rng: random.Random) -> None:
    path = spoilt.write(_SINGLE, read(spoilt.folder / _SINGLE))
    have = path.stat().st_size
    size = rng.choice((0, 3, 8, 100, have - 1, have + 1, 1 << 40, 1 << 33))
    spoilt.note(size)
    os.truncate(path, size)


@mutation("safetensors")
def not_finite(spoilt: Spoilt, rng: random.Random) -> None:
    header, data, _ = _parts(spoilt)
    changed = bytearray(data)
    for _ in range(rng.choice((1, 9, 400))):
        number = rng.choice((float("nan"), float("inf"), 1e38, -1e38))
        struct.pack_into("<f", changed, rng.randrange(len(data) // 4) * 4, number)
    _write(spoilt, header, bytes(changed))


@mutation("safetensors")
def whole_terabyte(spoilt: Spoilt, rng: random.Random) -> None:
    """A valid header over a hole in the file."""
    size = rng.choice((1 << 40, 3 << 30))
    _write(spoilt, {"model.embed_tokens.weight": {"dtype": "F32", "shape": [size // 4 // 32, 32],
    "data_offsets": [0, size]}}, b"")  # fmt: skip
    path = spoilt.folder / _SINGLE
    os.truncate(path, path.stat().st_size + size)
    if rng.random() < 0.5:
        spoilt.change("config.json", "vocab_size", size // 4 // 32)


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
    if rng.random() < 0.8:
        (spoilt.folder / _SINGLE).unlink()
    name = rng.choice(("pytorch_model.bin", "pytorch_model.bin", "model.pt",
    "pytorch_model-00001-of-00002.bin", "adapter_model.bin", "tf_model.h5",
    "flax_model.msgpack",))  # fmt: skip
    content, whole = _pickle(spoilt, rng), io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        for part, text in {"data.pkl": content, "version": "3\n", "byteorder": "little"}.items():
            archive.writestr(f"archive/{part}", text)
    spoilt.note(name)
    spoilt.write(name, rng.choice((content, whole.getvalue())))
    if rng.random() < 0.3:
        places = {"a": rng.choice((name, "../beside/x.bin"))}
        spoilt.put_json("pytorch_model.bin.index.json", {"weight_map": places})


@mutation("pickle")
def other_pickles(spoilt: Spoilt, rng: random.Random) -> None:
    names = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "tokenizer.pkl",
    "vocab.pkl", "spiece.model", "custom_ops.so")  # fmt: skip
    for name in rng.sample(names, 5):
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
    spoilt.note(result)
    spoilt.put_json("adapter_config.json", result)
    if rng.random() < 0.5:
        spoilt.write("adapter_model.bin", _pickle(spoilt, rng))


@mutation("adapter")
def adapter_alone(spoilt: Spoilt, rng: random.Random) -> None:
    adapter(spoilt, rng)
    (spoilt.folder / "config.json").unlink()


def _picture(width: int, height: int, content: bytes) -> bytes:
    head = struct.pack("<2sIHHI", b"BM", 54 + len(content), 0, 0, 54)
    return head + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0) + content


def _sound(rng: random.Random) -> bytes:
    form = struct.pack("<HHIIHH", 1, rng.choice((1, 0, 9999)), rng.choice((16_000, 0, 2**31)),
    32_000, rng.choice((2, 0)), rng.choice((16, 32, 7)))  # fmt: skip
    crumbs = b"fact\0\0\0\0" * rng.choice((0, 5, 2_000_000))
    data = b"data" + struct.pack("<I", rng.choice((800, 2**31, 0))) + bytes(800)
    whole = b"WAVEfmt " + struct.pack("<I", len(form)) + form + crumbs + data
    return b"RIFF" + struct.pack("<I", rng.choice((len(whole), 2**32 - 1, 4))) + whole


@mutation("media")
def a_file(spoilt: Spoilt, rng: random.Random) -> None:
    name = os.fsdecode(rng.choice((b"0", b"\xff", b"a\n::error::x", b"\x1b[2J")))
    if (spoilt.folder / "sounds").is_dir():
        spoilt.write(f"sounds/{name}.wav", _sound(rng))
    else:
        size = rng.choice(((64, 64 * 64), (1, 1), (2**31 - 1, 2**31 - 1), (0, 9), (9, -9)))
        spoilt.write(f"pictures/{name}.bmp", _picture(*size, bytes(rng.choice((0, 3 * 64**3)))))
    spoilt.note(name)
