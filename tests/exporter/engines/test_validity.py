"""What the library says of an engine's first bytes becomes an error with a way out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from exporter.engines.build.session import refuse_invalid
from exporter.errors import EngineError
from tests.raising import raises

# As tensorrt_rtx 1.7.1 has them; the test of the tier rtx holds them against it.
FLAGS = {
    "VERSION_MISMATCH": 1,
    "UNSUPPORTED_CC": 2,
    "OLD_CUDA_DRIVER": 4,
    "OLD_CUDA_RUNTIME": 8,
    "INSUFFICIENT_GPU_MEMORY": 16,
    "MALFORMED_ENGINE": 32,
    "CUDA_ERROR": 64,
}
CODES = {
    1: "other-version",
    2: "unsupported-card",
    4: "driver-too-old",
    8: "runtime-too-old",
    16: "out-of-memory",
    32: "malformed-engine",
    64: "cuda-broken",
    2 | 16: "unsupported-card",  # memory is no matter on a card that can't run it
    0: "invalid",
}
VALID, SUBOPTIMAL, INVALID = range(3)


class Library(SimpleNamespace):
    """Answers for an engine, and keeps what it was shown."""

    engine_header_size = 4

    def __init__(self, validity: int, told: int) -> None:
        super().__init__(__name__="tensorrt_rtx", __version__="1.7.1.116")
        self.EngineValidity = SimpleNamespace(INVALID=INVALID)
        self.EngineInvalidityDiagnostics = SimpleNamespace(**FLAGS)
        self.answer, self.seen = (validity, told), b""

    def get_engine_validity(self, header: bytes) -> tuple[int, int]:
        self.seen = header
        return self.answer


def asked(path: Path, validity: int, told: int = 0) -> Library:
    library: Any = Library(validity, told)
    path.write_bytes(b"head and the rest")
    refuse_invalid(library, library, path)
    return library


@pytest.mark.parametrize("told", CODES, ids=CODES.get)
def test_each_reason_is_one_line_with_a_code(told: int, tmp_path: Path) -> None:
    path = tmp_path / "m.engine"
    with raises(EngineError, CODES[told], path, "1.7.1.116") as caught:
        asked(path, INVALID, told)
    assert "\n" not in caught.value.message
    assert caught.value.hint or not told


@pytest.mark.parametrize("validity", [VALID, SUBOPTIMAL])
def test_what_is_valid_passes_and_the_header_alone_is_read(validity: int, tmp_path: Path) -> None:
    assert asked(tmp_path / "m.engine", validity, 2).seen == b"head"


def test_tensorrt_has_no_such_call(tmp_path: Path) -> None:
    runtime = SimpleNamespace(__name__="tensorrt")
    refuse_invalid(runtime, runtime, tmp_path / "not-even-there.engine")  # type: ignore[arg-type]


@pytest.mark.rtx
def test_the_real_library_has_these_reasons_and_calls_other_bytes_malformed(tmp_path: Path) -> None:
    import tensorrt_rtx as trt

    members = trt.EngineInvalidityDiagnostics.__members__
    assert {name: int(value) for name, value in members.items()} == FLAGS
    (tmp_path / "m.engine").write_bytes(bytes(64))
    with raises(EngineError, "malformed-engine"):
        refuse_invalid(trt, trt.Runtime(trt.Logger(trt.Logger.ERROR)), tmp_path / "m.engine")
