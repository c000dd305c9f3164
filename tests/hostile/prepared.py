"""Folders of results that a stranger prepared: what depthcut keeps there itself leads elsewhere."""

from __future__ import annotations

import hashlib
import json
import os
import random
from pathlib import Path
from typing import Any

from tests.hostile.configs import ODD
from tests.hostile.spoilt import Spoilt, mutation, read


def _ours(spoilt: Spoilt, rng: random.Random) -> list[Path]:
    """Folders of depthcut's that the command will look at."""
    out, paths = spoilt.place.out, [spoilt.place.out / ".depthcut"]
    for name in spoilt.command.results:
        paths += [out / ".depthcut" / "results" / (name.rstrip(".") or "model.onnx")] * 3
        if name == "res" and spoilt.command.name in ("export", "compare", "sweep"):
            paths += [out / "res" / ".depthcut"] * 3
    return paths


def _made(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


def _put(path: Path, value: Any) -> None:
    """Writes JSON in the place of whatever another mutation has put there."""
    if os.path.lexists(path):
        path.unlink()
    path.write_text(json.dumps(value))


@mutation("prepared output", hostile=True)
def links_of_ours(spoilt: Spoilt, rng: random.Random) -> None:
    victim, home = spoilt.place.victim, rng.choice(_ours(spoilt, rng))
    spoilt.note(home)
    kind = rng.choice(("folder", "lock", "stages", "changing", "results", "kept", "above"))
    spoilt.note(kind)
    if kind in ("folder", "above"):
        target = (
            # What -o names is the user's own, be it a link.
            home.parent if kind == "above" and ".depthcut" in home.parent.parts else home
        )
        if not os.path.lexists(target):
            _made(target.parent)
            target.symlink_to(victim)
        return
    name = {"lock": "lock", "stages": "stages.json", "changing": "changing.json", "results":
    "results", "kept": "kept"}[kind]  # fmt: skip
    (_made(home) / name).symlink_to(
        rng.choice(
            (victim / "mine.txt", victim, spoilt.place.beside / "secret.json", victim / "new")
        )
    )


@mutation("prepared output")
def special_of_ours(spoilt: Spoilt, rng: random.Random) -> None:
    home = _made(rng.choice(_ours(spoilt, rng)))
    path = home / rng.choice(("lock", "stages.json", "changing.json", "stages-next.json", "work",
    "written.json", "changing.part", "new",))  # fmt: skip
    kind = rng.choice(("pipe", "folder", "text", "unreadable", "deep", "sparse"))
    spoilt.note(f"{path}: {kind}")
    if os.path.lexists(path):
        return
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_text({"deep": "[" * 100_000}.get(kind, "garbage\x1b[2J"))
        if kind == "unreadable":
            path.chmod(0)
        if kind == "sparse":
            os.truncate(path, 1 << 38)


@mutation("prepared output")
def stages(spoilt: Spoilt, rng: random.Random) -> None:
    """A memory of stages that names files of the user's."""
    victim, out = spoilt.place.victim, spoilt.place.out
    names = ("../victim/mine.txt", str(victim / "mine.txt"), "../../victim/mine.txt",
    "../notes.txt", ".depthcut/../../notes.txt", "letters/../../notes.txt", "a\x00b", "", "/",
    "..", "x/../../../beside/secret.txt", "link/mine.txt",)  # fmt: skip
    files = {name: _sha(out, name) for name in rng.sample(names, 4)}
    entry = {"key": "0" * 64, "files": files, "value": rng.choice((None, {"x": 1}, []))}
    result = rng.choice((
        {"stages": {"score": entry, "plan": entry, "export": entry}, "published": files},
        {"score": entry, "x\n::error::": entry},
        {"stages": {}, "published": files}, {"stages": [], "published": 7}, {"stages": {"score": 7},
        "published": {"a": 7}}, [], {"stages": {"score": {**entry, "files": 7}}, "published": {}},
        {"stages": {"score": {"key": 7, "files": {"a": "b"}, "value": ODD[0]}},
        "published": {"../letters/letter.txt": hashlib.sha256(b"x").hexdigest()}},
    ))  # fmt: skip
    for home in {out / ".depthcut", out / "res" / ".depthcut"}:
        _put(_made(home) / "stages.json", result)
    spoilt.note(str(result)[:150])
    if rng.random() < 0.3:
        (out / "res" / "link").symlink_to(victim)


def _sha(out: Path, name: str) -> str:
    path = out / "res" / name.replace("\x00", "")
    return hashlib.sha256(read(path)).hexdigest() if path.is_file() else "0" * 64


@mutation("prepared output")
def half_changed(spoilt: Spoilt, rng: random.Random) -> None:
    """A record of a change that names files of the user's."""
    home = _made(rng.choice(_ours(spoilt, rng)))
    (home / "new").mkdir(exist_ok=True)
    (home / "new" / "evil").write_text("evil")
    victim, out = spoilt.place.victim, spoilt.place.out
    finals = (str(victim / "mine.txt"), "../victim/mine.txt", "notes.txt", str(out / "notes.txt"),
    "../../beside/secret.txt", ".env.prod.old", "res", "", ".", "/etc/x", "a\x00b",
    "letters/letter.txt",)  # fmt: skip
    final, other = rng.choice(finals), rng.choice(finals)
    staged = rng.choice((str(home / "new" / "evil"), os.path.relpath(home / "new" / "evil", out),
    "../victim/mine.txt", str(victim / "mine.txt"), ".depthcut/new/evil",))  # fmt: skip
    record = {
        "changes": [{"staged": staged, "final": final, "new": _identity(out, staged),
        "old": rng.choice((None, _identity(out, final)))}] * rng.choice((0, 1)),
        "removals": [{"final": other, "old": _identity(out, other)}] * rng.choice((0, 1)),
    }  # fmt: skip
    result = rng.choice((record, record, record, [], {"changes": 7}, {"changes": [7], "removals":
    []}, {"changes": [{"final": 7}], "removals": [{}]},))  # fmt: skip
    spoilt.note(f"{home}: {str(result)[:150]}")
    _put(home / "changing.json", result)


def _identity(base: Path, name: str) -> list[int]:
    """As the record of a change has it. Whoever prepares a folder knows only his own file's."""
    from graph_passes.files.exchange import identity

    path = base / name.replace("\x00", "")
    return list(identity(path) or [7]) if path.name == "evil" else [4711, 4, 1]
