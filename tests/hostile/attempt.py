"""One try: a place is made and spoilt, a command is run in a fork that is watched, and judged."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.hostile.commands import Command, chosen
from tests.hostile.mutations import KINDS, Mutation, Spoilt
from tests.hostile.place import FOREIGN, Place
from tests.hostile.watch import Rules, Watch

LONGEST_S = 60.0
MEMORY = 2 << 30
_FILE_BYTES = 1 << 30
_CAP_DAC = 0b110  # a user without them can't read what nobody may read


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


def prepare(
    seed: int, place: Place, template: Path, commands: Sequence[Command], *, sound: bool = False
) -> tuple[Command, list[str], Spoilt]:
    """Makes a place, and spoils it as a seed says; ``sound``: leaves it as it is."""
    rng = random.Random(seed)
    command, options = chosen(rng, commands)
    place.make(template)
    if rng.random() < 0.5:
        _earlier(place, folder=command.name in ("export", "compare", "sweep"))
    spoilt = Spoilt(place, place.work / command.folder, command)
    mutations: list[Mutation] = []
    for kind in rng.choices(command.kinds, k=0 if sound else rng.choice((1, 1, 1, 2, 3))):
        mutation = rng.choice(KINDS[kind])
        try:
            mutation.apply(spoilt, rng)
        except Exception:
            if not mutations:  # else it finds what the one before has spoilt
                raise
        else:
            mutations.append(mutation)
    spoilt.done = mutations
    return command, [*command.arguments, *options], spoilt


def _earlier(place: Place, *, folder: bool) -> None:
    """Puts earlier results where new ones go."""
    source = place.work / "earlier"
    for entry in source.iterdir():
        if entry.is_file():
            shutil.copy(entry, place.out / entry.name)
    if folder:
        shutil.copytree(source / "res", place.out / "res")
    shutil.copytree(source / "graph", place.out, dirs_exist_ok=True)


def run(
    place: Place, task: Callable[[], int], rules: Rules, meanwhile: Callable[[], None] | None = None
) -> Ended:
    """Runs a task in a fork, watched, in a place's working directory."""
    sys.stdout.flush()
    sys.stderr.flush()
    begin = time.monotonic()
    pid = os.fork()
    if not pid:
        _child(place, task, rules)
    hung = not _waited(pid, begin, meanwhile)
    status = os.waitpid(pid, 0)[1]
    said = [_read(place.root / name) for name in ("out", "err", "told")]
    return Ended(
        os.waitstatus_to_exitcode(status), time.monotonic() - begin, said[0], said[1],
        said[2].splitlines(), hung, pid,
    )  # fmt: skip


def _read(path: Path) -> str:
    return path.read_bytes().decode("utf-8", errors="surrogateescape")


def _waited(pid: int, begin: float, meanwhile: Callable[[], None] | None) -> bool:
    handle = os.pidfd_open(pid)
    try:
        while time.monotonic() < begin + LONGEST_S:
            wait = 0.002 if meanwhile else LONGEST_S
            if select.select([handle], [], [], wait)[0]:
                return True
            if meanwhile:
                with contextlib.suppress(OSError):
                    meanwhile()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        return False
    finally:
        os.close(handle)


def _child(place: Place, task: Callable[[], int], rules: Rules) -> None:
    code = 99
    try:
        os.setpgid(0, 0)
        for number, name in ((1, "out"), (2, "err")):
            handle = os.open(place.root / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(handle, number)
            os.close(handle)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", closefd=False) for n in (1, 2))  # under pytest
        file = os.open(place.root / "told", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.environ.clear()
        os.environ.update(place.environment())
        tempfile.tempdir = None
        os.chdir(place.work)
        _limit()
        Watch(rules, lambda line: os.write(file, f"{line}\n".encode(errors="replace"))).begin()
        code = task()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _limit() -> None:
    """So much memory and no more, no huge files, and no leave to read what nobody may read."""
    used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (_FILE_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()
    libc: Any = ctypes.CDLL(None)
    if os.geteuid() == 0 and libc.capget(header, sets) == 0:
        for place in range(3):
            sets[place] &= ~_CAP_DAC
        libc.capset(header, sets)


def foreign_is_there(place: Place) -> bool:
    """Whether the user's own files in the folder of the results are as they were."""
    return all(
        (place.out / name).is_file() and (place.out / name).read_text() == text
        for name, text in FOREIGN.items()
    )
