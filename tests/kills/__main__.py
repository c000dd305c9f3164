"""Kills commands at random: ``python -m tests.kills --kills 1000 --seed 1``.

Each kill follows from its command and its number: ``--replay prune:17`` makes one again and tells
what was done. Ends with 1 if anything was mixed, stale, lost or different, and with 2 if the
harness itself failed.
"""

from __future__ import annotations

import argparse
import json
import os
import selectors
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO, cast

from tests.kills.bench import warm_up
from tests.kills.killing import Killing, Outcome
from tests.kills.scenarios import SCENARIOS, names

KINDS = ("mixed", "stale", "lost", "different")
_COLUMNS = ("command", "kills", *KINDS, "seconds")

Work = Sequence[tuple[str, int]]
"""Commands, and the number of each one's kill."""


def main() -> int:
    """Kills until the number is reached."""
    parser = argparse.ArgumentParser(prog="python -m tests.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1, help="the first number")
    parser.add_argument("--commands", help="NAME,NAME=SHARE: one is killed as often as its share")
    parser.add_argument("--states", type=int, help="what a command finds there: at most so many")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--told", metavar="FILE", help="takes what came of each, as JSON lines")
    parser.add_argument("--replay", metavar="COMMAND:NUMBER")
    options = parser.parse_args()
    work = _work(options)
    if not options.replay:
        print(f"{len(work)} pieces of work, kills from {options.seed} on", flush=True)
    warm_up()
    with tempfile.TemporaryDirectory() as folder:
        return _run(Path(folder), work, options)


def _work(options: argparse.Namespace) -> Work:
    if options.replay:
        command, _, what = options.replay.partition(":")
        return [(command, int(what))]
    parts = options.commands.split(",") if options.commands else names()
    shares = {name: int(share or 1) for name, _, share in (item.partition("=") for item in parts)}
    rounds = -(-options.kills // sum(shares.values()))
    return [
        (name, number * share + part + options.seed)
        for number in range(rounds)
        for name, share in shares.items()
        for part in range(share)
    ]


def _run(root: Path, work: Work, options: argparse.Namespace) -> int:
    commands = [name for name in SCENARIOS if name in dict(work)]
    counts = {command: Counter[str]() for command in commands}
    with Path(options.told or os.devnull).open("w", encoding="utf-8", buffering=1) as file:
        for entry in _shared(root, commands, work, options):
            seconds = entry.pop("seconds")
            file.write(json.dumps(entry) + "\n")
            outcome = Outcome(**entry)
            count = counts[outcome.command]
            count.update({kind for kind, _ in outcome.problems})
            count["kills"] += outcome.kills
            count["seconds"] += seconds
            if outcome.problems or options.replay:
                print(_words(outcome), flush=True)
    print(_table(counts))
    return int(any(count[kind] for count in counts.values() for kind in KINDS))


def _shared(
    root: Path, commands: Sequence[str], work: Work, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Spreads the work over processes, and gives what came of each piece as it comes."""
    pipes = []
    for job in range(options.jobs):
        read, write = os.pipe()
        if not os.fork():
            code = 1
            try:
                with os.fdopen(write, "w", encoding="utf-8") as result:
                    killing = Killing(root / str(job), commands, most_beginnings=options.states)
                    for command, number in work[job :: options.jobs]:
                        result.write(json.dumps(_done(killing, command, number)) + "\n")
                        result.flush()
                code = 0
            except Exception:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stderr.flush()
                os._exit(code)
        os.close(write)
        pipes.append(os.fdopen(read, encoding="utf-8"))
    yield from _heard(pipes)
    for _ in pipes:
        if os.wait()[1]:
            print("A process of the harness has failed.", file=sys.stderr)
            raise SystemExit(2)


def _done(killing: Killing, command: str, number: int) -> dict[str, Any]:
    begin = time.monotonic()
    return {**asdict(killing.kill(command, number)), "seconds": time.monotonic() - begin}


def _heard(pipes: Sequence[TextIO]) -> Iterator[dict[str, Any]]:
    with selectors.DefaultSelector() as waiting:
        for pipe in pipes:
            waiting.register(pipe, selectors.EVENT_READ)
        while waiting.get_map():
            for key, _ in waiting.select():
                line = cast(TextIO, key.fileobj).readline()
                if line:
                    yield json.loads(line)
                else:
                    waiting.unregister(key.fileobj)


def _words(outcome: Outcome) -> str:
    lines = [f"{outcome.command}:{outcome.seed}: {'; '.join(outcome.story)}"]
    return "\n".join([*lines, *(f"  {kind}: {item}" for kind, item in outcome.problems)])


def _table(counts: dict[str, Counter[str]]) -> str:
    """What came of all kills, a row a command."""
    total = sum(counts.values(), Counter[str]())
    rows = [
        _COLUMNS,
        *(
            (command, *(f"{count[name]:.0f}" for name in _COLUMNS[1:]))
            for command, count in {**counts, "all": total}.items()
        ),
    ]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(_COLUMNS) + "|", *lines[1:]])


if __name__ == "__main__":
    sys.exit(main())
