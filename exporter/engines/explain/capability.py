"""Polygraphy's report of which parts of a graph an engine's parser takes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from exporter.engines.build.libraries import LIBRARIES, Backend, refuse_without_driver
from exporter.errors import EngineError
from exporter.files import staged_directory
from exporter.optional import require
from exporter.progress import QUIET, Progress

_PROGRAM = "from polygraphy.tools import main; main()"


def write_capability_report(
    onnx: Path, folder: Path, *, backend: Backend = "tensorrt-rtx", progress: Progress = QUIET
) -> None:
    """Has Polygraphy cut a graph into the parts that a parser takes and those that it doesn't.

    Args:
        onnx: The ONNX file.
        folder: Where ``results.txt`` and the parts are written as ONNX files; empty of parts where
            the whole graph is taken.
        backend: Which library is asked.
        progress: Hears Polygraphy's log.

    Raises:
        EngineError: The library is not usable here, or Polygraphy fails.
        MissingDependencyError: Polygraphy or onnx-graphsurgeon is not installed.
    """
    library = LIBRARIES[backend]
    refuse_without_driver(library)
    for module in ("polygraphy", "onnx_graphsurgeon", library.module):
        require(module, extra=library.extra)
    with staged_directory(folder) as stage:
        asked = ["inspect", "capability", str(onnx.absolute()), "-o", str(stage)]
        done = subprocess.run(  # noqa: S603
            [
                *(sys.executable, "-P", "-c", _PROGRAM, *asked),
                *("--with-partitioning", "--do-shape-inference"),
            ],
            env={**os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": str(int(library.compiles_on_card))},
            cwd=stage,
            capture_output=True,
            text=True,
            check=False,
        )
        progress.detail(done.stdout + done.stderr)
        if done.returncode:
            last = (done.stderr or done.stdout).strip().splitlines()[-1:]
            raise EngineError(
                f"Polygraphy's report on {onnx} failed: {''.join(last)}",
                "Leave --report out; -v shows Polygraphy's log.",
                code="polygraphy-failed",
            )
