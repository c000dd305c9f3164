"""What strace writes, read."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hostile.place import Place
from tests.hostile.system_calls import by_try, faults
from tests.hostile.watch import Rules

ROOT = "/tmp/place"
HERE = f"AT_FDCWD<{ROOT}/work>"
RIGHT = [
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
WRONG = [
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


@pytest.fixture
def rules() -> Rules:
    place = Place(Path(ROOT))
    return Rules(place, place.work / "llama", own_code=False)


@pytest.mark.parametrize("line", RIGHT)
def test_what_is_right(rules: Rules, line: str) -> None:
    assert list(faults([line], rules)) == []


@pytest.mark.parametrize("line", WRONG)
def test_what_is_wrong(rules: Rules, line: str) -> None:
    assert len(list(faults([line], rules))) == 1


def test_calls_go_to_the_try_that_runs(tmp_path: Path) -> None:
    """The job has 5; the second try uses the number 8 of the first one's helper again."""
    log = tmp_path / "log"
    log.write_text(
        '5 chmod("/x", 0700) = 0\n7 open("/a", O_RDONLY <unfinished ...>\n8 mkdir("/b", 0700) = 0\n'
        '7 <... open resumed>) = 3</a>\n5 chmod("/x", 0) = 0\n6 mkdir("/c", 0700) = 0\n'
        '8 rmdir("/c") = 0\n'
    )
    assert by_try(log, [7, 6]) == [
        ['mkdir("/b", 0700) = 0', 'open("/a", O_RDONLY) = 3</a>'],
        ['mkdir("/c", 0700) = 0', 'rmdir("/c") = 0'],
    ]
