"""Where a try happens: the user's own files, a stranger's, and secrets that nobody may touch."""

# Paths are looked at as the system has them; a Path drops what is odd.
# ruff: noqa: PTH101, PTH114, PTH115, PTH123
from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CANARY = "canary-7d1f0c"
"""What every secret holds: it may appear nowhere else."""
PWNED = "pwned"
"""The file that code of a model's makes when it runs."""
REVISION = "0123456789abcdef0123456789abcdef01234567"

FOREIGN = {".env.prod.old": "TOKEN=mine", ".draft.v2.part": "half a thought", "notes.txt": "mine",
"letters/letter.txt": "mine too"}  # fmt: skip
"""What the user has in the folder of the results."""


@dataclass(frozen=True)
class Place:
    """The folders of a try."""

    root: Path

    @property
    def work(self) -> Path:
        """Where the command is called."""
        return self.root / "work"

    @property
    def out(self) -> Path:
        """Where its results go, with files of the user's."""
        return self.work / "out"

    @property
    def beside(self) -> Path:
        """Not the command's business: secrets, and a model that runs code when it is loaded."""
        return self.root / "beside"

    @property
    def home(self) -> Path:
        """The user's home, with a token for the hub and a key."""
        return self.root / "home"

    @property
    def temporary(self) -> Path:
        """For temporary files; empty before and after."""
        return self.root / "tmp"

    @property
    def victim(self) -> Path:
        """The user's folder in the working directory, of no business to the command either."""
        return self.work / "victim"

    def environment(self) -> dict[str, str]:
        """The environment that the command gets."""
        return {"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "HOME": str(self.home), "TMPDIR":
        str(self.temporary), "XDG_CACHE_HOME": str(self.root / "cache"), "HF_TOKEN":
        f"hf_{CANARY}", "SECRET": CANARY, "LC_ALL": "C.UTF-8", "NO_COLOR": "1",
        "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}  # fmt: skip

    def make(self, template: Path) -> None:
        """Makes everything anew; ``template`` becomes the working directory."""
        clear(self.root)
        for folder in (self.home / ".ssh", self.temporary, self.root / "cache", self.beside):
            folder.mkdir(parents=True)
        shutil.copytree(template, self.work, symlinks=True)
        _write(self.home / ".ssh" / "id_rsa", CANARY)
        _write(self.home / ".cache" / "huggingface" / "token", f"hf_{CANARY}")
        _write(self.beside / "secret.txt", CANARY)
        _write(self.beside / "secret.json", json.dumps({"secret": CANARY}))
        _write(self.victim / "mine.txt", CANARY)
        _write(self.victim / "deeper" / "mine.json", json.dumps([CANARY]))
        shutil.copytree(self.work / "llama", self.beside / "evil")
        _write(self.beside / "evil" / "payload.py", payload(self))
        for name, text in FOREIGN.items():
            _write(self.out / name, text)


def payload(place: Place) -> str:
    """Python code that tells that it ran, and would pass for a model's."""
    return (
        f"open({str(place.beside / PWNED)!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "class Config(LlamaConfig):\n    model_type = 'kid'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
        "class Tokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )


def clear(folder: Path) -> None:
    """Removes a folder, whatever is in it."""
    if not os.path.lexists(folder):
        return
    for path, folders, _ in os.walk(folder):
        for name in folders:
            if not os.path.islink(f"{path}/{name}"):
                os.chmod(f"{path}/{name}", 0o700)
    shutil.rmtree(folder)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


Told = tuple[Any, ...]


def entries(folder: Path, leave_out: Callable[[str], bool] = lambda _: False) -> dict[str, Told]:
    """All that is below a folder, and what tells whether it was changed."""
    entries: dict[str, Told] = {}
    for path, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            full = f"{path}/{name}"
            relative = os.path.relpath(full, folder)
            if not leave_out(relative):
                entries[relative] = _told(full)
        folders[:] = [
            name for name in folders if not leave_out(os.path.relpath(f"{path}/{name}", folder))
        ]
    return entries


def _told(path: str) -> Told:
    result = os.lstat(path)
    kind, mode = stat.S_IFMT(result.st_mode), stat.S_IMODE(result.st_mode)
    if stat.S_ISLNK(result.st_mode):
        return (kind, os.readlink(path))
    if not stat.S_ISREG(result.st_mode):
        return (kind, mode)
    few = result.st_size < 1 << 22
    content = hashlib.sha256(_content(path)).hexdigest() if few else result.st_mtime_ns
    return (kind, mode, result.st_size, content)


def _content(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""


def differences(before: Mapping[str, Told], after: Mapping[str, Told]) -> list[str]:
    """What was made, changed or removed, in words."""
    return [
        f"{'made' if name not in before else 'changed' if name in after else 'removed'}: {name}"
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
    ]
