"""What must hold after a command on a stranger's folder; each thing that doesn't, in words."""

from __future__ import annotations

import getpass
import os
import re
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from tests.hostile.attempt import Ended, foreign_is_there
from tests.hostile.commands import Command
from tests.hostile.mutations import Spoilt
from tests.hostile.place import CANARY, PWNED, Place, Told, differences, entries

REFUSED = 2
_TORCHS = f"torchinductor_{getpass.getuser()}"  # PyTorch's exporter makes it
_RESULT_FOLDERS = ("work/out", "tmp", "cache", "out", "err", "told")
_ALLOWED_CODE = (PWNED, "it ran", ".cache/huggingface/modules")
_TEXTS = (".html", ".json", ".jsonl", ".md", ".txt", ".xml")
_ACTIVE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\udc80-\udcff]"
)


def outside(spoilt: Spoilt) -> dict[str, Told]:
    """All of a place that no command may change."""
    place = spoilt.place
    left_out = [str(Path(path).parent.resolve() / Path(path).name) for path in spoilt.changing]

    def is_left_out(name: str) -> bool:
        full = str(place.root / name)
        return any(name == f or name.startswith(f + "/") for f in _RESULT_FOLDERS) or any(
            full == path or full.startswith(path + "/") for path in left_out
        )

    return entries(place.root, is_left_out)


def results(place: Place) -> dict[str, Told]:
    """What is in the folder of the results, without what depthcut keeps for itself there."""
    return entries(place.out)


def faults(
    ended: Ended,
    command: Command,
    spoilt: Spoilt,
    before: Mapping[str, Told],
    earlier: Mapping[str, Told],
    *,
    own_code: bool = False,
) -> Iterator[str]:
    """All that is wrong, a line each, which begins with its class."""
    allowed = _ALLOWED_CODE if own_code else ()
    texts = _faults(ended, command, spoilt, before, earlier)
    yield from (fault for fault in texts if not any(part in fault for part in allowed))


def without_races(found: Iterable[str], kinds: Sequence[str], code: int) -> list[str]:
    """What is left of the faults when a link took a file's place in the moment it was opened."""
    raced = (
        ("outside: open ", "outside: opened ") if "changing" in kinds and code == REFUSED else ()
    )
    return [fault for fault in found if not fault.startswith(raced or "\0")]


def _faults(
    ended: Ended,
    command: Command,
    spoilt: Spoilt,
    before: Mapping[str, Told],
    earlier: Mapping[str, Told],
) -> Iterator[str]:
    yield from ended.told
    yield from _ending(ended, several=command.name == "sweep", meanwhile=bool(spoilt.changing))
    yield from _printed(ended)
    yield from _active_results(ended, spoilt, earlier)
    if (
        ended.code not in (0, REFUSED)
        and spoilt.must_be_refused
        and not ended.hung
        and command.name != "sweep"
    ):
        yield f"not refused: exit code {ended.code} for what is hostile: {_last(ended.err)}"
    yield from (f"outside: {line}" for line in differences(before, outside(spoilt)))
    yield from _left(ended, command, spoilt, earlier)


def _ending(ended: Ended, *, several: bool, meanwhile: bool) -> Iterator[str]:
    if ended.hung:
        yield "hang: it ran on"
        return
    lines = [line for line in ended.err.splitlines() if line.startswith("depthcut: ")]
    if "Traceback (most recent call last)" in ended.err + ended.out or ended.code == 99:
        yield f"traceback: {_last(ended.err)}"
    elif ended.code == -signal.SIGBUS and meanwhile:
        return  # what is mapped into memory was cut off: the system ends the process
    elif ended.code not in (0, 1, REFUSED, 3):
        yield f"end: exit code {ended.code}: {_last(ended.err)}"
    elif ended.err.startswith("Usage:"):
        if "Invalid value" not in ended.err:  # click looks whether a file can be read
            yield f"call: {_last(ended.err)}"
    elif ended.code in (1, REFUSED) and len(lines) != 1 and not several:
        yield f"lines: {len(lines)} lines tell why: {_last(ended.err)}"
    for line in lines:
        if "depthcut: Unexpected " in line:
            yield f"unexpected: {line[:300]}"
        if "Out of memory" in line:
            yield f"memory: {line}"


def _last(text: str) -> str:
    return (text.strip().splitlines() or ["nothing was said"])[-1][:300]


def _printed(ended: Ended) -> Iterator[str]:
    for text in (ended.out, ended.err):
        for line in text.split("\n"):
            again = line.rpartition("\r")[2]
            if _ACTIVE.search(again) or again.lstrip().startswith("::"):
                yield f"printed: {again[:200]!r}"
        if CANARY in text:
            yield f"outside: a secret is printed: {text[max(0, text.find(CANARY) - 80) :][:160]!r}"


def _active_results(ended: Ended, spoilt: Spoilt, earlier: Mapping[str, Told]) -> Iterator[str]:
    """Control characters and commands in what others read: JSON has escapes, text has none left.

    The model's own files are copied as they are.
    """
    for name in results(spoilt.place):
        path, own = spoilt.place.out / name, spoilt.folder / Path(name).name
        if ended.code < 0 or name in earlier or path.suffix not in _TEXTS or not path.is_file():
            continue
        if own.is_file() and own.read_bytes() == path.read_bytes():
            continue
        for line in path.read_bytes().decode("utf-8", "surrogateescape").split("\n"):
            if _ACTIVE.search(line) or line.lstrip().startswith(("::", "##[", "##vso[")):
                yield f"written: {name}: {line[:200]!r}"


def _left(
    ended: Ended, command: Command, spoilt: Spoilt, earlier: Mapping[str, Told]
) -> Iterator[str]:
    place = spoilt.place
    if os.path.lexists(place.beside / PWNED):
        yield "code: it ran"
    if not foreign_is_there(place):
        yield "outside: the user's own files beside the results are gone or changed"
    for folder in (place.out, place.temporary, place.root / "cache"):
        yield from _secrets(folder)
    killed = ended.hung or ended.code < 0
    rest = sorted({path.name for path in place.temporary.iterdir()} - {_TORCHS})
    if rest and not killed:
        yield f"left: in the temporary folder: {rest[:5]}"
    tells_each_end = command.name == "sweep"  # its report is whole where no cell is
    if ended.code != 0 and not killed and not tells_each_end:
        for line in differences(earlier, results(place)):
            # A stranger's record of a change keeps all beside it for whoever looks at it.
            beside = f"{line.partition(': ')[2].partition('/new')[0]}/changing.json"
            new = line.startswith("made")
            is_rest = ".depthcut" in line and (not new or command.stages or beside in earlier)
            if not is_rest and (not command.stages or ended.code == REFUSED):
                yield f"left: {line}"


def _secrets(folder: Path) -> Iterator[str]:
    for path, _, files in os.walk(folder):
        for name in files:
            full = Path(path, name)
            if full.is_symlink() or not full.is_file():
                continue
            with full.open("rb") as file:
                if CANARY.encode() in file.read(1 << 24):
                    yield f"outside: a secret is in {full.relative_to(folder.parent)}"
