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
from collections.abc import Sequence
from pathlib import Path

from tests.hostile.place import Place, clear
from tests.hostile.table import Try, about, summary, table

_STEP = 1_000_000  # seeds of one campaign
_REPOSITORY = Path(__file__).parents[2]


def main() -> int:
    """Runs the campaign."""
    parser = argparse.ArgumentParser(prog="python -m tests.hostile", description=__doc__)
    parser.add_argument("--tries", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--replay", type=int, help="only this seed, and everything about it")
    parser.add_argument(
        "--sound", action="store_true", help="spoil nothing: every command must work"
    )
    parser.add_argument("--strace", action="store_true", help="watch system calls, too")
    parser.add_argument("--only", help="only these commands, such as score,heal")
    parser.add_argument("--kinds", help="only mutations of these kinds, such as 'links,index'")
    parser.add_argument(
        "--keep", type=Path, default=Path("out/hostile"), help="where failures are told"
    )
    options = parser.parse_args()
    options.keep = options.keep.resolve()
    options.keep.mkdir(parents=True, exist_ok=True)
    first = options.seed * _STEP
    replayed = options.replay is not None
    seeds = [options.replay] if replayed else list(range(first, first + options.tries))
    with tempfile.TemporaryDirectory(prefix="hostile-") as folder:
        try:
            lines = _run(Path(folder).resolve(), seeds, options)
        finally:
            for job in Path(folder).glob("place*"):
                clear(job)
    with (options.keep / "tries.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    failed = [line for line in lines if line["faults"]]
    print(*table(lines), "", summary(lines), sep="\n")
    for line in lines if replayed else failed:
        print("", *about(line, everything=replayed), sep="\n")
    return 1 if failed or len(lines) < len(seeds) else 0


def _run(folder: Path, seeds: Sequence[int], options: argparse.Namespace) -> list[Try]:
    """Lets jobs do the tries, each in a process of its own, and gives what they found."""
    from tests.hostile import system_calls

    jobs = []
    count = min(options.jobs, len(seeds))
    for number in range(count):
        outcome = folder / f"told{number}"
        result = {
            "seeds": seeds[number::count], "place": str(folder / f"place{number}"),
            "template": str(folder / "template"),
            "told": str(outcome), "sound": options.sound, "only": options.only,
            "kinds": options.kinds,
            "make": number == 0,
        }  # fmt: skip
        call = [sys.executable, "-P", "-m", "tests.hostile.job", json.dumps(result)]
        if options.strace:
            call = [*system_calls.command(options.keep / f"calls{number}"), *call]
        home = folder / f"place{number}" / "home"
        environment = {
            "PATH": os.environ["PATH"], "HOME": str(home), "PYTHONPATH": str(_REPOSITORY),
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1", "LC_ALL": "C.UTF-8", "HF_TOKEN": "hf_x",
        }  # fmt: skip
        jobs.append((subprocess.Popen(call, env=environment, cwd=folder), outcome))
    broken = [job for job, _ in jobs if job.wait()]
    if broken:
        print(f"a job ended with {broken[0].returncode}", file=sys.stderr)
    lines: list[Try] = []
    for number, (_, item) in enumerate(jobs):
        mine = [json.loads(line) for line in item.read_text().splitlines()] if item.exists() else []
        if options.strace:
            _add_calls(options.keep / f"calls{number}", mine, Place(folder / f"place{number}"))
        lines += mine
    return sorted(lines, key=lambda line: line["seed"])


def _add_calls(log: Path, lines: Sequence[Try], place: Place) -> None:
    """Adds what strace saw of each try: of its process, and of all that began before the next."""
    from tests.hostile import system_calls
    from tests.hostile.judge import without_races
    from tests.hostile.watch import Rules

    by_try = system_calls.by_try(log, [line["pid"] for line in lines])
    for line, calls in zip(lines, by_try, strict=True):
        rules = Rules(
            place, place.work / line["folder"], own_code="--trust-remote-code" in line["arguments"]
        )
        line["calls"] = len(calls)
        texts = sorted(set(system_calls.faults(calls, rules)))
        line["faults"] += without_races(texts, line["kinds"], line["code"])[:20]


if __name__ == "__main__":
    sys.exit(main())
