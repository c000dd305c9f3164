"""Tries hostile folders on every command: ``python -m tests.hostile --tries 2000 --seed 1``.

Each try makes a sound folder, spoils it one to three times, calls a command on it in a process that
is watched, and looks at all that came of it. With --strace it is seen, too, what libraries in C and
Rust open. A failure prints the seed that makes it again: ``--replay SEED``. Ends with 1 if there
was one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.hostile import system_calls
from tests.hostile.cases import CASES
from tests.hostile.judge import without_races
from tests.hostile.place import Place, clear
from tests.hostile.watch import REPOSITORY, Rules

_STEP = 1_000_000  # seeds of one campaign
_CODES = {0: "harmless", 2: "refused"}

Try = dict[str, Any]
"""All about a try, as a job tells it."""


def main() -> int:
    """Runs the campaign."""
    parser = argparse.ArgumentParser(prog="python -m tests.hostile", description=__doc__)
    parser.add_argument("--tries", type=int, help="100, and none beside --cases")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--replay", type=int, help="only this seed, and everything about it")
    parser.add_argument(
        "--sound", action="store_true", help="spoil nothing: every command must work"
    )
    parser.add_argument("--cases", action="store_true", help="what was reported, each once")
    parser.add_argument("--strace", action="store_true", help="watch system calls, too")
    parser.add_argument("--only", help="only these commands, such as score,heal")
    parser.add_argument("--kinds", help="only mutations of these kinds, such as 'links,index'")
    parser.add_argument(
        "--keep", type=Path, default=Path("out/hostile"), help="where failures are told"
    )
    options = parser.parse_args()
    options.keep = options.keep.resolve()
    options.keep.mkdir(parents=True, exist_ok=True)
    replayed = options.replay is not None
    tries = options.tries if options.tries is not None else 0 if options.cases else 100
    seeds = [*range(len(CASES) if options.cases else 0)]
    seeds += range(options.seed * _STEP, options.seed * _STEP + tries)
    if replayed:
        seeds = [options.replay]
    with tempfile.TemporaryDirectory(prefix="hostile-") as folder:
        try:
            lines = _run(Path(folder).resolve(), seeds, options)
        finally:
            for job in Path(folder).glob("place*"):
                clear(job)
    with (options.keep / "tries.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    failed = [line for line in lines if line["faults"]]
    print(*_table(lines), sep="\n")
    for line in lines if replayed else failed:
        print(f"\n--replay {line['seed']}: depthcut {' '.join(line['arguments'])}")
        print(f"  {', '.join(line['mutations'])}: {line['notes']}, exit code {line['code']}")
        print(*line["faults"], line["said"] if replayed else "", sep="\n")
    return 1 if failed or len(lines) < len(seeds) else 0


def _run(folder: Path, seeds: Sequence[int], options: argparse.Namespace) -> list[Try]:
    """Lets jobs do the tries, each in a process of its own, and gives what they found."""
    environment = {
        "PATH": os.environ["PATH"], "HOME": str(folder / "home"), "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1", "LC_ALL": "C.UTF-8",
        "HF_TOKEN": "hf_x",
    }  # fmt: skip
    jobs = []
    for number in range(min(options.jobs, len(seeds))):
        place, result = folder / f"place{number}", folder / f"told{number}"
        request = {
            "seeds": seeds[number :: options.jobs], "place": str(place),
            "template": str(folder / f"template{number}"), "told": str(result),
            "sound": options.sound,
            "only": options.only, "kinds": options.kinds,
        }  # fmt: skip
        call = [sys.executable, "-P", "-m", "tests.hostile.job", json.dumps(request)]
        log = options.keep / f"calls{number}"
        if options.strace:
            call = [*system_calls.command(log), *call]
        home = {"HOME": str(place / "home")}
        process = subprocess.Popen(call, env={**environment, **home}, cwd=folder)
        jobs.append((process, Place(place), result, log))
    broken = [process for process, *_ in jobs if process.wait()]
    if broken:
        print(f"a job ended with {broken[0].returncode}", file=sys.stderr)
    lines: list[Try] = []
    for _, at, result, log in jobs:
        mine = [json.loads(line) for line in result.open()] if result.exists() else []
        if options.strace:
            _add_calls(log, mine, at)
        lines += mine
    return sorted(lines, key=lambda line: line["seed"])


def _add_calls(log: Path, lines: Sequence[Try], place: Place) -> None:
    """Adds what strace saw of each try: of its process, and of all that began before the next."""
    by_try = system_calls.by_try(log, [line["pid"] for line in lines])
    for line, calls in zip(lines, by_try, strict=True):
        own_code = "--trust-remote-code" in line["arguments"]
        rules = Rules(place, place.work / line["folder"], own_code=own_code)
        texts = sorted(set(system_calls.faults(calls, rules)))
        line["faults"] += without_races(texts, line["kinds"], line["code"])[:20]


def _table(tries: Sequence[Try]) -> Iterator[str]:
    """A row for each kind of mutation, and one for all; a try counts once for each of its kinds."""
    rows: dict[str, Counter[str]] = defaultdict(Counter)
    for line in tries:
        came = {"tries", _CODES.get(line["code"], "other end"), "failed" if line["faults"] else ""}
        for kind in {*line["kinds"], "all"}:
            rows[kind].update(
                {*came, *(fault.partition(":")[0] for fault in line["faults"])} - {""}
            )
    names = ["tries", *sorted(rows["all"].keys() - {"tries"})]
    yield f"| mutation | {' | '.join(names)} |\n|---|{'---:|' * len(names)}"
    for kind in sorted(rows, key=lambda name: (name == "all", name)):
        yield f"| {kind} | {' | '.join(str(rows[kind][name]) for name in names)} |"
    yield f"the longest took {max((line['seconds'] for line in tries), default=0):.1f} s"


if __name__ == "__main__":
    sys.exit(main())
