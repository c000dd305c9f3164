"""Errors, optional libraries, what prints, processes, and what is packed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter import processes
from exporter.errors import ExportError, MissingDependencyError, pass_on_memory_error
from exporter.optional import require
from exporter.printable import (
    Pieces,
    json_text,
    one_line,
    printable,
    printable_json,
    printable_output,
    raw_output,
)
from exporter.processes import CpuTimes, cpu_times, other_cpu_share
from tests.raising import raises


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("17 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 17 GiB"),
    ],
)
def test_memory_that_ran_out_is_nobodys_file(error: Exception) -> None:
    wrapped = ExportError("It can't be exported.")
    wrapped.__cause__ = error
    for item in (error, wrapped):
        with pytest.raises(MemoryError, match="17 GiB"):
            pass_on_memory_error(item)
    pass_on_memory_error(RuntimeError("shapes don't match"))


ROOT = Path(__file__).parents[2]


def test_a_module_that_is_missing_or_too_old_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with raises(MissingDependencyError, "", "pip install 'depthcut[rtx]'") as error:
        require("no_such_module_here.deeper", extra="rtx")
    assert "no_such_module_here" in error.value.message
    module = ModuleType("made_up")
    module.__version__ = "0.18.0.dev0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "made_up", module)
    for oldest in (None, "0.9", "0.18"):
        assert require("made_up", extra="torch", oldest=oldest) is module
    for oldest in ("0.19", "1.0"):
        with raises(MissingDependencyError, "too-old", "0.18.0.dev0", oldest):
            require("made_up", extra="torch", oldest=oldest)


def test_what_works_without_pytorch_does_not_import_it() -> None:
    names = ("score.scoring", "score.cluster", "artifacts.plans")
    names += ("choose.budgets.planner", "pipeline.road", "pipeline.sweep.job", "cut.surgery")
    names += ("models.loading.sources",)
    code = "".join(f"import exporter.{name}\n" for name in names)
    code += "import sys; print({'torch', 'transformers', 'ray'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


_ASKS = """
import os, sys, time
from exporter.optional import require
require("onnxruntime", extra="cpu")
time.sleep(2)
print([name for _, _, names in os.walk(sys.argv[1]) for name in names])
print(len(os.listdir("/proc/self/task")))
"""


def test_onnxruntime_tells_nobody_that_it_is_used(tmp_path: Path) -> None:
    """It would in C++, where Python sees nothing but what it leaves behind and its threads."""
    pytest.importorskip("onnxruntime")
    call = [sys.executable, "-B", "-c", _ASKS, str(tmp_path)]
    environment = {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(call, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", "1"]


ACTIVE = [
    *map(chr, [*range(0x20), *range(0x7F, 0xA0)]),
    *"\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069",
    "\ud800",
    "\udfff",
]
COMMANDS = ["::error::x", "  ::error::x", "\u00a0::x", "##[error]x", "a ##[x", "##vso[task.x]y"]
texts = st.text(st.sampled_from([*"a:#[]v \n\t\r\\", "\x1b", "\x9b", "\u202e", "\udc80"]))


def begins_a_command(line: str) -> bool:
    return line.lstrip().startswith("::") or any(
        opening in line for opening in ("##[", "##vso[", "##teamcity[")
    )


@pytest.mark.parametrize("letter", ACTIVE, ids=ascii)
def test_no_active_character_is_left(letter: str) -> None:
    assert letter not in one_line(f"a{letter}b")
    assert one_line(f"a{letter}b").isascii()
    if letter not in "\n\t":
        assert letter not in printable(f"a{letter}b")


@pytest.mark.parametrize(
    "text", ["", "layers.0/Add", "Größe: 3 × 4", "שלום", "👩\u200d🔬", "C:\\x\\n"]
)
def test_other_text_stays(text: str) -> None:
    assert one_line(text) == printable(text) == text
    assert json.loads(printable_json(json.dumps(text, ensure_ascii=False))) == text


def test_lines_of_our_own_stay_lines() -> None:
    assert printable("one\n\ttwo\n") == "one\n\ttwo\n"
    assert one_line("one\ntwo") == "one\\ntwo"


@pytest.mark.parametrize("text", COMMANDS)
def test_no_command_to_ci_is_left(text: str) -> None:
    assert begins_a_command(text)
    for line in printable(f"{text}\n{text}").splitlines():
        assert not begins_a_command(line)
    assert "error" not in text or "error" in printable(text)


@pytest.mark.parametrize("text", ["std::vector", "a::b", "1: 2", "## heading", "x[0]", "# [1]"])
def test_what_only_looks_like_one_stays(text: str) -> None:
    assert printable(text) == text


@given(texts)
def test_whatever_the_text_nothing_is_obeyed_and_once_is_enough(text: str) -> None:
    result = printable(text)
    assert not any(begins_a_command(line) for line in result.split("\n"))
    assert not set(result) & (set(ACTIVE) - {"\n", "\t"})
    assert printable(result) == result
    assert one_line(one_line(text)) == one_line(text)


@given(st.lists(texts))
def test_pieces_add_up_to_the_whole(pieces: list[str]) -> None:
    stream = Pieces()
    assert "".join(map(stream.add, pieces)) == printable("".join(pieces))


@given(st.dictionaries(texts, texts))
def test_json_says_the_same_and_is_safe(data: dict[str, str]) -> None:
    safe = {key: value for key, value in data.items() if (key + value).isprintable()}
    for content, text in (
        (data, json.dumps(data, indent=2)),
        (safe, json.dumps(safe, ensure_ascii=False)),
    ):
        result = printable_json(text)
        assert json.loads(result) == content
        assert not any(begins_a_command(line) for line in result.split("\n"))


def test_json_escapes_what_json_leaves() -> None:
    content = {"name": "\x9b31m\u202e\x7f"}
    assert json_text(content).isascii()
    assert json.loads(json_text(content)) == content


def test_what_libraries_print_passes_it(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    with printable_output():
        print("\x1b[31mred\n::error::x")
        print(":", ":error::x", sep="", file=sys.stderr)
        sys.stderr.writelines(["\r 10%", "\r 20%", "\r::error::x"])
        assert sys.stderr.isatty() is before[1].isatty()
        raw_output(sys.stdout).write("\x1b[0m")
    assert (sys.stdout, sys.stderr) == before
    printed = capsys.readouterr()
    assert printed.out == "\\x1b[31mred\n:\\x3aerror::x\n\x1b[0m"
    assert printed.err == ":\\x3aerror::x\n\r 10%\r 20%\r:\\x3aerror::x"


_WORKER = """
import os, sys, time
from exporter.processes import end_with_parent
while not os.path.exists("go"):
    time.sleep(0.01)
end_with_parent(int(sys.argv[1]))
os.rename("writing", "written")
while True:
    time.sleep(0.01)
"""
_PARENT = """
import subprocess, sys
from exporter.processes import child_command
child = subprocess.Popen(child_command(["-c", sys.argv[1]]))
open("pid", "w").write(f"{child.pid}\\n")
child.wait()
"""


@pytest.fixture
def parent(tmp_path: Path) -> subprocess.Popen[bytes]:
    """A process with a child that waits for the file ``go``."""
    (tmp_path / "writing").touch()
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    call = [sys.executable, "-c", _PARENT, _WORKER]
    started = subprocess.Popen(call, cwd=tmp_path, env=env)
    _wait(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().endswith("\n"))
    return started


def _child(folder: Path) -> int:
    return int((folder / "pid").read_text())


def _wait(ready: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not ready():
        assert time.monotonic() < until
        time.sleep(0.01)


def _is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_a_child_ends_when_its_parent_is_killed(
    parent: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    (tmp_path / "go").touch()
    _wait((tmp_path / "written").exists)
    assert not _is_gone(_child(tmp_path))
    parent.kill()
    parent.wait()
    _wait(lambda: _is_gone(_child(tmp_path)))


def test_a_child_whose_parent_was_killed_before_does_no_work(
    parent: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    parent.kill()
    parent.wait()
    assert not _is_gone(_child(tmp_path))
    (tmp_path / "go").touch()
    _wait(lambda: _is_gone(_child(tmp_path)))
    assert (tmp_path / "writing").exists()


NOW = CpuTimes(total=1.0, busy=1.0, own=1.0)
BEFORE = CpuTimes(total=100.0, busy=50.0, own=10.0)


@pytest.mark.parametrize(
    ("before", "after", "share"),
    [
        (BEFORE, CpuTimes(total=120.0, busy=65.0, own=20.0), 0.25),
        (BEFORE, CpuTimes(total=120.0, busy=60.0, own=20.0), 0.0),
        (BEFORE, CpuTimes(total=101.0, busy=51.0, own=11.2), 0.0),  # of unlike clocks
        (BEFORE, CpuTimes(total=101.0, busy=51.2, own=10.0), 1.0),
        (None, NOW, None),
        (NOW, None, None),
        (NOW, NOW, None),
    ],
)
def test_own_time_is_taken_off_and_no_share_is_beyond_all_or_nothing(
    before: Any, after: Any, share: float | None
) -> None:
    assert other_cpu_share(before, after) == share


@pytest.mark.parametrize(
    ("text", "read"),
    [
        (None, None),
        ("", None),
        ("intr 5", None),
        ("cpu a b c d e", None),
        ("cpu 1 2 3", None),
        ("cpu  10 20 30 400 50 1 2 7 9 9\ncpu0 1 1 1 1\n", (52.0, 7.0)),
    ],
)
def test_the_kernel_s_line_is_read_by_its_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, read: Any
) -> None:
    if text is not None:
        (tmp_path / "stat").write_text(text)
    monkeypatch.setattr(processes, "_KERNEL_COUNTERS", tmp_path / "stat")
    monkeypatch.setattr(os, "sysconf", lambda _: 10)
    times = cpu_times()
    assert read == (None if times is None else (times.total, times.busy))


def test_free_memory_is_below_what_the_machine_has_and_a_containers_limit_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = processes.available_bytes()
    if not sys.platform.startswith("linux"):
        assert whole is None
        return
    assert whole is not None
    assert 0 < whole <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    monkeypatch.setattr(processes, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("3000\n")
    (tmp_path / "memory.stat").write_text("anon 1\nfile 400\n")
    assert processes.available_bytes() == 2400
    (tmp_path / "memory.max").write_text("max\n")
    assert processes.available_bytes() == pytest.approx(whole, rel=0.5)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    target = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(target)],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    return zipfile.ZipFile(next(target.glob("*.whl")))


def test_what_the_wheel_holds(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    info = {name for name in tops if name.endswith(".dist-info")}
    others = tops - info - {"exporter", "graph_passes"}
    assert others
    assert all(name.startswith("depthcut_") for name in others)
    assert {"exporter/py.typed", "graph_passes/py.typed"} <= set(wheel.namelist())
    name = next(n for n in wheel.namelist() if n.endswith("entry_points.txt"))
    assert "depthcut = depthcut_command:main" in wheel.read(name).decode()


def test_base_needs_neither_torch_nor_a_runtime() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    base = " ".join(project["dependencies"])
    assert not any(name in base for name in ("torch", "onnxruntime", "transformers", "tensorrt"))
    assert {"cpu", "gpu", "rtx", "optimum", "demo", "eval", "dev"} <= set(
        project["optional-dependencies"]
    )
    from exporter import __version__

    assert project["version"] == __version__
