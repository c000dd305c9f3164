"""Kills commands at random: ``python -m tests.kills --kills 1000 --seed 1``.

Each kill follows from its command and its number: ``--replay prune:17`` makes one again and tells
what was done. Ends with 1 if anything was mixed, stale, lost or different, and with 2 if the
harness itself failed.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

from tests.forked import warm_up
from tests.kills.killing import Killing, Outcome
from tests.kills.scenarios import names

KINDS = ("mixed", "stale", "lost", "different")

Work = list[tuple[str, int]]
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
    print(f"{len(work)} pieces of work", flush=True)
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", NO_COLOR="1")
    warm_up()
    with tempfile.TemporaryDirectory() as folder:
        try:
            return _run(folder, work, options)
        except Exception:
            traceback.print_exc()
            return 2


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


def _run(folder: str, work: Work, options: argparse.Namespace) -> int:
    counts: dict[str, Counter[str]] = {command: Counter() for command, _ in work}
    with Path(options.told or os.devnull).open("w", encoding="utf-8", buffering=1) as file:
        for outcome in _outcomes(folder, work, options):
            file.write(json.dumps(asdict(outcome)) + "\n")
            count = counts[outcome.command]
            count.update({"kills": outcome.kills, **{kind: 1 for kind, _ in outcome.problems}})
            if outcome.problems or options.replay:
                print(f"{outcome.command}:{outcome.seed}: {'; '.join(outcome.story)}")
                print(*(f"  {kind}: {item}" for kind, item in outcome.problems), sep="\n")
    counts["all"] = sum(counts.values(), Counter())
    columns = ("kills", *KINDS)
    print(f"| command | {' | '.join(columns)} |\n{'|---' * (1 + len(columns))}|")
    for command, count in counts.items():
        print(f"| {command} | {' | '.join(str(count[name]) for name in columns)} |")
    return int(any(counts["all"][kind] for kind in KINDS))


def _outcomes(folder: str, work: Work, options: argparse.Namespace) -> Iterator[Outcome]:
    """Spreads the work over processes, and gives what came of each piece as it comes."""
    commands = tuple({command for command, _ in work})
    with ProcessPoolExecutor(options.jobs, get_context("fork")) as pool:
        kill = functools.partial(_killed, folder, commands, options.states)
        jobs = [pool.submit(kill, *item) for item in work]
        yield from (job.result() for job in as_completed(jobs))


def _killed(
    folder: str, commands: tuple[str, ...], states: int | None, command: str, number: int
) -> Outcome:
    return _killing(folder, commands, states).kill(command, number)


@functools.cache
def _killing(folder: str, commands: tuple[str, ...], states: int | None) -> Killing:
    """What this process kills in."""
    return Killing(Path(folder, str(os.getpid())), commands, most_beginnings=states)


if __name__ == "__main__":
    sys.exit(main())
