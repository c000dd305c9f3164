"""What comes before any time is taken: the card, the tests, whether answers are right."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from typing import Any

import onnx_ir as ir

from exporter.artifacts import GpuCard, GpuCheck, GpuTests
from exporter.engines.build.driver import ask_driver
from exporter.engines.build.libraries import LIBRARIES, Backend
from exporter.engines.decoding.runner_decoder import OnnxRuntimeDecoder
from exporter.engines.doctor import diagnose
from exporter.errors import DepthcutError, EngineError
from exporter.optional import require
from exporter.pipeline.gpu.answers import BOTH, RANGES, answers, checks
from exporter.pipeline.gpu.timing import memory_speed, opened
from exporter.pipeline.gpu.workplace import Workplace


def look_at_card(place: Workplace) -> None:
    """The card, its memory's speed, and what of depthcut's libraries is missing."""
    driver = ask_driver()
    peak, copied = memory_speed(LIBRARIES[place.order.engine].extra)
    card = driver.devices[0]
    place.found.card = GpuCard(
        name=card.name,
        compute_capability=card.compute_capability,
        memory_bytes=card.memory_bytes,
        cuda_version=driver.cuda_version,
        peak_bytes_per_s=peak,
        copy_bytes_per_s=copied,
    )
    for each in diagnose().components:
        told = each.found or f"missing ({each.remedy})"
        place.found.notes.append(f"{each.name.strip()}: {told}")


class _Counts:
    """A plugin of pytest's that counts."""

    def __init__(self) -> None:
        self.counts = {"passed": 0, "failed": 0, "skipped": 0}
        self.failures: list[str] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Hears of each part of a test: a setup may fail or skip, the call may do all three."""
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
        if report.outcome == "failed":
            self.failures.append(report.nodeid)


def run_tests(place: Workplace) -> None:
    """The tests that need a GPU, in this process.

    Raises:
        EngineError: pytest is missing or can't collect them.
    """
    folder = place.order.tests
    if folder is None:
        place.found.notes.append("not run: in a clone, say --tests tests/gpu")
        return
    pytest = require("pytest", extra="dev")
    heard = _Counts()
    code = pytest.main(["-q", "-m", "gpu", "-p", "no:cacheprovider", folder], plugins=[heard])
    place.found.tests = GpuTests(**heard.counts, failures=heard.failures)
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise EngineError(
            f"pytest did not run {folder}: {pytest.ExitCode(code).name}.",
            "See the step's log.",
            code="tests-not-run",
        )


def check_numbers(place: Workplace) -> None:
    """A tiny decoder with its caches in place, by each library, against ONNX Runtime."""
    for backend in LIBRARIES.values():
        if backend.module not in sys.modules and importlib.util.find_spec(backend.module) is None:
            place.found.notes.append(f"{backend.backend}: not installed")
            continue
        for dtype, tolerance in place.case.dtypes.items():
            try:
                _check(place, backend.backend, dtype, tolerance)
            except DepthcutError as error:  # another type, or the other library, may well work
                place.found.notes.append(f"{backend.backend}, {dtype.name}: {error.message}")


def _check(place: Workplace, backend: Backend, dtype: ir.DataType, tolerance: float) -> None:
    shape, kind = replace(place.case.tiny, dtype=dtype), dtype.name.lower()

    def measured() -> list[GpuCheck]:
        grows = place.model(f"{kind}-grows", shape, in_place=False)
        with OnnxRuntimeDecoder(grows, threads=1) as reference:
            wanted = answers(reference, place.case.room)
        engines = place.engines(
            place.model(kind, shape), f"{backend}-{kind}", BOTH, RANGES, backend=backend
        )
        with opened(engines) as decoder:
            found = answers(decoder, place.case.room)
        return checks(
            found, wanted, tolerance, subject=f"{backend}, {kind}", against="ONNX Runtime"
        )

    place.rows(f"{backend}, {kind}", GpuCheck, measured)
