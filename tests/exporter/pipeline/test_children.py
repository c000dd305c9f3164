"""Work in a process of its own, heard to its end."""

from __future__ import annotations

from exporter.pipeline.sweep import job as children
from exporter.progress import QUIET

SAYS = "import sys; told = sys.stdin.readline(); "


def ended(program: str) -> children.ChildEnd:
    return children.run_child(("-c", SAYS + program), "a request", QUIET)


def test_its_last_word_is_kept() -> None:
    end = ended("""print('{"told": "%s"}' % told.strip())""")
    assert (end.word, end.code) == ({"told": "a request"}, 0)


def test_a_crash_tells_what_it_was_doing() -> None:
    program = """print('{"task": "a build", "total": 1}', flush=True); sys.exit(7)"""
    end = ended(program)
    assert (end.word, end.code, end.during) == ({}, 7, "a build")
    assert "7" in end.told
    assert "a build" in end.told
