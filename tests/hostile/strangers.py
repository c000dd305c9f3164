"""What else strangers bring: templates, pictures, recordings, task files, histories, reports."""

from __future__ import annotations

import copy
import json
import os
import random
import struct
from typing import Any

from tests.hostile.configs import ACTIVE, ODD
from tests.hostile.records import spots_of
from tests.hostile.spoilt import Spoilt, mutation

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
_HUGE: tuple[Any, ...] = (
    10**8, 2**63, 10**400, -(10**8), 1e300, 5e-324, float("nan"), float("inf"), "9" * 5_000,
    "\ud800", "\n::error::x", "##vso[task.setvariable]x", "\x1b[2J", "\u202e", "a\0b", 4096,
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
_ITEM = {"query": "the", "choices": ["a", "b"], "gold": 0}


def _any_of(value: Any, rng: random.Random) -> Any:
    """The same with one or two values that no file of ours has."""
    for _ in range(rng.choice((1, 1, 2))):
        holder, key = rng.choice(list(spots_of(value)))
        holder[key] = copy.deepcopy(rng.choice((*_HUGE, *ODD)))
    return value


@mutation("template")
def a_template(spoilt: Spoilt, rng: random.Random) -> None:
    text = rng.choice(_TEMPLATES)
    spoilt.note(text[:60].encode("utf-8", "backslashreplace"))
    if rng.random() < 0.5:
        spoilt.write("chat_template.jinja", text)
    else:
        spoilt.change("tokenizer_config.json", "chat_template", text)


@mutation("tokenizer")
def an_endless_tokenizer(spoilt: Spoilt, rng: random.Random) -> None:
    replace = {"type": "Replace", "pattern": {"String": "e"}, "content": "e" * rng.choice((2, 50))}
    part, result = rng.choice((
        ("normalizer", {"type": "Sequence", "normalizers": [replace] * rng.choice((1, 6, 30))}),
        ("normalizer", {"type": "Prepend", "prepend": "e" * rng.choice((1, 1 << 20))}),
        ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": rng.choice((
            "(?:[a-z ]+)+$", r"[\s\S]*(?<=Q)", "(a|a|e)*z"))}, "behavior": "Isolated",
            "invert": False}),
    ))  # fmt: skip
    spoilt.note(str(result)[:80])
    spoilt.change("tokenizer.json", part, result)


@mutation("media settings")
def settings_of_a_reader(spoilt: Spoilt, rng: random.Random) -> None:
    for key in rng.sample(sorted(_READERS), rng.choice((1, 2, 3))):
        spoilt.change("preprocessor_config.json", key, rng.choice(_READERS[key]))


@mutation("media settings")
def settings_of_answers(spoilt: Spoilt, rng: random.Random) -> None:
    name = rng.choice(("bad_words_ids", "suppress_tokens", "forced_decoder_ids", "eos_token_id",
    "max_source_positions", "num_mel_bins", "image_size", "num_channels"))  # fmt: skip
    value = rng.choice((*_HUGE, [[1, 2]] * 800_000, [3] * 800_000, []))
    for file in ("generation_config.json", "config.json"):
        spoilt.change(file, name, value)


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
    spoilt.note(repr(name))


@mutation("task files")
def a_line(spoilt: Spoilt, rng: random.Random) -> None:
    text = json.dumps(_any_of(json.loads(json.dumps(_ITEM)), rng))
    line = rng.choice((text, text, text, "[" * 100_000, "\xff", "{}", '{"query": "\ud800"}'))
    name = rng.choice(("mine", "mine", f"x{rng.choice(ACTIVE[:5])}".replace("\0", "")))
    spoilt.write(f"{name}.jsonl", f"{json.dumps(_ITEM)}\n{line}\n")
    spoilt.note(line[:80].encode("utf-8", "backslashreplace"))


@mutation("records")
def numbers_and_names(spoilt: Spoilt, rng: random.Random) -> None:
    name = rng.choice(spoilt.files(".json")).name
    spoilt.put_json(name, _any_of(spoilt.json(name), rng))


@mutation("history")
def an_earlier_run(spoilt: Spoilt, rng: random.Random) -> None:
    path = spoilt.place.out / "history.jsonl"
    result = {"schema_version": 1, "kind": "history_entry", "commit": "a", "verdict": "passed",
    "metrics": {"speedup": 1.0}, "time": "2026-01-01T00:00:00Z"}  # fmt: skip
    line = rng.choice((json.dumps(_any_of(result, rng)), "[" * 9999, "{", "\0", "null"))
    if rng.random() < 0.2:
        path.symlink_to(spoilt.place.victim / "mine.txt")
    else:
        path.write_text(f"{line}\n" * rng.choice((1, 2, 500)))


@mutation("graph")
def a_noted_plan(spoilt: Spoilt, rng: random.Random) -> None:
    import onnx

    path = spoilt.folder / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    entry = model.metadata_props.add()
    result = [{"layer": 1, "kind": "attention", "replacement": "none"}]
    entry.key, entry.value = "depthcut.plan", json.dumps(_any_of(result, rng))
    spoilt.write("model.onnx", model.SerializeToString())
