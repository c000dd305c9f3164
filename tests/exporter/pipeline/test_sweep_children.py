"""A cell's own process: what it says comes through, and its end is a result of the cell."""

from __future__ import annotations

import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from exporter.pipeline.sweep import job as child
from exporter.pipeline.sweep.job import Job

pytest.importorskip("yaml")


class Heard:
    """A progress listener that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[Any] = []

    def say(self, message: str) -> None:
        self.lines.append(message)

    def detail(self, message: str) -> None:
        self.lines.append(("detail", message))

    @contextmanager
    def task(self, description: str, total: int | None = None, unit: str = "") -> Any:
        self.lines.append((description, total))
        try:
            yield self
        except Exception:
            self.lines.append(f"{description} failed")
            raise
        self.lines.append(f"{description} ended")

    def advance(self, steps: int = 1) -> None:
        self.lines.append(steps)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    text = "models: [m]\nplans: [mlp:1]\n"
    return Job(
        str(tmp_path / "s.yaml"), text, str(tmp_path / "out"), 0, "m", "m, mlp-1, fp32", "key"
    )


def run(job: Job, monkeypatch: pytest.MonkeyPatch, script: str) -> tuple[Any, Heard]:
    monkeypatch.setattr(child, "WORKER", ("-c", f"import json, os, sys, time\n{script}"))
    heard = Heard()
    ((place, cell),) = child.run_in_children([job], heard)
    assert place == 0
    return cell, heard


def test_what_it_says_comes_through(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    script = """
told = json.loads(sys.stdin.readline())
cell = dict(model='m', plan=told['name'], precision='p', folder='f', key=told['key'], status='done')
for event in ({'say': 'one'}, {'task': 'load', 'total': 2}, {'advance': 2}, {'detail': 'two'},
              {'task': 'open', 'total': None}, {'end': 'open', 'failed': False},
              {'task': 'cut', 'total': 1}, {'end': 'cut', 'failed': True},
              {'end': 'load', 'failed': False}, {'cell': cell}):
    print(json.dumps(event))
"""
    cell, heard = run(job, monkeypatch, script)
    assert (cell.plan, cell.key, cell.status) == ("m, mlp-1, fp32", "key", "done")
    assert heard.lines == [
        "sweep: 1 of 1: m, mlp-1, fp32 ...",
        "one", ("load", 2), 2, ("detail", "two"), ("open", None), "open ended", ("cut", 1),
        "cut failed", "load ended",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("script", "told", "hint"),
    [
        ("os.kill(os.getpid(), 9)", "was killed: Killed", "memory"),
        ("sys.exit(3)", "ended with exit code 3", None),
        ("print('{\"say\": \"in the mid', end=''); sys.exit(3)", "ended with exit code 3", None),
        ("print(json.dumps({'say': 'a'})); sys.exit(1)", "ended with exit code 1.", None),
        (
            "print(json.dumps({'task': 'load', 'total': 2})); sys.exit(1)",
            "ended with exit code 1, in the middle of 'load'.",
            None,
        ),
    ],
)
def test_one_that_crashes_is_a_cell_that_failed(
    job: Job, monkeypatch: pytest.MonkeyPatch, script: str, told: str, hint: str | None
) -> None:
    cell, heard = run(job, monkeypatch, script)
    assert ("load failed" in heard.lines) == ("'load'" in told)
    assert "load ended" not in heard.lines
    assert cell.status == "failed"
    assert told in cell.failure.message
    assert (cell.failure.hint is None) == (hint is None)


def test_a_full_disk_ends_the_sweep(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OSError, match="Errno 28") as caught:
        run(job, monkeypatch, "print(json.dumps({'full': '/some/where', 'errno': 28}))")
    assert caught.value.filename == "/some/where"


def test_nothing_is_left_running_after_an_interruption(
    job: Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Interrupting(Heard):
        def say(self, message: str) -> None:
            if message == "a":
                raise KeyboardInterrupt

    script = f"""
import signal
def end(*_):
    open({str(tmp_path / "tidied")!r}, 'w').close()
    sys.exit(130)
signal.signal(signal.SIGTERM, end)
print(json.dumps({{'say': 'a'}}), flush=True)
time.sleep(60)
"""
    monkeypatch.setattr(child, "WORKER", ("-c", f"import json, os, sys, time\n{script}"))
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        list(child.run_in_children([job], Interrupting()))
    assert (tmp_path / "tidied").exists()
    assert time.monotonic() - begin < 50  # it was not waited for to the end
