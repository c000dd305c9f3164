"""Times that another tool took: trtexec's ``--exportTimes`` and polygraphy's run results.

trtexec writes a list of objects, one a run. Of them ``computeMs`` is read, the time between two
events around the engine's work, without copies. Versions that write ``endToEndMs`` write their
warm-up too: there runs that began within the usual 200 ms of it are left out. Later ones leave it
out themselves. (TensorRT, ``samples/common/sampleReporting.cpp``.)

polygraphy writes what its runners gave; ``runtime`` are the host's seconds of one iteration.
(``polygraphy/comparator/struct.py``, ``RunResults``.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from exporter.errors import ComparisonError, first_line
from exporter.files import sha256_file
from graph_passes.files.reading import TABLE_BYTES, read_json

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
        raise ComparisonError(f"{path} is no JSON: {first_line(error)}.") from error
    try:
        tool, clock, samples = _trtexec(content) or _polygraphy(content)
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise ComparisonError(
            f"{path} is neither trtexec's exported times nor polygraphy's run results.",
            "Write it with trtexec --exportTimes=FILE, or polygraphy run --save-results FILE.",
        ) from error
    if len(samples) < 2:
        raise ComparisonError(
            f"{path} holds {len(samples)} times after the warm-up; an interval needs 2 at least.",
            "Let the tool run longer.",
        )
    if not all(math.isfinite(each) and each > 0 for each in samples):
        raise ComparisonError(f"{path} holds a time that is no positive number.")
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
        )
    name, iterations = runners[0]
    samples = tuple(float(each["runtime"]) * 1000 for each in iterations)
    return f"polygraphy, {name}", "host", samples
