"""A few kills of every command, the same every time."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.kills.scenarios import names

pytestmark = [pytest.mark.torch, pytest.mark.long]

_ROOT = Path(__file__).parents[2]
# Kills; of the others _CHEAP. A sweep runs for minutes, so CI kills none.
_DEAR = {"quantize": 2, "compare": 2, "export": 1, "sweep": 0, "build": 1, "export-with-all": 0}
_CHEAP = 2
_STATES = "2"


def _kills(command: str) -> int:
    return 4 if command == "prune" else _DEAR.get(command, _CHEAP)


_KILLED = [name for name in names() if _kills(name)]


_UNRECORDED = "prune-unrecorded"
_HARNESS = f"""
import sys
from graph_passes.files.record import ChangeRecord
from tests.forked import depthcut
from tests.kills.__main__ import main
from tests.kills.scenarios import SCENARIOS, Scenario

class Unrecorded(Scenario):
    def task(self, number):
        def unrecorded():
            ChangeRecord.write = lambda *_: None
            return depthcut(line)
        line = super().task(number)
        return line if number else unrecorded

SCENARIOS["{_UNRECORDED}"] = Unrecorded(**vars(SCENARIOS["prune"]))
sys.exit(main())
"""


@dataclass(frozen=True)
class Campaign:
    """What the harness ends with, tells of each piece of work, and prints."""

    code: int
    told: list[dict[str, Any]]
    printed: str

    def of(self, command: str) -> list[dict[str, Any]]:
        return [item for item in self.told if item["command"] == command]


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    """All kills in one process; it imports for seconds."""
    path = tmp_path_factory.mktemp("kills") / "told"
    kills = {name: _kills(name) for name in _KILLED} | {_UNRECORDED: 16}
    call = [
        *(sys.executable, "-c", _HARNESS, "--told", path, "--states", _STATES),
        *("--commands", ",".join(f"{name}={share}" for name, share in kills.items())),
        *("--kills", str(sum(kills.values()))),
    ]
    ran = subprocess.run(call, cwd=_ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert ran.returncode in (0, 1), ran.stderr
    lines = path.read_text(encoding="utf-8").splitlines()
    return Campaign(ran.returncode, list(map(json.loads, lines)), ran.stdout)


@pytest.mark.parametrize("command", _KILLED)
def test_a_killed_command_leaves_the_old_result_or_the_new_one(
    command: str, campaign: Campaign
) -> None:
    killed = campaign.of(command)
    assert sum(item["kills"] for item in killed) >= _kills(command)
    replay = f"python -m tests.kills --states {_STATES} --replay {command}:"
    bad = {f"{replay}{item['seed']}": item["problems"] for item in killed if item["problems"]}
    assert not bad


def test_kills_are_seen_to_do_harm_where_no_record_is_kept(campaign: Campaign) -> None:
    problems = [kind for item in campaign.of(_UNRECORDED) for kind, _ in item["problems"]]
    assert "mixed" in problems
    assert campaign.code == 1
    assert f"{_UNRECORDED}:" in campaign.printed
