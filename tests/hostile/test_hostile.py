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
from typing import Any

import pytest

from tests.hostile import job, judge, system_calls
from tests.hostile.cases import BROKEN, CASES, REFUSED
from tests.hostile.commands import COMMANDS
from tests.hostile.mutations import KINDS, Mutation, Spoilt
from tests.hostile.place import CANARY, FOREIGN, PWNED, Place, entries
from tests.hostile.watch import REPOSITORY, Rules

QUICK = "score,checkpoint,plan,heal,inspect,prune,quantize,generate,package,report,check"


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((12, QUICK), marks=pytest.mark.torch, id="5"),
        pytest.param((30, "score,checkpoint,heal"), marks=pytest.mark.optimum, id="4.57"),
    ],
)
def campaign(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """All that was reported, and tries at random."""
    keep, (tries, commands) = tmp_path_factory.mktemp("hostile"), request.param
    options = ["--seed", "1", "--cases", "--tries", str(tries), "--only", commands]
    call = [sys.executable, "-m", "tests.hostile", "--keep", str(keep), *options]
    process = subprocess.run(call, cwd=REPOSITORY, capture_output=True, text=True, timeout=540)
    assert process.returncode == 0, process.stdout[-6000:] + process.stderr[-2000:]
    lines = [json.loads(line) for line in (keep / "tries.jsonl").read_text().splitlines()]
    assert len(lines) == len(CASES) + tries
    return lines


def test_nothing_comes_of_hostile_folders(campaign: list[dict[str, Any]]) -> None:
    lines = campaign[len(CASES) :]
    assert sum(line["code"] == judge.REFUSED for line in lines) > len(lines) / 5
    assert any(line["code"] == 0 for line in lines)
    assert len({kind for line in lines for kind in line["kinds"]}) >= 10


def test_what_was_reported_is_refused(campaign: list[dict[str, Any]]) -> None:
    codes = {item["mutations"][0]: item["code"] for item in campaign[: len(CASES)]}
    assert {name: codes[name] for name in REFUSED if codes[name] != judge.REFUSED} == {}
    assert {name: codes[name] for name in BROKEN if codes[name] not in (1, judge.REFUSED)} == {}
    assert codes["nothing"] == 0


@pytest.fixture
def place(tmp_path: Path) -> Place:
    template = tmp_path / "template"
    for name in ("llama/config.json", "reports/report.json"):
        (template / name).parent.mkdir(parents=True)
        (template / name).write_text("{}")
    made = Place(tmp_path / "place")
    made.make(template)
    return made


def _faults(
    place: Place, task: Callable[[], int], *, own_code: bool = False, hostile: bool = False
) -> set[str]:
    """The classes of what is wrong with a task in the place of a command."""
    command = next(command for command in COMMANDS if command.folder == "reports")
    done = [Mutation("x", "records", lambda *_: None, hostile)] if hostile else []
    spoilt = Spoilt(place, place.work / command.folder, command, done)
    before, earlier = judge.outside(spoilt), entries(place.out)
    ended = job.run(place, task, Rules(place, spoilt.folder, own_code=own_code))
    faults = judge.faults(ended, command, spoilt, before, earlier)
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


def _much() -> int:
    try:
        return len(bytearray(3 << 30)) * 0
    except MemoryError:
        print("depthcut: Out of memory.", file=sys.stderr)
        return 1


WRONG: dict[str, list[Callable[[], int]]] = {
    "outside": [
        _do(lambda: Path("../beside/secret.txt").read_bytes()),
        _do(lambda: Path("/proc/self/environ").read_bytes()),
        _do(_link_and_read),
        _do(lambda: Path.home().joinpath(".ssh/id_rsa").read_text()),
        _do(lambda: Path("victim/new").resolve().write_text("x")),
        _do(lambda: Path("reports/new").write_text("x")),
        _do(lambda: Path("victim/mine.txt").unlink()),
        _do(lambda: Path("victim/mine.txt").rename("victim/b")),
        _do(lambda: Path("victim/mine.txt").rename("out/b")),
        _do(lambda: Path("victim/mine.txt").chmod(0o777)),
        _do(lambda: Path("out/notes.txt").write_text("")),
        _print(CANARY),
        _do(lambda: Path("out/x").write_text(os.environ["SECRET"])),
    ],
    "request": [_do(lambda: socket.getaddrinfo("localhost", 80)), _do(_connect)],
    "program": [_do(lambda: subprocess.run(["/bin/true"])), _do(lambda: os.system("true"))],
    "code": [_do(_exec_models_code), _do(lambda: Path(f"../beside/{PWNED}").touch())],
    "left": [
        _do(lambda: Path(tempfile.mkdtemp())),
        lambda: [Path("out/x").write_text("x"), _refuse()][1],
    ],
    "lines": [lambda: 1, lambda: [_refuse(), _refuse()][1]],
    "printed": [_print("\x1b[2J"), _print("::error::x"), _print("##[error]x")],
    "written": [
        _do(lambda: Path("out/x.xml").write_text("\x1b[2J")),
        _do(lambda: Path("out/x.md").write_text("a\n::error::x")),
    ],
    "traceback": [lambda: 1 // 0],
    "unexpected": [_print("depthcut: Unexpected KeyError: 1", 1)],
    "end": [lambda: os.kill(os.getpid(), 9) or 0],
    "memory": [_much],
    "hang": [lambda: time.sleep(60) or 0],
}


@pytest.mark.parametrize(("kind", "task"), [(kind, task) for kind in WRONG for task in WRONG[kind]])
def test_what_is_wrong_is_seen(
    kind: str, task: Callable[[], int], place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "hang":
        monkeypatch.setattr(job, "LONGEST_S", 0.5)
    assert kind in _faults(place, task)


@pytest.mark.parametrize("task", [_refuse, _write_result])
def test_what_is_right_is_not_found_wrong(place: Place, task: Callable[[], int]) -> None:
    assert _faults(place, task, hostile=True) == set()
    assert (place.out / "notes.txt").read_text() == FOREIGN["notes.txt"]


def test_hostile_input_must_be_refused_as_such(place: Place) -> None:
    fails = _print("depthcut: it failed.", 1)
    assert "not refused" in _faults(place, fails, hostile=True)
    assert _faults(place, fails) == set()


def test_code_that_may_run_is_not_found_wrong(place: Place) -> None:
    assert "code" not in _faults(place, _do(_exec_models_code), own_code=True)


def test_a_link_that_came_in_between_is_refused_at_most() -> None:
    result = ["outside: opened /secret", "outside: open /secret", "outside: os.remove /secret"]
    assert judge.without_races(result, ["changing"], judge.REFUSED) == result[2:]
    assert judge.without_races(result, ["changing"], 0) == result
    assert judge.without_races(result, ["links"], judge.REFUSED) == result


def test_every_command_and_kind_is_among_them() -> None:
    assert {command.name for command in COMMANDS} == {*QUICK.split(","), "export", "compare",
    "depths", "sweep", "evaluate"}  # fmt: skip
    assert {kind for command in COMMANDS for kind in command.kinds} == set(KINDS)
    assert min(map(len, KINDS.values())) > 0


ROOT = "/tmp/place"
HERE = f"AT_FDCWD<{ROOT}/work>"
HARMLESS = [
    f'openat({HERE}, "llama/config.json", O_RDONLY|O_CLOEXEC) = 5<{ROOT}/work/llama/config.json>',
    f'openat({HERE}, "out/x", O_WRONLY|O_CREAT|O_TRUNC, 0666) = 5<{ROOT}/work/out/x>',
    'openat(AT_FDCWD</>, "/usr/lib/libm.so.6", O_RDONLY|O_CLOEXEC) = 3</usr/lib/libm.so.6>',
    'open("/proc/self/environ", O_RDONLY) = 4</proc/7/environ>',
    'rename("out/a", "out/b") = 0',
    f'unlinkat(3<{ROOT}/work/out>, "a", 0) = 0',
    'symlink("/etc/shadow", "out/b") = 0',
    'connect(3<UNIX-STREAM:[1]>, {sa_family=AF_UNIX, sun_path="/run/socket"}, 110) = -1 ENOENT',
    f'unlinkat({HERE}, "victim/mine.txt", 0) = -1 ENOENT (No such file or directory)',
]
HARMFUL = [
    f'openat({HERE}, "llama/config.json", O_RDONLY|O_CLOEXEC) = 5<{ROOT}/beside/secret.json>',
    f'openat({HERE}, "../beside/nothing", O_RDONLY) = -1 ENOENT (No such file or directory)',
    f'openat({HERE}, "llama/x", O_WRONLY|O_CREAT, 0666) = 5<{ROOT}/work/llama/x>',
    'open("/etc/hostname", O_RDONLY) = 5</etc/hostname>',
    f'openat({HERE}, "llama/x.jinja", O_RDONLY) = 5</proc/7/environ>',
    'rename("victim/mine.txt", "out/b") = 0',
    'rename("out/a", "victim/mine.txt") = 0',
    f'unlinkat(3<{ROOT}/work/victim>, "mine.txt", 0) = 0',
    'symlink("x", "victim/b") = 0',
    'mkdir("/root/.cache/x", 0700) = 0',
    'execve("/bin/sh", ["sh", "-c", "x"], 0x7ffd /* 9 vars */) = 0',
    'connect(3<socket:[1]>, {sa_family=AF_INET, sin_port=htons(53)}, 16) = 0',
    'connect(3<socket:[1]>, {sa_family=AF_INET6, sin6_port=htons(443)}, 28) = -1 ENETUNREACH',
]  # fmt: skip


@pytest.mark.parametrize(
    ("count", "line"), [*((0, line) for line in HARMLESS), *((1, line) for line in HARMFUL)]
)
def test_a_system_call_is_harmless_or_not(count: int, line: str) -> None:
    place = Place(Path(ROOT))
    rules = Rules(place, place.work / "llama", own_code=False)
    assert len(list(system_calls.faults([line], rules))) == count


def test_calls_go_to_the_try_that_runs(tmp_path: Path) -> None:
    """The job has 5; the second try uses the number 8 of the first one's helper again."""
    log = tmp_path / "log"
    log.write_text(
        '5 chmod("/x", 0700) = 0\n7 open("/a", O_RDONLY <unfinished ...>\n8 mkdir("/b", 0700) = 0\n'
        '7 <... open resumed>) = 3</a>\n5 chmod("/x", 0) = 0\n6 mkdir("/c", 0700) = 0\n'
        '8 rmdir("/c") = 0\n'
    )
    assert system_calls.by_try(log, [7, 6]) == [
        ['mkdir("/b", 0700) = 0', 'open("/a", O_RDONLY) = 3</a>'],
        ['mkdir("/c", 0700) = 0', 'rmdir("/c") = 0'],
    ]
