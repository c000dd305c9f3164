"""What stands in place of files: links, pipes, devices; in a folder, and in one of results."""

from __future__ import annotations

import hashlib
import json
import os
import random
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.hostile.spoilt import ACTIVE, ODD, Spoilt, mutation, read

_NEW = (
    "chat_template.jinja", "generation_config.json", "preprocessor_config.json",
    "additional_chat_templates/x.jinja", "README.md",
    "tokenizer.model", "special_tokens_map.json", "vocab.txt", "merges.txt", "added_tokens.json",
    "model.safetensors.index.json",
    "vocab.json", "genai_config.json", "payload.py", "onnx/model.onnx", "processor_config.json",
    "chat_template.json", "extra.safetensors",
    "model.onnx.data", "model.onnx_data", "prune.json", "plan.json", "pytorch_model.bin", "LICENSE",
    "tokenizer_config.json", "x.gguf",
)  # fmt: skip
_FOLDERS = ("additional_chat_templates", "onnx", "original", "1", "custom_generate", ".depthcut",
"sub", ".cache")  # fmt: skip
_OURS = ("lock", "stages.json", "changing.json", "stages-next.json", "work", "written.json",
"changing.part", "new", "results", "kept")  # fmt: skip


def _name(spoilt: Spoilt, rng: random.Random) -> Path:
    """A file that is there, which then isn't; or a new name that some library looks for."""
    named = [Path(part).name for part in spoilt.command.line.split()]
    there = [path.name for path in spoilt.files() if path.name not in named]
    path = spoilt.folder / (rng.choice(there) if there and rng.random() < 0.7 else rng.choice(_NEW))
    path.parent.mkdir(exist_ok=True)
    if os.path.lexists(path) and not path.is_dir():
        path.unlink()
    spoilt.note(path.name)
    return path


@mutation("links", hostile=True)
def link_out(spoilt: Spoilt, rng: random.Random) -> None:
    """By itself, or by way of a folder, of another link, or of another repository's blobs."""
    path, place = _name(spoilt, rng), spoilt.place
    secret, evil = place.beside / "secret.json", place.beside / "evil" / path.name
    blob = place.work / "hub" / "models--victim--private" / "blobs" / "a"
    steps = {spoilt.folder / "sub": place.beside, spoilt.folder / "step": secret, blob: secret}
    target = rng.choice((
        place.beside / "secret.txt", secret, evil if evil.exists() else secret,
        "/proc/self/environ", "/etc/hostname", "/proc/self/cwd/victim/mine.txt",
        place.victim / "mine.txt", place.home / ".ssh" / "id_rsa",
        os.path.relpath(secret, spoilt.folder), place.home / ".cache" / "huggingface" / "token",
        "sub/secret.json", "step", blob,
    ))  # fmt: skip
    spoilt.note(target)
    for step, leads_to in steps.items():
        if str(target).startswith((step.name, str(step))):
            step.parent.mkdir(parents=True, exist_ok=True)
            step.symlink_to(leads_to)
    path.symlink_to(target)


@mutation("links")
def odd_link(spoilt: Spoilt, rng: random.Random) -> None:
    path = _name(spoilt, rng)
    target = rng.choice((path.name, "nowhere", "/dev/zero", "/dev/stdin", "/dev/tty", ".", "..",
    "/", "config.json", "x" * 250, "/dev/full", "/proc/self/fd/0", "/proc/self/mem",
    "/dev/null",))  # fmt: skip
    spoilt.note(target)
    path.symlink_to(target)


@mutation("links")
def linked_folder(spoilt: Spoilt, rng: random.Random) -> None:
    """The whole folder, or a folder in it, is a link."""
    path, place = spoilt.folder, spoilt.place
    if rng.random() < 0.4 and "hub" not in path.parts:
        path.rename(place.work / "real")
        path.symlink_to(place.work / "real")
        return
    name = rng.choice(_FOLDERS)
    spoilt.note(name)
    target = rng.choice((place.beside, place.victim, "/proc/self", name, ".."))
    (path / name).symlink_to(target)


def _put_special(path: Path, spoilt: Spoilt, rng: random.Random) -> None:
    """What is no plain file, or none of a sane size, or not to be read."""
    kind = rng.choice(("pipe", "pipe", "socket", "folder", "device", "unreadable", "sparse", "deep",
    "link to a pipe"))  # fmt: skip
    spoilt.note(kind)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        here = Path.cwd()
        os.chdir(path.parent)  # a socket's name may have 107 bytes only
        try:
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(path.name)
        finally:
            os.chdir(here)
    elif kind == "folder":
        path.mkdir(exist_ok=True)
    elif kind == "device":
        try:
            os.mknod(path, 0o20644, os.makedev(1, 5))
        except PermissionError:
            path.symlink_to("/dev/zero")
    elif kind == "link to a pipe":
        os.mkfifo(path.with_name("pipe"))
        path.symlink_to("pipe")
    else:
        path.write_text("[" * 100_000 if kind == "deep" else "garbage\x1b[2J")
        if kind == "unreadable":
            path.chmod(0)
        if kind == "sparse":
            os.truncate(path, rng.choice((1 << 40, 300 << 20)))


@mutation("special files")
def special(spoilt: Spoilt, rng: random.Random) -> None:
    _put_special(_name(spoilt, rng), spoilt, rng)


@mutation("special files")
def closed(spoilt: Spoilt, rng: random.Random) -> None:
    """Files or the folder itself without leave to read."""
    target = rng.choice([*spoilt.files(), spoilt.folder])
    target.resolve().chmod(rng.choice((0, 0o200, 0o100 if target.is_dir() else 0)))
    spoilt.note(target.name)


@mutation("special files")
def many(spoilt: Spoilt, rng: random.Random) -> None:
    for number in range(rng.choice((300, 3000))):
        mark = ACTIVE[0] if number % 50 == 0 else ""
        (spoilt.folder / f"x{number}{mark}.json").touch()


@mutation("changing")
def while_it_runs(spoilt: Spoilt, rng: random.Random) -> None:
    """Grows, is cut, goes and comes, or becomes a link to a secret and back."""
    names = [path for path in spoilt.files() if path.suffix != ".onnx" or rng.random() < 0.5]
    path = rng.choice(names or [spoilt.folder / "config.json"])
    content, kind = read(path), rng.choice(("grow", "exchange", "link", "go", "rewrite"))
    spoilt.write(path.name, content)
    spoilt.note(f"{path.name}: {kind}")
    spoilt.changing += [str(path), f"{path}.new"]
    spoilt.meanwhile = _change(spoilt, path, content, kind)


def _change(spoilt: Spoilt, path: Path, content: bytes, kind: str) -> Callable[[], None]:
    new, secret = Path(f"{path}.new"), spoilt.place.beside / "secret.json"
    evil = spoilt.place.beside / "evil" / path.name
    other = content.replace(b"llama", b"detr_").replace(b"1", b"2")
    turn = True

    def change() -> None:
        nonlocal turn
        turn = not turn
        if (path.is_symlink() and kind != "link") or path.is_fifo():
            return  # another mutation's: a link leads out, and a pipe lets nobody write
        if kind == "grow":
            with path.open("ab") as file:
                file.write(b" " * 4096)
        elif kind in ("exchange", "link"):
            new.unlink(missing_ok=True)
            if kind == "link" and turn:
                new.symlink_to(evil if evil.is_file() else secret)
            else:
                new.write_bytes(content if turn or kind == "link" else other)
            new.replace(path)
        elif kind == "go" and turn:
            path.unlink(missing_ok=True)
        else:
            path.write_bytes(content if kind == "go" or turn else content + b" ")

    return change


def _ours(spoilt: Spoilt, rng: random.Random) -> Path:
    """A folder of depthcut's that the command will look at; a stranger may have made it before."""
    out = spoilt.place.out
    paths = [out / ".depthcut"]
    for name in spoilt.command.results:
        paths += [out / ".depthcut" / "results" / (name.rstrip(".") or "model.onnx")] * 3
        if name == "res" and spoilt.command.name in ("export", "compare", "sweep"):
            paths += [out / "res" / ".depthcut"] * 3
    return rng.choice(paths)


def _put(path: Path, value: Any) -> None:
    """Writes JSON in the place of whatever another mutation has put there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(path):
        path.unlink()
    path.write_text(json.dumps(value))


@mutation("prepared output", hostile=True)
def links_of_ours(spoilt: Spoilt, rng: random.Random) -> None:
    """What depthcut keeps beside results leads elsewhere."""
    place, path = spoilt.place, _ours(spoilt, rng)
    target = place.victim
    if rng.random() < 0.5:  # What -o names is the user's own, be it a link.
        path = path.parent if rng.random() < 0.5 and ".depthcut" in path.parent.parts else path
    else:
        path /= rng.choice(("lock", "stages.json", "changing.json", "results", "kept"))
        target = rng.choice((target / "mine.txt", target, place.beside / "secret.json",
        target / "new"))  # fmt: skip
    spoilt.note(f"{path}: {target}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.path.lexists(path):
        path.symlink_to(target)


@mutation("prepared output")
def special_of_ours(spoilt: Spoilt, rng: random.Random) -> None:
    path = _ours(spoilt, rng) / rng.choice(_OURS)
    path.parent.mkdir(parents=True, exist_ok=True)
    spoilt.note(path)
    if not os.path.lexists(path):
        _put_special(path, spoilt, rng)


@mutation("prepared output")
def stages(spoilt: Spoilt, rng: random.Random) -> None:
    """A memory of stages that names files of the user's."""
    victim, out = spoilt.place.victim, spoilt.place.out
    names = ("../victim/mine.txt", str(victim / "mine.txt"), "../../victim/mine.txt",
    "../notes.txt", ".depthcut/../../notes.txt", "letters/../../notes.txt", "a\x00b", "", "/",
    "..", "x/../../../beside/secret.txt", "link/mine.txt",)  # fmt: skip
    files = {}
    for name in rng.sample(names, 4):
        path = out / "res" / name.replace("\x00", "")
        files[name] = hashlib.sha256(read(path)).hexdigest() if path.is_file() else "0" * 64
    entry = {"key": "0" * 64, "files": files, "value": rng.choice((None, {"x": 1}, []))}
    result = rng.choice((
        {"stages": {"score": entry, "plan": entry, "export": entry}, "published": files},
        {"score": entry, "x\n::error::": entry},
        {"stages": {}, "published": files}, {"stages": [], "published": 7}, {"stages": {"score": 7},
        "published": {"a": 7}}, [], {"stages": {"score": {**entry, "files": 7}}, "published": {}},
        {"stages": {"score": {"key": 7, "files": {"a": "b"}, "value": ODD[0]}},
        "published": {"../letters/letter.txt": hashlib.sha256(b"x").hexdigest()}},
    ))  # fmt: skip
    for home in (out / ".depthcut", out / "res" / ".depthcut"):
        _put(home / "stages.json", result)
    spoilt.note(result)
    if rng.random() < 0.3:
        (out / "res" / "link").symlink_to(victim)


@mutation("prepared output")
def half_changed(spoilt: Spoilt, rng: random.Random) -> None:
    """A record of a change that names files of the user's."""
    home, out = _ours(spoilt, rng), spoilt.place.out
    victim, evil = spoilt.place.victim, home / "new" / "evil"
    evil.parent.mkdir(parents=True, exist_ok=True)
    evil.write_text("evil")
    finals = (str(victim / "mine.txt"), "../victim/mine.txt", "notes.txt", str(out / "notes.txt"),
    "../../beside/secret.txt", ".env.prod.old", "res", "", ".", "/etc/x", "a\x00b",
    "letters/letter.txt",)  # fmt: skip
    final, other = rng.choice(finals), rng.choice(finals)
    staged = rng.choice((str(evil), os.path.relpath(evil, out), "../victim/mine.txt",
    str(victim / "mine.txt"), ".depthcut/new/evil",))  # fmt: skip
    record = {
        "changes": [{"staged": staged, "final": final, "new": _identity(out, staged),
        "old": rng.choice((None, _identity(out, final)))}] * rng.choice((0, 1)),
        "removals": [{"final": other, "old": _identity(out, other)}] * rng.choice((0, 1)),
    }  # fmt: skip
    result = rng.choice((record, record, record, [], {"changes": 7}, {"changes": [7], "removals":
    []}, {"changes": [{"final": 7}], "removals": [{}]},))  # fmt: skip
    spoilt.note(f"{home}: {result}")
    _put(home / "changing.json", result)


def _identity(base: Path, name: str) -> list[int]:
    """As the record of a change has it. Whoever prepares a folder knows only his own file's."""
    from graph_passes.files.exchange import identity

    path = base / name.replace("\x00", "")
    return list(identity(path) or [7]) if path.name == "evil" else [4711, 4, 1]
