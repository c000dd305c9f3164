"""What must hold after a command on a stranger's folder; each thing that doesn't, in words."""

from __future__ import annotations

import getpass
import os
import re
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.forked import BROKEN
from tests.hostile.commands import Command
from tests.hostile.mutations import Spoilt
from tests.hostile.place import CANARY, FOREIGN, PWNED, State, differences, entries

REFUSED = 2
_TORCHS = f"torchinductor_{getpass.getuser()}"  # PyTorch's exporter makes it
_RESULT_FOLDERS = ("work/out", "tmp", "cache", "out", "err", "told")
_ALLOWED_CODE = (PWNED, "it ran", ".cache/huggingface/modules")
_TEXTS = (".html", ".json", ".jsonl", ".md", ".txt", ".xml")
_ACTIVE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\udc80-\udcff]"
)


@dataclass
class Ended:
    """How a command ended."""

    code: int
    seconds: float
    out: str
    err: str
    told: list[str] = field(default_factory=list)
    hung: bool = False
    pid: int = 0


def outside(spoilt: Spoilt) -> dict[str, State]:
    """All of a place that no command may change."""
    root = spoilt.place.root
    changing = [str(Path(path).parent.resolve() / Path(path).name) for path in spoilt.changing]
    left_out = [*(str(root / name) for name in _RESULT_FOLDERS), *changing]

    def is_left_out(name: str) -> bool:
        return any(f"{root / name}/".startswith(f"{path}/") for path in left_out)

    return entries(root, is_left_out)


def faults(
    ended: Ended, command: Command, spoilt: Spoilt, before: Mapping[str, State],
    earlier: Mapping[str, State], *, own_code: bool = False,
) -> Iterator[str]:  # fmt: skip
    """All that is wrong, a line each, which begins with its class."""
    allowed = _ALLOWED_CODE if own_code else ()
    texts = [
        *ended.told,
        *_ending(ended, spoilt, several=command.name == "sweep"),
        *_printed(ended),
        *_active_results(ended, spoilt, earlier),
        *(f"outside: {line}" for line in differences(before, outside(spoilt))),
        *_left(ended, command, spoilt, earlier),
    ]
    yield from (fault for fault in texts if not any(part in fault for part in allowed))


def without_races(texts: Iterable[str], kinds: Sequence[str], code: int) -> list[str]:
    """What is left of the faults when a link took a file's place in the moment it was opened."""
    raced = "changing" in kinds and code == REFUSED
    return [
        t for t in texts if not raced or not t.startswith(("outside: open ", "outside: opened "))
    ]


def _ending(ended: Ended, spoilt: Spoilt, *, several: bool) -> Iterator[str]:
    if ended.hung:
        yield "hang: it ran on"
        return
    last = (ended.err.strip().splitlines() or ["nothing was said"])[-1][:300]
    lines = [line for line in ended.err.splitlines() if line.startswith("depthcut: ")]
    if "Traceback (most recent call last)" in ended.err + ended.out or ended.code == BROKEN:
        yield f"traceback: {last}"
    elif ended.code == -signal.SIGBUS and spoilt.changing:
        return  # what is mapped into memory was cut off: the system ends the process
    elif ended.code not in (0, 1, REFUSED, 3):
        yield f"end: exit code {ended.code}: {last}"
    elif ended.err.startswith("Usage:"):
        if "Invalid value" not in ended.err:  # click looks whether a file can be read
            yield f"call: {last}"
    elif ended.code in (1, REFUSED) and len(lines) != 1 and not several:
        yield f"lines: {len(lines)} lines tell why: {last}"
    if ended.code not in (0, REFUSED) and spoilt.must_be_refused and not several:
        yield f"not refused: exit code {ended.code} for what is hostile: {last}"
    for line in lines:
        if "depthcut: Unexpected " in line:
            yield f"unexpected: {line[:300]}"
        if "Out of memory" in line:
            yield f"memory: {line}"


def _is_active(line: str) -> bool:
    """Whether a terminal or a CI system acts on a line."""
    return bool(_ACTIVE.search(line)) or line.lstrip().startswith(("::", "##[", "##vso["))


def _printed(ended: Ended) -> Iterator[str]:
    for text in (ended.out, ended.err):
        for line in text.split("\n"):
            again = line.rpartition("\r")[2]
            if _is_active(again):
                yield f"printed: {again[:200]!r}"
        if CANARY in text:
            yield f"outside: a secret is printed: {text[max(0, text.find(CANARY) - 80) :][:160]!r}"


def _active_results(ended: Ended, spoilt: Spoilt, earlier: Mapping[str, State]) -> Iterator[str]:
    """Control characters and commands in what others read: JSON has escapes, text has none left.

    The model's own files are copied as they are.
    """
    for name in entries(spoilt.place.out):
        path, own = spoilt.place.out / name, spoilt.folder / Path(name).name
        if ended.code < 0 or name in earlier or path.suffix not in _TEXTS or not path.is_file():
            continue
        if own.is_file() and own.read_bytes() == path.read_bytes():
            continue
        for line in path.read_bytes().decode("utf-8", "surrogateescape").split("\n"):
            if _is_active(line):
                yield f"written: {name}: {line[:200]!r}"


def _left(
    ended: Ended, command: Command, spoilt: Spoilt, earlier: Mapping[str, State]
) -> Iterator[str]:
    place = spoilt.place
    if os.path.lexists(place.beside / PWNED):
        yield "code: it ran"
    for name, text in FOREIGN.items():
        if not (place.out / name).is_file() or (place.out / name).read_text() != text:
            yield f"outside: the user's own {name} beside the results is gone or changed"
    for folder in (place.out, place.temporary, place.root / "cache"):
        for path in (Path(at, name) for at, _, files in os.walk(folder) for name in files):
            if not path.is_symlink() and path.is_file():
                with path.open("rb") as file:
                    if CANARY.encode() in file.read(1 << 24):
                        yield f"outside: a secret is in {path.relative_to(place.root)}"
    killed = ended.hung or ended.code < 0
    rest = sorted({path.name for path in place.temporary.iterdir()} - {_TORCHS})
    if rest and not killed:
        yield f"left: in the temporary folder: {rest[:5]}"
    tells_each_end = command.name == "sweep"  # its report is whole where no cell is
    if ended.code != 0 and not killed and not tells_each_end:
        lines = list(differences(earlier, entries(place.out)))
        for line in lines:
            # A stranger's record of a change keeps all beside it for whoever looks at it.
            beside = f"{line.partition(': ')[2].partition('/new')[0]}/changing.json"
            new = line.startswith("made")
            is_rest = ".depthcut" in line and (not new or command.stages or beside in earlier)
            is_rest |= command.stages and f"{line}/.depthcut" in lines  # its folder
            # A finished stage's result appears at once; a refusal behind it leaves it there.
            is_rest |= new and command.stages
            if not is_rest and (not command.stages or ended.code == REFUSED):
                yield f"left: {line}"
