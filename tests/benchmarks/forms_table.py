"""Times several decoders, each in a process of its own, in turns; ratios with their intervals."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from exporter.compare.timing.statistics import estimate

_SCRIPT = Path(__file__).with_name("forms_peer.py")
# depthcut moves its weights to huge pages by itself; so every library gets them.
_HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


@dataclass(frozen=True)
class Measured:
    """What is asked of every arm."""

    prompts: tuple[int, ...] = (512, 2048)
    pasts: tuple[int, ...] = (512, 2048)
    steps: int = 8
    rounds: int = 6
    loads: int = 3

    @property
    def context(self) -> int:
        """Positions that a cache needs."""
        return max(*self.prompts, *self.pasts) + 320

    @property
    def commands(self) -> dict[str, str]:
        """What is timed, by the table's column."""
        prompts = {f"prompt {n}": f"prefill {n}" for n in self.prompts}
        return {**{f"decode {n}": f"decode {n} {self.steps}" for n in self.pasts}, **prompts}


@dataclass(frozen=True)
class Arm:
    """A library on a model."""

    library: str
    model: Path
    python: str = sys.executable
    beside: str | None = None
    steps_alone: bool = False


@dataclass
class Times:
    """Milliseconds ``[load][round]`` by arm and column, and each library's versions."""

    taken: dict[tuple[str, str], list[list[float]]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def median_ms(self, arm: str, column: str) -> float:
        """Over all turns."""
        return float(np.median(np.concatenate(self.taken[arm, column])))

    def ratio(self, arm: str, other: str, column: str) -> tuple[float, float, float]:
        """``arm`` over ``other``, and its 95 % interval over loads."""
        pairs = zip(self.taken[arm, column], self.taken[other, column], strict=True)
        logs = np.array([np.log(np.median(ours) / np.median(theirs)) for ours, theirs in pairs])
        if len(logs) == 1:
            return float(np.exp(logs[0])), float("nan"), float("nan")
        found = estimate(logs)
        return float(np.exp(found.log_ratio)), *found.interval()


def measure(arms: Mapping[str, Arm], what: Measured) -> Times:
    """Loads all arms, asks them in turns, and does so again."""
    times, rng = Times(), np.random.default_rng()
    for load in range(what.loads):
        with contextlib.ExitStack() as stack:
            running = {}
            for name in rng.permutation(sorted(arms)).tolist():
                peer = stack.enter_context(_loaded(name, arms[name], what.context))
                if peer is not None:
                    running[name] = peer
            steps_alone = {name for name in running if arms[name].steps_alone}
            _one_load(running, steps_alone, what, times, rng)
        print(f"  load {load + 1} of {what.loads} done", file=sys.stderr, flush=True)
    return times


def _one_load(
    running: Mapping[str, Peer],
    steps_alone: Set[str],
    what: Measured,
    times: Times,
    rng: np.random.Generator,
) -> None:
    for name, peer in running.items():
        times.versions[name] = ", ".join(f"{key} {value}" for key, value in peer.versions.items())
    # A prompt's column after its decode column: a session then need not run its prompt twice.
    for column in sorted(what.commands, key=lambda text: (int(text.split()[1]), text)):
        command = what.commands[column]
        rounds = what.rounds if command.startswith("decode") else max(1, what.rounds // 3)
        asked = sorted(running if command.startswith("decode") else running.keys() - steps_alone)
        for name in asked:
            times.taken.setdefault((name, column), []).append([])
            running[name].ask(command)
        for _ in range(rounds):
            for name in rng.permutation(asked).tolist():
                times.taken[name, column][-1].append(running[name].ask(command))


@dataclass(frozen=True)
class Peer:
    """A process that has loaded its model."""

    process: subprocess.Popen[str]
    versions: dict[str, str]

    def ask(self, command: str) -> float:
        """Milliseconds."""
        return float(json.loads(answer(self.process, command)))


def answer(process: subprocess.Popen[str], command: str) -> str:
    """One line for a line."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(command + "\n")
    process.stdin.flush()
    return process.stdout.readline()


@contextlib.contextmanager
def _loaded(name: str, arm: Arm, context: int) -> Iterator[Peer | None]:
    from exporter.engines.environment import default_threads

    threads = str(default_threads())
    # Beside the script lie modules that would shadow others.
    command = [arm.python, "-P", str(_SCRIPT), arm.library, str(arm.model), threads, str(context)]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, **_HUGE_PAGES},
        ) as process,
    ):
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.startswith("{"):
            process.wait()
            errors.seek(0)
            reason = "".join(errors.read().strip().splitlines()[-1:]) or "it said nothing"
            print(f"{name}: left out: {reason}", flush=True)
            yield None
            return
        try:
            yield Peer(process, json.loads(line))
        finally:
            assert process.stdin is not None
            process.stdin.close()


def print_table(arms: Mapping[str, Arm], what: Measured, times: Times) -> None:
    """Prints medians, and ratios beside the arms that they are held against."""
    there = [name for name in arms if name in times.versions]
    columns = list(what.commands)
    width = max(map(len, there))
    print(f"{'ms, medians':{width}}  " + "  ".join(f"{column:>13}" for column in columns))
    for name in there:
        cells = (_cell(times, name, column) for column in columns)
        print(f"{name:{width}}  " + "  ".join(cells))
    print()
    for name in there:
        other = arms[name].beside
        if other in there:
            print(f"{name} / {other}: " + "; ".join(_ratios(times, name, other, columns)))
    print()
    for name in there:
        print(f"{name}: {times.versions[name]}")


def _cell(times: Times, name: str, column: str) -> str:
    there = (name, column) in times.taken
    return f"{times.median_ms(name, column):13.2f}" if there else " " * 13


def _ratios(times: Times, name: str, other: str, columns: Sequence[str]) -> Iterator[str]:
    for column in columns:
        ratio, low, high = times.ratio(name, other, column)
        yield f"{column} {ratio:.3f} [{low:.3f}, {high:.3f}]"
