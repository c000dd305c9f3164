"""What stands in a folder in place of files: links, pipes, devices; and what changes meanwhile."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Callable
from pathlib import Path

from tests.hostile.configs import ACTIVE
from tests.hostile.spoilt import Spoilt, mutation, read

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


def _name(spoilt: Spoilt, rng: random.Random) -> Path:
    """A file that is there, which then isn't; or a new name that some library looks for."""
    named = [Path(part).name for part in spoilt.command.arguments]
    there = [path.name for path in spoilt.files() if path.name not in named]
    path = spoilt.folder / (rng.choice(there) if there and rng.random() < 0.7 else rng.choice(_NEW))
    path.parent.mkdir(exist_ok=True)
    if os.path.lexists(path) and not path.is_dir():
        path.unlink()
    spoilt.note(path.name)
    return path


@mutation("links", hostile=True)
def link_out(spoilt: Spoilt, rng: random.Random) -> None:
    path, place = _name(spoilt, rng), spoilt.place
    evil = place.beside / "evil" / path.name
    target = rng.choice((
        place.beside / "secret.txt", place.beside / "secret.json",
        evil if evil.exists() else place.beside / "secret.json", Path("/proc/self/environ"),
        Path("/etc/hostname"), place.victim / "mine.txt",
        place.home / ".ssh" / "id_rsa", Path(os.path.relpath(place.beside / "secret.json",
        spoilt.folder)), place.home / ".cache" / "huggingface" / "token",
    ))  # fmt: skip
    spoilt.note(target)
    path.symlink_to(target)


@mutation("links", hostile=True)
def link_through_others(spoilt: Spoilt, rng: random.Random) -> None:
    """By way of a folder, of another link, or of another repository in the cache."""
    path, place = _name(spoilt, rng), spoilt.place
    kind = rng.choice(("folder", "link", "blob", "up", "fd"))
    spoilt.note(kind)
    if kind == "folder":
        (spoilt.folder / "sub").symlink_to(place.beside)
        path.symlink_to(Path("sub", "secret.json"))
    elif kind == "link":
        (spoilt.folder / "step").symlink_to(place.beside / "secret.json")
        path.symlink_to("step")
    elif kind == "blob":
        blob = place.work / "hub" / "models--victim--private" / "blobs" / "a"
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.symlink_to(place.beside / "secret.json")
        path.symlink_to(blob)
    elif kind == "up":
        path.symlink_to(os.path.relpath(place.victim / "mine.txt", spoilt.folder))
    else:
        path.symlink_to("/proc/self/cwd/victim/mine.txt")


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
    if rng.random() < 0.4 and "hub" not in spoilt.folder.parts:
        elsewhere = spoilt.place.work / "real"
        spoilt.folder.rename(elsewhere)
        spoilt.folder.symlink_to(elsewhere)
        return
    name = rng.choice(("additional_chat_templates", "onnx", "original", "1", "custom_generate",
    ".depthcut", "sub", ".cache",))  # fmt: skip
    spoilt.note(name)
    (spoilt.folder / name).symlink_to(
        rng.choice(
            (spoilt.place.beside, spoilt.place.victim, Path("/proc/self"), Path(name), Path(".."))
        )
    )


@mutation("special files")
def special(spoilt: Spoilt, rng: random.Random) -> None:
    path = _name(spoilt, rng)
    kind = rng.choice(
        ("pipe", "pipe", "socket", "folder", "device", "unreadable", "sparse", "link to a pipe")
    )
    spoilt.note(kind)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        _socket(path)
    elif kind == "folder":
        path.mkdir(exist_ok=True)
    elif kind == "device":
        try:
            os.mknod(path, 0o20644, os.makedev(1, 5))
        except PermissionError:
            path.symlink_to("/dev/zero")
    elif kind == "unreadable":
        path.write_text("{}")
        path.chmod(0)
    elif kind == "sparse":
        path.touch()
        os.truncate(path, rng.choice((1 << 40, 300 << 20)))
    else:
        os.mkfifo(spoilt.folder / "pipe")
        path.symlink_to("pipe")


def _socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # a socket's name may have 107 bytes only
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


@mutation("special files")
def closed(spoilt: Spoilt, rng: random.Random) -> None:
    """Files or the folder itself without leave to read."""
    files = spoilt.files()
    target = rng.choice([*files, spoilt.folder]) if files else spoilt.folder
    target.resolve().chmod(rng.choice((0, 0o200, 0o100 if target.is_dir() else 0)))
    spoilt.note(target.name)


@mutation("special files")
def many(spoilt: Spoilt, rng: random.Random) -> None:
    for number in range(rng.choice((300, 3000))):
        (
            spoilt.folder / f"x{number}{rng.choice(ACTIVE[:1]) if number % 50 == 0 else ''}.json"
        ).touch()


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
    hostile = evil if evil.is_file() else secret
    count = 0

    def change() -> None:
        nonlocal count
        count += 1
        if path.is_symlink() and kind != "link":
            return  # another mutation's; where it leads nothing is the stranger's
        if kind == "grow":
            with path.open("ab") as file:
                file.write(b" " * 4096)
        elif kind == "exchange":
            new.write_bytes(
                content if count % 2 else content.replace(b"llama", b"detr_").replace(b"1", b"2")
            )
            new.replace(path)
        elif kind == "link":
            new.unlink(missing_ok=True)
            new.symlink_to(hostile) if count % 2 else new.write_bytes(content)
            new.replace(path)
        elif kind == "go":
            path.unlink(missing_ok=True) if count % 2 else path.write_bytes(content)
        else:
            path.write_bytes(content if count % 2 else content + b" ")

    return change
