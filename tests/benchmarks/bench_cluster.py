"""Scores by two workers of a local Ray cluster, held against a single process's.

Run it alone with ``python -m tests.benchmarks.bench_cluster [MODEL] [--samples N] [--length N]``;
MODEL is by default the SmolLM2 of the wheel. The scores must be the same to the last bit where
every process has one thread, also when a worker is killed on the way; else this fails. Times are
printed: the whole from the start to the report, and the cluster's start alone.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exporter.score import ScoreOptions

METRICS = ("cosine", "angular-last", "relative-l2", "kl", "perplexity", "taylor")
KILL_AFTER_S = 5.0


def alone(model: str, how: ScoreOptions, threads: int) -> tuple[Any, float]:
    """The report of one process, and its seconds."""
    import torch

    from exporter.models.loading.model_source import load_model
    from exporter.score import score

    torch.set_num_threads(threads)
    begin = time.perf_counter()
    report = score(load_model(model), how)
    return report, time.perf_counter() - begin


def spread(model: str, how: ScoreOptions, workers: int) -> tuple[Any, float, float]:
    """The report of several workers, the seconds of all of it, and of the cluster's start."""
    from exporter.score.cluster.pool import open_pool
    from exporter.score.cluster.scoring import score_on_cluster

    begin = time.perf_counter()
    with open_pool(workers=workers) as pool:
        started = time.perf_counter() - begin
        report = score_on_cluster(model, pool, how)
        return report, time.perf_counter() - begin, started


@contextmanager
def one_is_killed() -> Iterator[list[int]]:
    """Kills the first worker that is seen at work, some seconds later; gives its process id."""
    killed: list[int] = []
    ended = threading.Event()

    def watch() -> None:
        while not ended.is_set() and not killed:
            for pid in workers_at_work():
                ended.wait(KILL_AFTER_S)
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
                return
            ended.wait(0.05)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield killed
    finally:
        ended.set()
        watcher.join()


def workers_at_work() -> list[int]:
    """Processes below this one that Ray names after the piece of work that they do."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            at_work = (folder / "cmdline").read_bytes().startswith(b"ray::Worker.do")
            if at_work and os.getpid() in parents(int(folder.name)):
                found.append(int(folder.name))
        except OSError:  # it has ended
            continue
    return found


def parents(pid: int) -> Iterator[int]:
    """What a process was started by, up to the first of all."""
    while pid > 1:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        pid = next(int(line.split()[1]) for line in lines if line.startswith("PPid:"))
        yield pid


def difference(one: Any, other: Any) -> float:
    """The largest difference of any score by any metric, relative to the metric's largest."""
    largest = 0.0
    for first, second in zip(tables(one), tables(other), strict=True):
        scale = max(abs(score.score) for score in first)
        largest = max(
            largest,
            *(abs(a.score - b.score) / scale for a, b in zip(first, second, strict=True)),
        )
    return largest


def tables(report: Any) -> list[Any]:
    """The scores of each metric."""
    return [report.scores, *(each.scores for each in report.further)]


def told(name: str, seconds: float, rest: str = "") -> None:
    """One line."""
    print(f"  {name:<34} {seconds:7.1f} s{rest}", flush=True)


def judged(name: str, call: Callable[[], tuple[Any, float, float]], reference: Any) -> bool:
    """Runs on the cluster, prints the times, and says whether the scores are the reference's."""
    report, seconds, started = call()
    same = tables(report) == tables(reference)
    words = "equal to the last bit" if same else f"DIFFERENT by {difference(reference, report):.1e}"
    told(name, seconds, f", {started:.1f} s of it the cluster's start: {words}")
    return same


def main() -> int:
    """Prints all figures; 1 when scores differ."""
    from exporter.score import ScoreOptions
    from tests.benchmarks.small_model import default_model

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--text", default="pydoc")
    asked = parser.parse_args()
    model = asked.model or default_model()
    os.environ["OMP_NUM_THREADS"] = "1"
    how = ScoreOptions(
        METRICS, asked.text, samples=asked.samples, sequence_length=asked.length, batch_size=2
    )
    print(f"{asked.samples} x {asked.length} tokens of {asked.text}, {', '.join(METRICS)}:")
    reference, seconds = alone(model, how, 1)
    told("one process, one thread", seconds)
    same = judged("two workers, one thread each", lambda: spread(model, how, 2), reference)
    with one_is_killed() as killed:
        still = judged("the same, one of them killed", lambda: spread(model, how, 2), reference)
    if not killed:
        print("  NO WORKER WAS KILLED: give it more to do with --samples")
    wide, seconds = alone(model, how, 2)
    rest = difference(reference, wide)
    told("one process, two threads", seconds, f": scores within {rest:.1e} of one thread's")
    return 0 if same and still and killed else 1


if __name__ == "__main__":
    sys.exit(main())
