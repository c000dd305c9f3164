"""Two arms that another tool timed: their files, compared.

They didn't take turns, so whatever slowed the machine while one of them ran is part of the result.
How much that is, one file an arm can't tell: there is no verdict then. With ``FEWEST_ROUNDS``
files of each or more, taken in turns, their medians are compared.

trtexec (``--exportTimes``) writes a list of objects, one a run. Of them ``computeMs`` is read, the
time between two events around the engine's work, without copies. Versions that write ``endToEndMs``
write their warm-up too: there runs that began within the usual 200 ms of it are left out. Later
ones leave it out themselves. (TensorRT, ``samples/common/sampleReporting.cpp``.)

polygraphy writes what its runners gave; ``runtime`` are the host's seconds of one iteration.
(``polygraphy/comparator/struct.py``, ``RunResults``.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from exporter.artifacts import Arm, Arms, ComparisonReport, Environment, LatencyRow
from exporter.compare.timing.statistics import Milliseconds, summarize, unpaired_estimate
from exporter.compare.timing.verdict import verdict_of_interval
from exporter.errors import ComparisonError, first_line
from exporter.files import sha256_bytes, sha256_file
from graph_passes.files.reading import TABLE_BYTES, read_json

_NOT_TOLD = "not told"
_BLOCKS = 10  # of one file's times, so that it has a spread within itself


def compare_times(baseline: Path, candidate: Path) -> ComparisonReport:
    """Compares times that were taken elsewhere.

    Args:
        baseline: A file of trtexec's or polygraphy's; or a folder of such files, or a pattern of
            their names, one file a session.
        candidate: Likewise, by the same tool and as many files.

    Raises:
        ComparisonError: A file is of another schema or holds no time, the arms are of different
            tools or clocks, or the numbers of files differ.
    """
    paths = [_files(path) for path in (baseline, candidate)]
    first, second = ([read_times(file) for file in files] for files in paths)
    _refuse_unlike(first, second)
    row = _row(first, second)
    arms = [_arm(path, times) for path, times in ((baseline, first), (candidate, second))]
    hashes = {"baseline": arms[0].sha256, "candidate": arms[1].sha256}
    return ComparisonReport(
        made_from=hashes,
        environment=_elsewhere(),
        arms=Arms(baseline=arms[0], candidate=arms[1]),
        parity=[],
        latency=[row],
        accuracy=None,
    )


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    folder, pattern = (path, "*.json") if path.is_dir() else (path.parent, path.name)
    found = sorted(file for file in folder.glob(pattern) if file.is_file())
    if not found:
        raise ComparisonError(f"There is no file of times at {path}.", code="file-missing")
    return found


def _refuse_unlike(first: Sequence[ImportedTimes], second: Sequence[ImportedTimes]) -> None:
    tools = sorted({times.tool.partition(",")[0] for times in (*first, *second)})
    if len(tools) > 1:
        raise ComparisonError(
            f"The times were taken by different tools ({', '.join(tools)}), which time different "
            "things.",
            "Compare two files of one tool.",
            code="different-tools",
        )
    if len(first) != len(second):
        raise ComparisonError(
            f"The arms have {len(first)} and {len(second)} files of times.",
            "Give as many of each, taken in turns.",
        )


def _row(first: Sequence[ImportedTimes], second: Sequence[ImportedTimes]) -> LatencyRow:
    sessions = len(first)
    baseline, candidate = (_sessions(times) for times in (first, second))
    arms = ((_blocks(ms) if sessions == 1 else ms) for ms in (baseline, candidate))
    speedup = unpaired_estimate(*arms).speedup()
    return LatencyRow(
        phase="run",
        batch=0,
        sequence_length=0,
        past_length=0,
        rounds=sessions,
        baseline=summarize(baseline),
        candidate=summarize(candidate),
        speedup=speedup,
        verdict=verdict_of_interval(speedup.ci95, sessions),
        clock=first[0].clock,
        imported=True,
    )


def _sessions(files: Sequence[ImportedTimes]) -> Milliseconds:
    """``[files, samples]``; as many samples of each as the shortest has."""
    shortest = min(len(file.samples_ms) for file in files)
    return np.array([file.samples_ms[:shortest] for file in files])


def _blocks(samples_ms: Milliseconds) -> Milliseconds:
    """One session's times as ``[blocks, samples]``, what is left over at its end left out."""
    count = min(_BLOCKS, samples_ms.size)
    return samples_ms[0, : samples_ms.size // count * count].reshape(count, -1)


def _arm(path: Path, files: Sequence[ImportedTimes]) -> Arm:
    hashes = [file.sha256 for file in files]
    return Arm(
        backend=files[0].tool,
        provider=_NOT_TOLD,
        precision=_NOT_TOLD,
        path=f"times:{path}",
        sha256=hashes[0] if len(hashes) == 1 else sha256_bytes("\n".join(hashes).encode()),
        file_bytes=0,
        parameters=0,
        nodes=0,
        kv_cache_bytes_per_token=0,
    )


def _elsewhere() -> Environment:
    """Where it was measured, the files don't tell."""
    return Environment(
        machine=_NOT_TOLD,
        processor=_NOT_TOLD,
        cpu_count=0,
        threads=0,
        memory_bytes=0,
        platform=_NOT_TOLD,
        python=_NOT_TOLD,
    )


_WARMUP_MS = 200.0  # trtexec --warmUp


@dataclass(frozen=True)
class ImportedTimes:
    """One file's times.

    Attributes:
        tool: Who took them: ``trtexec``, or ``polygraphy`` with its runner's name.
        clock: Whose clock: the device's events, or the host's.
        samples_ms: In the order in which they were taken.
        sha256: Of the file.
    """

    tool: str
    clock: Literal["host", "device"]
    samples_ms: tuple[float, ...]
    sha256: str


def read_times(path: Path) -> ImportedTimes:
    """Reads a file of either tool.

    Raises:
        ComparisonError: It is not there, of another schema, or holds no usable time.
    """
    try:
        content = read_json(path, limit=TABLE_BYTES, named=True)
    except OSError as error:
        raise ComparisonError(f"{path} can't be read: {error.strerror}.") from error
    except ValueError as error:
        raise ComparisonError(
            f"{path} is no JSON: {first_line(error)}.", code="not-json"
        ) from error
    try:
        tool, clock, samples = _trtexec(content) or _polygraphy(content)
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise ComparisonError(
            f"{path} is neither trtexec's exported times nor polygraphy's run results.",
            "Write it with trtexec --exportTimes=FILE, or polygraphy run --save-results FILE.",
            code="unknown-format",
        ) from error
    if len(samples) < 2:
        raise ComparisonError(
            f"{path} holds {len(samples)} times after the warm-up; an interval needs 2 at least.",
            "Let the tool run longer.",
            code="too-few-times",
        )
    if not all(math.isfinite(each) and each > 0 for each in samples):
        raise ComparisonError(
            f"{path} holds a time that is no positive number.", code="time-not-positive"
        )
    return ImportedTimes(tool, clock, samples, sha256_file(path))


_Found = tuple[str, Literal["host", "device"], tuple[float, ...]]


def _trtexec(content: Any) -> _Found | None:
    if not isinstance(content, list):
        return None
    runs = [(float(run["startComputeMs"]), float(run["computeMs"])) for run in content]
    begin_ms = _WARMUP_MS if content and "endToEndMs" in content[0] else -math.inf
    return "trtexec", "device", tuple(ms for start, ms in runs if start >= begin_ms)


def _polygraphy(content: Any) -> _Found:
    if content["polygraphy_class"] != "RunResults":
        raise ValueError("other results")
    runners = content["lst"]
    if len(runners) != 1:
        names = ", ".join(str(name) for name, _ in runners)
        raise ComparisonError(
            f"These are polygraphy's results of {len(runners)} runners ({names}); an arm is one.",
            "Save the results of each runner in a file of its own.",
            code="several-runners",
        )
    name, iterations = runners[0]
    samples = tuple(float(each["runtime"]) * 1000 for each in iterations)
    return f"polygraphy, {name}", "host", samples
