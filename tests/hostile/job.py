"""Does tries one after the other, in a process that has everything imported and only one thread.

In each try a place is made and spoilt, a command is run in a fork that is watched, and judged.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.util
import json
import os
import random
import resource
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests import forked
from tests.hostile.bases import write_template
from tests.hostile.cases import CASES, LEAVE, REFUSED
from tests.hostile.commands import COMMANDS, Command, chosen
from tests.hostile.judge import Ended, faults, outside, without_races
from tests.hostile.mutations import KINDS, Mutation, Spoilt
from tests.hostile.place import Place, clear, entries
from tests.hostile.watch import Rules, Watch

LONGEST_S = 60.0
MEMORY = 2 << 30
_FILE_BYTES = 1 << 30
_CAP_DAC = 0b110  # a user without them can't read what nobody may read


def prepare(
    seed: int, place: Place, template: Path, commands: Sequence[Command], *, sound: bool = False
) -> tuple[Command, str, Spoilt]:
    """Makes a place, and spoils it as a seed says; ``sound``: leaves it as it is."""
    rng = random.Random(seed)
    command, line = chosen(rng, commands)
    place.make(template)
    if rng.random() < 0.5:  # earlier results stand where new ones go
        for entry in (place.work / "earlier").glob("*.json"):
            shutil.copy(entry, place.out)
        if command.name in ("export", "compare", "sweep"):
            shutil.copytree(place.work / "earlier" / "res", place.out / "res")
        shutil.copytree(place.work / "earlier" / "graph", place.out, dirs_exist_ok=True)
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
    return command, line, spoilt


def prepare_case(number: int, place: Place, template: Path) -> tuple[Command, str, Spoilt]:
    """Makes a place, and spoils it as one of the cases does."""
    name, change = list(CASES.items())[number]
    command = COMMANDS[0]
    place.make(template)
    spoilt = Spoilt(place, place.work / command.folder, command)
    change(spoilt)
    spoilt.done = [Mutation(name, "cases", lambda *_: None, name in REFUSED)]
    return command, f"{command.line} -q {LEAVE.get(name, '')}", spoilt


def run(
    place: Place, task: Callable[[], int], rules: Rules, meanwhile: Callable[[], None] | None = None
) -> Ended:
    """Runs a task in a fork, watched, in a place's working directory."""

    def watched() -> int:
        file = os.open(place.root / "told", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        _limit()
        Watch(rules, lambda line: os.write(file, f"{line}\n".encode(errors="replace"))).begin()
        return task()

    begin, streams = time.monotonic(), (place.root / "out", place.root / "err")
    pid = forked.start(watched, place.work, streams, place.environment())
    hung = not forked.ends(pid, LONGEST_S, meanwhile)
    if hung:
        os.killpg(pid, signal.SIGKILL)
    code, seconds = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), time.monotonic() - begin
    said = [path.read_bytes().decode("utf-8", errors="surrogateescape") for path in
    (*streams, place.root / "told")]  # fmt: skip
    return Ended(code, seconds, said[0], said[1], said[2].splitlines(), hung, pid)


def _limit() -> None:
    """So much memory and no more, no huge files, and no leave to read what nobody may read."""
    used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (_FILE_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc: Any = ctypes.CDLL(None)
    if os.geteuid() == 0 and libc.capget(header, sets) == 0:
        for place in range(3):
            sets[place] &= ~_CAP_DAC
        libc.capset(header, sets)


def attempt(seed: int, place: Place, command: Command, line: str, spoilt: Spoilt) -> dict[str, Any]:
    """One try, and all about it."""
    before, earlier = outside(spoilt), entries(place.out)
    own_code = "--trust-remote-code" in line
    rules = Rules(place, spoilt.folder, own_code=own_code)
    ended = run(place, lambda: forked.depthcut(line), rules, spoilt.meanwhile)
    texts = list(faults(ended, command, spoilt, before, earlier, own_code=own_code))
    kinds = [mutation.kind for mutation in spoilt.done]
    said = (ended.out[-1500:] + ended.err[-2500:]).encode("utf-8", "backslashreplace").decode()
    return {
        "seed": seed, "arguments": shlex.split(line), "code": ended.code, "folder": command.folder,
        "seconds": round(ended.seconds, 2), "pid": ended.pid, "kinds": kinds,
        "mutations": [mutation.name for mutation in spoilt.done], "notes": spoilt.notes[:12],
        "faults": without_races(texts, kinds, ended.code), "said": said,
    }  # fmt: skip


def main() -> int:
    """Does the tries that the caller names, and writes a line of JSON for each."""
    content = json.loads(sys.argv[1])
    template, place = Path(content["template"]), Place(Path(content["place"]))
    place.root.mkdir(parents=True, exist_ok=True)
    forked.warm_up()
    _make_template(template, place)
    commands = _commands(content["only"], content["kinds"])
    with Path(content["told"]).open("w", buffering=1) as file:
        for seed in content["seeds"]:
            prepared = (
                prepare_case(seed, place, template)
                if seed < len(CASES)
                else prepare(seed, place, template, commands, sound=content["sound"])
            )
            file.write(json.dumps(attempt(seed, place, *prepared)) + "\n")
    clear(place.root)
    return 0


def _make_template(template: Path, place: Place) -> None:
    """Makes what is sound, in a fork: nothing of that stays in the memory of the tries."""

    def task() -> int:
        write_template()
        return 0

    template.mkdir()
    streams = (place.root / "out", place.root / "err")
    pid = forked.start(task, template, streams, os.environ)
    if os.waitpid(pid, 0)[1]:
        raise SystemExit(f"the sound models could not be made: {streams[1].read_text()}")


def _commands(only: str | None, kinds: str | None) -> list[Command]:
    """Those that can be called here, of these names, with these ways to spoil their folders."""
    names = only.split(",") if only else [command.name for command in COMMANDS]
    wanted = kinds.split(",") if kinds else list(KINDS)
    unknown = {*names, *wanted} - {command.name for command in COMMANDS} - set(KINDS)
    if unknown:
        raise SystemExit(f"not known: {sorted(unknown)}; kinds are {', '.join(sorted(KINDS))}")
    is_new = int(version("transformers").partition(".")[0]) >= 5  # older ones can't --stream
    narrowed = [
        dataclasses.replace(command, kinds=[kind for kind in command.kinds if kind in wanted])
        for command in COMMANDS
        if command.name in names and importlib.util.find_spec(command.needs)
        if is_new or "--stream" not in command.line
    ]
    return [command for command in narrowed if command.kinds]


if __name__ == "__main__":
    sys.exit(main())
