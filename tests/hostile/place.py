"""Where a try happens: the user's own files, a stranger's, and secrets that nobody may touch."""

# Paths are looked at as the system has them; a Path drops what is odd.
# ruff: noqa: PTH101, PTH114, PTH115, PTH123
from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

CANARY = "canary-7d1f0c"
"""What every secret holds: it may appear nowhere else."""
PWNED = "pwned"
"""The file that code of a model's makes when it runs."""

FOREIGN = {".env.prod.old": "TOKEN=mine", ".draft.v2.part": "half a thought", "notes.txt": "mine",
"letters/letter.txt": "mine too"}  # fmt: skip
"""What the user has in the folder of the results."""


class Place:
    """The folders of a try.

    The command is called in ``work``; its results go to ``out``, where files of the user's are.
    Its business is neither ``beside``, with secrets and a model that runs code when it is loaded,
    nor ``home``, with a token and a key, nor ``victim``, a folder of the user's.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.work, self.temporary = root, root / "work", root / "tmp"
        self.beside, self.home = root / "beside", root / "home"
        self.out, self.victim = self.work / "out", self.work / "victim"

    def environment(self) -> dict[str, str]:
        """The environment that the command gets."""
        return {"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "HOME": str(self.home), "TMPDIR":
        str(self.temporary), "XDG_CACHE_HOME": str(self.root / "cache"), "HF_TOKEN":
        f"hf_{CANARY}", "SECRET": CANARY, "LC_ALL": "C.UTF-8", "NO_COLOR": "1",
        "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}  # fmt: skip

    def make(self, template: Path) -> None:
        """Makes everything anew; ``template`` becomes the working directory."""
        clear(self.root)
        for folder in (self.temporary, self.root / "cache", self.beside):
            folder.mkdir(parents=True)
        shutil.copytree(template, self.work, symlinks=True)
        shutil.copytree(self.work / "llama", self.beside / "evil")
        files = {
            self.home / ".ssh" / "id_rsa": CANARY,
            self.home / ".cache" / "huggingface" / "token": f"hf_{CANARY}",
            self.beside / "secret.txt": CANARY,
            self.beside / "secret.json": json.dumps({"secret": CANARY}),
            self.beside / "evil" / "payload.py": payload(self),
            self.victim / "mine.txt": CANARY,
            self.victim / "deeper" / "mine.json": json.dumps([CANARY]),
            **{self.out / name: text for name, text in FOREIGN.items()},
        }
        for path, text in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")


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


State = tuple[Any, ...]


def entries(folder: Path, leave_out: Callable[[str], bool] = lambda _: False) -> dict[str, State]:
    """All that is below a folder, and what tells whether it was changed."""
    states: dict[str, State] = {}
    for path, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            relative = os.path.relpath(f"{path}/{name}", folder)
            if not leave_out(relative):
                states[relative] = _state(f"{path}/{name}")
            elif name in folders:
                folders.remove(name)
    return states


def _state(path: str) -> State:
    result = os.lstat(path)
    kind, mode = stat.S_IFMT(result.st_mode), stat.S_IMODE(result.st_mode)
    if stat.S_ISLNK(result.st_mode):
        return (kind, os.readlink(path))
    if not stat.S_ISREG(result.st_mode):
        return (kind, mode)
    content: Any = result.st_mtime_ns
    if result.st_size < 1 << 22:
        with contextlib.suppress(OSError), open(path, "rb") as file:
            content = hashlib.sha256(file.read()).hexdigest()
    return (kind, mode, result.st_size, content)


def differences(before: Mapping[str, State], after: Mapping[str, State]) -> list[str]:
    """What was made, changed or removed, in words."""
    return [
        f"{'made' if name not in before else 'changed' if name in after else 'removed'}: {name}"
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
    ]
