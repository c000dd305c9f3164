"""Hostile folders on commands: a few tries of the campaign, and that it finds what it looks for."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hostile import attempt, judge
from tests.hostile.commands import COMMANDS, Command
from tests.hostile.place import CANARY, FOREIGN, PWNED, Place
from tests.hostile.spoilt import Mutation, Spoilt
from tests.hostile.watch import Rules

REPOSITORY = Path(__file__).parents[2]
QUICK = "score,checkpoint,plan,heal,inspect,prune,quantize,generate,package,report,check"


@pytest.mark.parametrize(
    ("tries", "commands"),
    [
        pytest.param(60, QUICK, marks=pytest.mark.torch, id="5"),
        pytest.param(30, "score,checkpoint,heal", marks=pytest.mark.optimum, id="4.57"),
    ],
)
def test_nothing_comes_of_hostile_folders(tmp_path: Path, tries: int, commands: str) -> None:
    process = _campaign(tmp_path, "--tries", str(tries), "--seed", "1", "--only", commands)
    lines = [json.loads(line) for line in (tmp_path / "tries.jsonl").read_text().splitlines()]
    assert process.returncode == 0, process.stdout[-6000:] + process.stderr[-2000:]
    assert len(lines) == tries
    assert sum(line["code"] == judge.REFUSED for line in lines) > tries / 5
    assert any(line["code"] == 0 for line in lines)
    assert len({kind for line in lines for kind in line["kinds"]}) >= 10


def _campaign(keep: Path, *options: str) -> subprocess.CompletedProcess[str]:
    call = [sys.executable, "-m", "tests.hostile", "--keep", str(keep), *options]
    return subprocess.run(call, cwd=REPOSITORY, capture_output=True, text=True, timeout=540)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    template = tmp_path / "template"
    for name in ("llama/config.json", "reports/report.json"):
        (template / name).parent.mkdir(parents=True)
        (template / name).write_text("{}")
    made = Place(tmp_path / "place")
    made.make(template)
    return made


def _found(
    place: Place, task: Callable[[], int], *, own_code: bool = False, hostile: bool = False
) -> set[str]:
    """The classes of what is found wrong with a task in the place of a command."""
    command = next(command for command in COMMANDS if command.folder == "reports")
    done = [Mutation("x", "records", lambda *_: None, hostile)] if hostile else []
    spoilt = Spoilt(place, place.work / command.folder, command, done)
    before, earlier = judge.outside(spoilt), judge.results(place)
    ended = attempt.run(place, task, Rules(place, spoilt.folder, own_code=own_code))
    faults = list(judge.faults(ended, command, spoilt, before, earlier))
    return {fault.partition(":")[0] for fault in faults}


def _refuse() -> int:
    print("depthcut: this is refused.", file=sys.stderr)
    return judge.REFUSED


def _write_result() -> int:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "x").write_text("x")
    Path("out/plan.json").write_text(Path("reports/report.json").read_text())
    return 0


def _print(text: str, code: int = 0) -> Callable[[], int]:
    def task() -> int:
        print(text, file=sys.stderr)
        return code

    return task


def _do(act: Callable[[], object]) -> Callable[[], int]:
    def task() -> int:
        try:
            act()
        except OSError:
            return _refuse()
        return 0

    return task


def _exec_models_code() -> None:
    path = Path("reports/code.py").resolve()
    exec(compile("x = 1", str(path), "exec"), {})


def _link_and_read() -> None:
    Path("out/link").symlink_to("../../beside/secret.txt")
    Path("out/link").read_bytes()


def _connect() -> None:
    with socket.socket() as made:
        made.connect(("127.0.0.1", 9))


WRONG: dict[str, tuple[str, Callable[[], int]]] = {
    "reads a secret": ("outside", _do(lambda: Path("../beside/secret.txt").read_bytes())),
    "reads the environment": ("outside", _do(lambda: Path("/proc/self/environ").read_bytes())),
    "reads by a link": ("outside", _do(_link_and_read)),
    "reads the user's key": (
        "outside",
        _do(lambda: Path.home().joinpath(".ssh/id_rsa").read_text()),
    ),
    "writes beside": ("outside", _do(lambda: Path("victim/new").resolve().write_text("x"))),
    "writes into the model": ("outside", _do(lambda: Path("reports/new").write_text("x"))),
    "removes": ("outside", _do(lambda: Path("victim/mine.txt").unlink())),
    "renames": ("outside", _do(lambda: Path("victim/mine.txt").rename("victim/b"))),
    "takes away": ("outside", _do(lambda: Path("victim/mine.txt").rename("out/b"))),
    "changes rights": ("outside", _do(lambda: Path("victim/mine.txt").chmod(0o777))),
    "empties the user's file": ("outside", _do(lambda: Path("out/notes.txt").write_text(""))),
    "tells a secret": ("outside", _print(CANARY)),
    "writes a secret": ("outside", _do(lambda: Path("out/x").write_text(os.environ["SECRET"]))),
    "asks for a name": ("request", _do(lambda: socket.getaddrinfo("localhost", 80))),
    "connects": ("request", _do(_connect)),
    "starts a program": ("program", _do(lambda: subprocess.run(["/bin/true"]))),
    "starts a shell": ("program", _do(lambda: os.system("true"))),
    "runs the model's code": ("code", _do(_exec_models_code)),
    "leaves a temporary file": ("left", _do(lambda: Path(tempfile.mkdtemp()))),
    "fails, and leaves a result": ("left", lambda: [Path("out/x").write_text("x"), _refuse()][1]),
    "says nothing": ("lines", lambda: 1),
    "says it twice": ("lines", lambda: [_refuse(), _refuse()][1]),
    "prints a sequence": ("printed", _print("\x1b[2J")),
    "prints a command": ("printed", _print("::error::x")),
    "writes a sequence": ("written", _do(lambda: Path("out/x.xml").write_text("\x1b[2J"))),
    "writes a command": ("written", _do(lambda: Path("out/x.md").write_text("a\n::error::x"))),
    "prints a traceback": ("traceback", lambda: 1 // 0),
    "did not expect it": ("unexpected", _print("depthcut: Unexpected KeyError: 1", 1)),
    "dies": ("end", lambda: os.kill(os.getpid(), 9) or 0),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_found(place: Place, what: str) -> None:
    kind, task = WRONG[what]
    assert kind in _found(place, task)


def test_code_that_ran_is_found(place: Place) -> None:
    (place.beside / PWNED).touch()
    assert "code" in _found(place, _refuse)


@pytest.mark.parametrize("task", [_refuse, _write_result])
def test_what_is_right_is_not_found_wrong(place: Place, task: Callable[[], int]) -> None:
    assert _found(place, task, hostile=True) == set()
    assert (place.out / "notes.txt").read_text() == FOREIGN["notes.txt"]


def test_hostile_input_must_be_refused_as_such(place: Place) -> None:
    fails = _print("depthcut: it failed.", 1)
    assert "not refused" in _found(place, fails, hostile=True)
    assert _found(place, fails) == set()


def test_code_that_may_run_is_not_found_wrong(place: Place) -> None:
    assert "code" not in _found(place, _do(_exec_models_code), own_code=True)


def test_a_link_that_came_in_between_is_refused_at_most() -> None:
    result = ["outside: opened /secret", "outside: open /secret", "outside: os.remove /secret"]
    assert judge.without_races(result, ["changing"], judge.REFUSED) == result[2:]
    assert judge.without_races(result, ["changing"], 0) == result
    assert judge.without_races(result, ["links"], judge.REFUSED) == result


def test_what_runs_on_is_ended(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempt, "LONGEST_S", 0.5)
    assert "hang" in _found(place, lambda: time.sleep(60) or 0)


def test_memory_is_bounded(place: Place) -> None:
    def much() -> int:
        try:
            return len(bytearray(3 << 30)) * 0
        except MemoryError:
            print("depthcut: Out of memory.", file=sys.stderr)
            return 1

    assert "memory" in _found(place, much)


def test_every_command_is_among_them() -> None:
    names = {command.name for command in COMMANDS}
    assert names >= {"score", "export", "plan", "inspect", "prune", "heal", "checkpoint",
    "quantize"}  # fmt: skip
    kinds = {kind for command in COMMANDS for kind in command.kinds}
    assert kinds >= {"template", "tokenizer", "media", "media settings", "task files", "history"}
    assert names >= {"compare", "package", "report", "generate", "sweep", "check"}
    assert all(isinstance(command, Command) and command.kinds for command in COMMANDS)
