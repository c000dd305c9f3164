"""Fifty kills, the same every time, and what else can go wrong with a result's folder.

One process imports everything once, and forks for each command. To look for new ones run
``python -m tests.kills --kills 1000 --seed N``.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.kills.scenarios import names
from tests.kills.troubles import troubles

pytestmark = pytest.mark.torch

_ROOT = Path(__file__).parents[2]
_DEAR = {"export": 2, "sweep": 1, "build": 1, "export-with-all": 0}  # kills; of the others:
_CHEAP = 4
_STATES = "2"
_IN_TROUBLE = ("prune", "package", "checkpoint")


def _kills(command: str) -> int:
    return 6 if command == "prune" else _DEAR.get(command, _CHEAP)


_KILLED = [name for name in names() if _kills(name)]
_TRIED = [(name, each) for name in _IN_TROUBLE if name in _KILLED for each in troubles(name)]


def _run(folder: Path, *options: str, before: str = "") -> tuple[int, list[dict[str, Any]], str]:
    """What the harness ends with, tells of each piece of work, and prints."""
    script = f"import sys\n{before}\nfrom tests.kills.__main__ import main\nsys.exit(main())"
    call = [sys.executable, "-c", script, "--told", str(folder / "told"), *options]
    ran = subprocess.run(call, cwd=_ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert ran.returncode in (0, 1), ran.stderr
    lines = (folder / "told").read_text(encoding="utf-8").splitlines()
    return ran.returncode, list(map(json.loads, lines)), ran.stdout


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    shares = ",".join(f"{name}={_kills(name)}" for name in _KILLED)
    many = str(sum(map(_kills, _KILLED)))
    tried = ("--troubles", ",".join(_IN_TROUBLE))
    given = ("--commands", shares, "--kills", many, "--states", _STATES, *tried)
    return _run(tmp_path_factory.mktemp("kills"), *given)[1]


@pytest.mark.parametrize("command", _KILLED)
def test_a_killed_command_leaves_the_old_result_or_the_new_one(
    command: str, told: list[dict[str, Any]]
) -> None:
    killed = [each for each in told if each["command"] == command and each["what"].isdecimal()]
    assert sum(each["kills"] for each in killed) >= _kills(command)
    replay = f"python -m tests.kills --states {_STATES} --replay {command}:"
    bad = {replay + each["what"]: each["problems"] for each in killed if each["problems"]}
    assert not bad


@pytest.mark.parametrize(("command", "trouble"), _TRIED)
def test_a_command_in_trouble_says_so_and_leaves_the_old_result(
    command: str, trouble: str, told: list[dict[str, Any]]
) -> None:
    found = [each for each in told if (each["command"], each["what"]) == (command, trouble)]
    assert [each["problems"] for each in found] == [[]]


def test_kills_are_seen_to_do_harm_where_no_record_is_kept(tmp_path: Path) -> None:
    broken = (
        "from graph_passes.files.record import ChangeRecord\n"
        "ChangeRecord.write = lambda *_: None"
    )  # fmt: skip
    given = ("--commands", "prune", "--kills", "8")
    code, told, printed = _run(tmp_path, *given, before=broken)
    assert code == 1
    assert {"mixed"} <= {kind for each in told for kind, _ in each["problems"]}
    assert "prune:" in printed
