"""What is asked before CUDA or a runtime is touched, and in which order."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest

from exporter.engines.build import libraries as cuda_versions
from exporter.engines.build import session
from exporter.engines.build.engine_set import find_engines
from exporter.engines.build.libraries import Device, Driver, ask_driver
from exporter.engines.runners.tensorrt import open_engine
from exporter.errors import BackendError, EngineError
from tests.engine_support import written_as
from tests.raising import raises

PHASES = ("prefill", "decode")
no_driver = pytest.mark.skipif(not ask_driver().problem, reason="there is an NVIDIA driver")

# What must not have been imported where there is no driver.
_SCRIPT = """
import sys
from pathlib import Path
from exporter.engines.runners.tensorrt import open_engine
from exporter.errors import BackendError
try:
    open_engine(Path(sys.argv[1])).__enter__()
except BackendError as error:
    print(error.message)
print([name for name in sys.modules if name.partition(".")[0] in ("tensorrt_rtx", "cuda")])
"""


def told(*_: object) -> NoReturn:
    pytest.fail("this must not be touched yet")


@no_driver
def test_without_a_driver_nothing_of_cuda_is_even_imported(tmp_path: Path) -> None:
    engine = written_as(tmp_path / "m.engine", phases=PHASES)
    command = [sys.executable, "-c", _SCRIPT, engine]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    said, imported = done.stdout.splitlines()
    assert said == f"{engine}: built, not run: no NVIDIA driver."
    assert imported == "[]"


@no_driver
def test_the_trial_s_process_asks_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the caller believes: what that process says reaches the user as one line."""
    engines = find_engines(written_as(tmp_path / "m.engine", phases=PHASES))
    monkeypatch.setattr(session, "refuse_unready", lambda _: None)
    with raises(EngineError, "no-driver", "m.engine") as caught:
        session.try_engines(engines)
    assert "\n" not in caught.value.message


def test_the_driver_is_asked_before_the_library_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "ask_driver", lambda: Driver("the NVIDIA driver finds no GPU"))
    monkeypatch.setattr(session, "load", told)
    runner = open_engine(written_as(tmp_path / "m.engine", phases=PHASES))
    with raises(BackendError, "no-driver", "finds no GPU"):
        runner.__enter__()


def test_another_version_or_card_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Module:
        __version__ = "1.7.1.116"

    card = Device("a card", "sm90", 80_000_000_000)
    monkeypatch.setattr(session, "ask_driver", lambda: Driver("", "13.0", (card,)))
    monkeypatch.setattr(session, "load", lambda _: Module)
    monkeypatch.setattr("exporter.engines.build.session.run_job", told)
    path = written_as(tmp_path / "m.engine", phases=PHASES, backend_version="1.6.1.120")
    with raises(EngineError, "other-version", "1.6.1.120", "sm90", "1.7.1.116"):
        open_engine(path).__enter__()
    path = written_as(tmp_path / "m.engine", phases=PHASES)
    with raises(EngineError, "other-card", "sm89", "sm90"):
        open_engine(path).__enter__()


def test_an_old_driver_is_refused_before_the_library_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = Device("a card", "sm89", 24 << 30)
    monkeypatch.setattr(session, "ask_driver", lambda: Driver("", "12.8", (card,)))
    monkeypatch.setattr(cuda_versions, "built_for_cuda", {"tensorrt-rtx": 13}.get)
    monkeypatch.setattr(session, "load", told)
    runner = open_engine(written_as(tmp_path / "m.engine", phases=PHASES))
    with raises(BackendError, "driver-too-old", "tensorrt-rtx", "12.8", "[rtx-cu12]"):
        runner.__enter__()
