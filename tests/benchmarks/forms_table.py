"""Times several decoders, each in a process of its own, in turns; ratios with their intervals."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from exporter.compare.timing.statistics import estimate

_SCRIPT = Path(__file__).with_name("forms_peer.py")
# depthcut moves its weights to huge pages by itself; so every library gets them.
_HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
_LENGTHS, _STEPS = (512, 2048), 8
_CONTEXT = max(_LENGTHS) + 320
# A prompt's column after its decode column: a session then need not run its prompt twice.
_COLUMNS = {
    f"{word} {n}": command
    for n in _LENGTHS
    for word, command in (("decode", f"decode {n} {_STEPS}"), ("prompt", f"prefill {n}"))
}


@dataclass(frozen=True)
class Arm:
    """A library on a model."""

    library: str
    model: Path
    python: str = sys.executable
    beside: str | None = None


@dataclass
class Times:
    """Milliseconds ``[load][round]`` by arm and column, and each library's versions."""

    taken: dict[tuple[str, str], list[list[float]]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def ratio(self, arm: str, other: str, column: str) -> tuple[float, float, float]:
        """``arm`` over ``other``, and its 95 % interval over loads."""
        pairs = zip(self.taken[arm, column], self.taken[other, column], strict=True)
        logs = np.array([np.log(np.median(ours) / np.median(theirs)) for ours, theirs in pairs])
        if len(logs) == 1:
            return float(np.exp(logs[0])), float("nan"), float("nan")
        ratio = estimate(logs)
        return float(np.exp(ratio.log_ratio)), *ratio.interval()


def measure(arms: Mapping[str, Arm], loads: int, rounds: int) -> Times:
    """Loads all arms, asks them in turns, and does so again."""
    times, rng = Times(), np.random.default_rng()
    for load in range(loads):
        with contextlib.ExitStack() as stack:
            peers = {}
            for name in rng.permutation(sorted(arms)).tolist():
                peer = stack.enter_context(_loaded(name, arms[name]))
                if peer is not None:
                    peers[name] = peer
            _one_load(peers, rounds, times, rng)
        print(f"  load {load + 1} of {loads} done", file=sys.stderr, flush=True)
    return times


def _one_load(
    peers: Mapping[str, Peer], rounds: int, times: Times, rng: np.random.Generator
) -> None:
    for name, peer in peers.items():
        times.versions[name] = ", ".join(f"{key} {value}" for key, value in peer.versions.items())
    for column, command in _COLUMNS.items():
        for name, peer in peers.items():
            times.taken.setdefault((name, column), []).append([])
            peer.ask(command)
        for _ in range(rounds if column.startswith("decode") else max(1, rounds // 3)):
            for name in rng.permutation(sorted(peers)).tolist():
                times.taken[name, column][-1].append(peers[name].ask(command))


@dataclass(frozen=True)
class Peer:
    """A process that has loaded its model."""

    process: subprocess.Popen[str]
    versions: dict[str, str]

    def ask(self, command: str) -> float:
        """Milliseconds."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return float(json.loads(self.process.stdout.readline()))


@contextlib.contextmanager
def _loaded(name: str, arm: Arm) -> Iterator[Peer | None]:
    from exporter.engines.environment import default_threads

    # Beside the script lie modules that would shadow others.
    words = [arm.library, str(arm.model), str(default_threads()), str(_CONTEXT)]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            [arm.python, "-P", str(_SCRIPT), *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, **_HUGE_PAGES},
        ) as process,
    ):
        assert process.stdin is not None
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
            process.stdin.close()


def print_table(arms: Mapping[str, Arm], times: Times) -> None:
    """Prints medians, and ratios beside the arms that they are held against."""
    there = [name for name in arms if name in times.versions]
    width = max(map(len, there))
    print(f"{'ms, medians':{width}}  " + "  ".join(f"{column:>13}" for column in _COLUMNS))
    for name in there:
        cells = (np.median(np.concatenate(times.taken[name, column])) for column in _COLUMNS)
        print(f"{name:{width}}  " + "  ".join(f"{cell:13.2f}" for cell in cells))
    print()
    for name in there:
        other = arms[name].beside
        if other in there:
            ratios = {column: times.ratio(name, other, column) for column in _COLUMNS}
            words = (f"{c} {r:.3f} [{low:.3f}, {high:.3f}]" for c, (r, low, high) in ratios.items())
            print(f"{name} / {other}: " + "; ".join(words))
    print()
    for name in there:
        print(f"{name}: {times.versions[name]}")
