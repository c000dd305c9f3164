"""What the library says of an engine's first bytes becomes an error with a way out."""

from __future__ import annotations

import enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from exporter.engines.build.session import refuse_invalid
from exporter.errors import EngineError
from tests.raising import raises

Flags = enum.IntFlag("Flags", "VERSION_MISMATCH UNSUPPORTED_CC INSUFFICIENT_GPU_MEMORY")
VALID, SUBOPTIMAL, INVALID = range(3)


class Library(SimpleNamespace):
    """Answers for an engine, and keeps what it was shown."""

    engine_header_size = 4

    def __init__(self, validity: int, told: int) -> None:
        super().__init__(__name__="tensorrt_rtx", __version__="1.7.1.116")
        self.EngineValidity = SimpleNamespace(INVALID=INVALID)
        self.EngineInvalidityDiagnostics = Flags
        self.answer, self.seen = (validity, told), b""

    def get_engine_validity(self, header: bytes) -> tuple[int, int]:
        self.seen = header
        return self.answer


def asked(path: Path, validity: int, told: int = 0) -> Library:
    library: Any = Library(validity, told)
    path.write_bytes(b"head and the rest")
    refuse_invalid(library, library, path)
    return library


@pytest.mark.parametrize(
    ("told", "code", "named"),
    [
        (1, "invalid-engine", ("VERSION_MISMATCH",)),
        (4, "out-of-memory", ("INSUFFICIENT_GPU_MEMORY",)),
        (2 | 4, "invalid-engine", ("UNSUPPORTED_CC",)),  # memory is no matter on such a card
        (0, "invalid-engine", ()),
    ],
)
def test_the_library_s_reasons_are_told(
    told: int, code: str, named: tuple[str, ...], tmp_path: Path
) -> None:
    path = tmp_path / "m.engine"
    with raises(EngineError, code, path, "1.7.1.116", *named):
        asked(path, INVALID, told)


@pytest.mark.parametrize("validity", [VALID, SUBOPTIMAL])
def test_what_is_valid_passes_and_the_header_alone_is_read(validity: int, tmp_path: Path) -> None:
    assert asked(tmp_path / "m.engine", validity, 2).seen == b"head"


def test_tensorrt_has_no_such_call(tmp_path: Path) -> None:
    runtime = SimpleNamespace(__name__="tensorrt")
    refuse_invalid(runtime, runtime, tmp_path / "not-even-there.engine")  # type: ignore[arg-type]


@pytest.mark.rtx
def test_the_real_library_calls_other_bytes_malformed(tmp_path: Path) -> None:
    import tensorrt_rtx as trt

    assert hasattr(trt.EngineInvalidityDiagnostics, "INSUFFICIENT_GPU_MEMORY")
    (tmp_path / "m.engine").write_bytes(bytes(64))
    with raises(EngineError, "invalid-engine", "MALFORMED_ENGINE"):
        refuse_invalid(trt, trt.Runtime(trt.Logger(trt.Logger.ERROR)), tmp_path / "m.engine")
