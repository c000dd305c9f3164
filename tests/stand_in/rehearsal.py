"""A card for the processes of a GPU session's rehearsal: it is put in place when one begins.

``python -m tests.stand_in.rehearsal DIR`` rehearses a session; its page is in the documents. The
environment's ``REHEARSAL`` may name a step at whose second measurement the session is killed.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

from exporter.engines.build.profiles import Ranges
from exporter.engines.build.settings import BuildSettings
from exporter.pipeline.gpu import workplace
from exporter.pipeline.gpu.session import run_session
from exporter.pipeline.gpu.workplace import Order, Workplace
from graph_passes.files.storage import data_files, load_model
from tests.stand_in.engine_files import write_engine
from tests.stand_in.installed import stand_in

MEMORY_BYTES = 4_000_000
ROWS = Workplace.rows
_OPEN = ExitStack()


def install() -> None:
    """Puts the card in place until the process ends."""
    _OPEN.enter_context(stand_in(memory_bytes=MEMORY_BYTES))
    _OPEN.enter_context(mock.patch.object(workplace, "build_engines", build_engines))
    _OPEN.enter_context(mock.patch.object(workplace.Workplace, "rows", _rows))


def _rows(place: Workplace, *arguments: Any) -> Any:
    found = ROWS(place, *arguments)
    if len(place.found.times) > 1 and place.folder.name == os.environ.get("REHEARSAL"):
        os.kill(os.getppid(), signal.SIGKILL)  # and this process with it
        time.sleep(60)
    return found


def build_engines(
    onnx: Path,
    target: Path,
    *,
    phases: Sequence[str],
    ranges: Ranges,
    backend: str,
    settings: BuildSettings,
    **_: Any,
) -> None:
    """Engines that name their graph; their weights take as much as the graph's."""
    weights = sum(path.stat().st_size for path in data_files(load_model(onnx)))
    for phase in phases:
        write_engine(
            onnx, target.with_stem(f"{target.stem}-{phase}"), [phase], ranges, backend=backend,
            settings=settings, weights_bytes=weights,
        )  # fmt: skip


def order() -> Order:
    """What a rehearsal's steps are told."""
    tests = Path(__file__).with_name("card_tests.py")
    return Order("tensorrt-rtx", str(tests), "tests.stand_in.rehearsal")


if __name__ == "__main__":
    run_session(Path(sys.argv[1]), order())
