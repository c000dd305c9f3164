"""What a building process tells of its progress."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from exporter.engines.build.child import _listen


class Steps:
    def __init__(self) -> None:
        self.steps = list[int]()

    def advance(self, steps: int = 1) -> None:
        self.steps.append(steps)


@pytest.mark.parametrize("told", [[0.2, 0.6, 0.1, 0.9], [0.5, 0.5], []])
def test_the_bar_never_goes_back(told: list[float]) -> None:
    lines = "".join(json.dumps({"progress": each}) + "\n" for each in told)
    script = f"print({lines!r}, end='')"
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    task = Steps()
    assert _listen(child, task) == {}
    assert min(task.steps) >= 0
    assert sum(task.steps) == 100
