"""Work in a process of its own: heard to its end, stopped when its time is over."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from exporter.pipeline import children
from exporter.progress import QUIET

SAYS = "import sys; told = sys.stdin.readline(); "


def ended(program: str, **how: object) -> children.ChildEnd:
    return children.run_child(("-c", SAYS + program), "a request", QUIET, **how)  # type: ignore[arg-type]


def test_its_last_word_and_what_it_prints_are_kept(tmp_path: Path) -> None:
    program = """print('{"told": "%s"}' % told.strip()); print("aside", file=sys.stderr)"""
    end = ended(program, log=tmp_path / "log", limit_s=60)
    assert (end.word, end.code, end.late) == ({"told": "a request"}, 0, False)
    assert (tmp_path / "log").read_text() == "aside\n"


def test_one_whose_time_is_over_is_asked_to_end_and_may_still_speak() -> None:
    program = (
        "import signal, time; "
        """signal.signal(15, lambda *_: (print('{"kept": 1}', flush=True), sys.exit(0))); """
        "time.sleep(60)"
    )
    begin = time.monotonic()
    end = ended(program, limit_s=1)
    assert (end.word, end.late) == ({"kept": 1}, True)
    assert time.monotonic() - begin < 30


def test_one_that_does_not_listen_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "_PATIENCE_S", 0.5)
    end = ended("import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)", limit_s=1)
    assert (end.word, end.code, end.late) == ({}, -signal.SIGKILL, True)


def test_a_crash_tells_what_it_was_doing() -> None:
    program = """print('{"task": "a build", "total": 1}', flush=True); sys.exit(7)"""
    end = ended(program)
    assert (end.word, end.code, end.during, end.late) == ({}, 7, "a build", False)
    assert "7" in end.told
    assert "a build" in end.told
