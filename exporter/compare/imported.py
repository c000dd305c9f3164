"""Two arms that another tool timed: their files, compared.

They didn't take turns, so whatever slowed the machine while one of them ran is part of the result.
How much that is, one file an arm can't tell: there is no verdict then. With
``FEWEST_ROUNDS`` files of each or more, taken in turns, their medians are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from exporter.artifacts import Arm, Arms, ComparisonReport, Environment, LatencyRow
from exporter.errors import ComparisonError

if TYPE_CHECKING:
    from exporter.compare.imported_times import ImportedTimes
    from exporter.compare.timing.statistics import Milliseconds

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
    from exporter.compare.imported_times import read_times

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
        raise ComparisonError(f"There is no file of times at {path}.")
    return found


def _refuse_unlike(first: Sequence[ImportedTimes], second: Sequence[ImportedTimes]) -> None:
    tools = sorted({times.tool.partition(",")[0] for times in (*first, *second)})
    if len(tools) > 1:
        raise ComparisonError(
            f"The times were taken by different tools ({', '.join(tools)}), which time different "
            "things.",
            "Compare two files of one tool.",
        )
    if len(first) != len(second):
        raise ComparisonError(
            f"The arms have {len(first)} and {len(second)} files of times.",
            "Give as many of each, taken in turns.",
        )


def _row(first: Sequence[ImportedTimes], second: Sequence[ImportedTimes]) -> LatencyRow:
    from exporter.compare.timing.statistics import summarize, unpaired_speedup, verdict

    sessions = len(first)
    baseline, candidate = (_sessions(times) for times in (first, second))
    speedup = unpaired_speedup(
        *((_blocks(ms) if sessions == 1 else ms) for ms in (baseline, candidate))
    )
    return LatencyRow(
        phase="run",
        batch=0,
        sequence_length=0,
        past_length=0,
        rounds=sessions,
        baseline=summarize(baseline),
        candidate=summarize(candidate),
        speedup=speedup,
        verdict=verdict(speedup, rounds=sessions),
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
    from exporter.files import sha256_bytes

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
