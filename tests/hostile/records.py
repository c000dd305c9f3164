"""Plans, reports, and the records beside engines."""

from __future__ import annotations

import copy
import hashlib
import random
from collections.abc import Iterator
from typing import Any

from tests.hostile.configs import ACTIVE, ODD
from tests.hostile.spoilt import Spoilt, mutation, read

_LEADING_OUT = ("../beside/secret.txt", "/etc/hostname", "../../beside/evil/model.safetensors",
"../in/text.txt", "/dev/zero", "", ".", "..", "a\x00b", "~/x", 7, None, "../victim/mine.txt",
"sub/../../victim/mine.txt", "plan.json")  # fmt: skip


@mutation("plan", hostile=True)
def replacements_elsewhere(spoilt: Spoilt, rng: random.Random) -> None:
    result = spoilt.json("plan.json")
    result["replacements"]["path"] = path = rng.choice(_LEADING_OUT[:5])
    target = (spoilt.folder / path).resolve()
    if target.is_file():
        result["replacements"]["sha256"] = hashlib.sha256(target.read_bytes()).hexdigest()
    spoilt.note(path)
    spoilt.put_json("plan.json", result)


@mutation("plan")
def odd_plan(spoilt: Spoilt, rng: random.Random) -> None:
    result = spoilt.json("plan.json")
    deletion = {
        "layer": rng.choice((*ODD, 1, 2)),
        "kind": rng.choice(("attention", "mlp", "block", "x", "attention\x1b[2J", 7)),
        "replacement": rng.choice(("none", "bias", "linear", "x")),
    }
    change = rng.choice((
        {"deletions": [deletion]}, {"deletions": [deletion] * 3}, {"deletions": []},
        {"deletions": [{"layer": n, "kind": "attention",
        "replacement": "none"} for n in range(10_000)]},
        {"replacements": {"path": rng.choice(_LEADING_OUT), "sha256": rng.choice(("0" * 64, "x",
        7))}}, {"replacements": rng.choice(ODD)}, {"schema_version": rng.choice((0, 99, "x",
        None))}, {"kind": "x"},
        {"made_from": {"model": "x\n::error::"}}, {"command": ["a\x1b[2J"]},
        {"budget": {"x": ODD[0]}}, {"predicted": {"a": {"b": 1}}}, {"importance_sha256": "../x"},
        {"versions": {"x\n::error::": "\x1b"}}, {"new": 1},
        {"drop_attn_list": [True] * 3}, {"block_configs": [{"attention": {"no_op": True}}] * 3},
        {"num_hidden_layers": 10**9, "drop_mlp_list": [1]},
    ))  # fmt: skip
    spoilt.note(str(change)[:100])
    spoilt.put_json("plan.json", {**result, **change})


@mutation("plan")
def of_others(spoilt: Spoilt, rng: random.Random) -> None:
    """A config of another program, taken for a plan."""
    spoilt.put_json("plan.json", rng.choice((
        {"drop_attn_list": rng.choice(ODD), "drop_mlp_list": [1]}, {"drop_attn_list": [0, 99]},
        {"block_configs": rng.choice(ODD)},
        {"block_configs": [{"attention": {"no_op": "x"}, "ffn": 7}]},
        {"block_configs": [{"subblock": {"x": 1}}] * 9},
        {},
    )))  # fmt: skip


@mutation("plan")
def spoilt_replacements(spoilt: Spoilt, rng: random.Random) -> None:
    path = spoilt.folder / "healed.safetensors"
    content = bytearray(read(path))
    for _ in range(rng.choice((1, 3, 20))):
        content[rng.randrange(len(content))] = rng.randrange(256)
    if rng.random() < 0.3:
        content[:8] = rng.choice((2**63, 10**9, 0)).to_bytes(8, "little")
    path.write_bytes(content)
    result = spoilt.json("plan.json")
    result["replacements"]["sha256"] = hashlib.sha256(content).hexdigest()
    spoilt.put_json("plan.json", result)


@mutation("records")
def any_value(spoilt: Spoilt, rng: random.Random) -> None:
    """Anything anywhere in one of the folder's JSON files."""
    name = rng.choice(spoilt.files(".json")).name
    result = spoilt.json(name)
    for _ in range(rng.choice((1, 1, 2, 5))):
        spots = list(spots_of(result))
        if not spots:
            return
        holder, key = rng.choice(spots)
        spoilt.note(f"{name}: {str(key)[:40]}")
        odd = rng.choice((*ODD, "../beside/secret.txt", "/etc/hostname", "attacker/model",
        "<script>", "![x](http://attacker/x)", "=cmd()",))  # fmt: skip
        holder[key] = copy.deepcopy(odd)  # which may be spoilt, too
    spoilt.put_json(name, result)


@mutation("records")
def any_key(spoilt: Spoilt, rng: random.Random) -> None:
    name = rng.choice(spoilt.files(".json")).name
    result = spoilt.json(name)
    spots = [(holder, key) for holder, key in spots_of(result) if isinstance(holder, dict)]
    holder, key = rng.choice(spots)
    value = holder.pop(key)
    if rng.random() < 0.6:
        holder[f"{key}{rng.choice(ACTIVE)}"] = value
    spoilt.note(f"{name}: {key}")
    spoilt.put_json(name, result)


def spots_of(told: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a JSON value."""
    for key, value in (
        told.items()
        if isinstance(told, dict)
        else enumerate(told)
        if isinstance(told, list)
        else ()
    ):
        yield told, key
        yield from spots_of(value)


@mutation("records")
def engine_elsewhere(spoilt: Spoilt, rng: random.Random) -> None:
    if not (spoilt.folder / "m.engine.json").is_file():
        return any_value(spoilt, rng)
    key = rng.choice(("engine", "engine_sha256", "engine_bytes", "backend"))
    spoilt.change("m.engine.json", key, rng.choice((*_LEADING_OUT, 2**63)))
    return None
