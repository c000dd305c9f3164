"""Models whose names hold terminal sequences and commands to CI: no command passes them on."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from exporter.artifacts import Arms
from exporter.cli import run
from exporter.cli.console import VERBOSE, ConsoleProgress
from graph_passes import save_model
from tests.made_reports import gate_arm, gate_report, gate_row
from tests.tiny_graphs import TinySpec, tiny_model

ACTIVE = "\n::error::x\x1b[31m\r\x9b2J\u202e##[error]y\u2028"


def unsafe_lines(text: str) -> list[str]:
    """The lines that a terminal or a CI system would act on."""
    return [
        line
        for line in text.split("\n")
        if not line.replace("\t", "").replace("‍", "").isprintable()
        or line.lstrip().startswith("::")
        or re.search(r"##\w*\[", line)
    ]


def rename(model: onnx.ModelProto, mark: str) -> None:
    """Puts a mark into every name that nothing else must know."""
    renamed = {
        name: f"{name}{mark}"
        for node in model.graph.node
        for name in node.output
        if name not in {output.name for output in model.graph.output}
    }
    for node in model.graph.node:
        node.name += mark
        for names in (node.input, node.output):
            for place, name in enumerate(names):
                names[place] = renamed.get(name, name)
    del model.graph.value_info[:]


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    plain = tmp_path / "plain.onnx"
    save_model(tiny_model(TinySpec(layers=2)), plain)
    model = onnx.load(plain)
    rename(model, ACTIVE)
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    return path


def told(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    code = run(list(map(str, arguments)))
    out, err = capfd.readouterr()
    return code, out + err


def test_what_is_to_be_found_would_be() -> None:
    assert unsafe_lines(f"a{ACTIVE}")
    assert unsafe_lines("  ::error::x")
    assert not unsafe_lines("std::vector\nname: 1")


CALLS: dict[str, tuple[str, ...]] = {
    "inspect": ("inspect", "{model}"),
    "inspect --json": ("inspect", "{model}", "--json"),
    "inspect what can't be cut": ("inspect", "{broken}"),
    "prune what can't be cut": ("prune", "{broken}", "--drop", "attention:0", "-o", "{out}", "-v"),
    "prune": ("prune", "{model}", "--drop", "mlp:1", "-o", "{out}", "-v"),
    "score a config of an unknown type": ("score", "{folder}", "-o", "{out}", "-v"),
    "plan": ("plan", "{scores}", "--drop-joint", "1", "-o", "{out}", "-v"),
}


@pytest.mark.parametrize("name", CALLS)
def test_no_command_passes_on_what_a_model_names(
    name: str, hostile: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = onnx.load(hostile)
    next(node for node in broken.graph.node if node.op_type == "Add").op_type = "Sub"
    onnx.save(broken, tmp_path / "broken.onnx")
    folder = tmp_path / "folder"
    folder.mkdir()
    config = {"model_type": f"gone{ACTIVE}", "architectures": [f"Gone{ACTIVE}"]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"\2" + bytes(7) + b"{}")
    scores = {"schema": ACTIVE, "scores": [{"kind": ACTIVE}], ACTIVE: 1}
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    places = {
        "model": hostile, "broken": tmp_path / "broken.onnx", "folder": folder,
        "scores": tmp_path / "scores.json", "out": tmp_path / "out" / "out.onnx",
    }  # fmt: skip
    code, text = told(capfd, *(word.format(**places) for word in CALLS[name]))
    assert text
    assert unsafe_lines(text) == []
    assert (code == 0) == (name == "prune" or name.startswith("inspect"))
    if name == "inspect --json":
        assert ACTIVE in json.loads(text)["sites"][0]["residual_add"]


def test_a_name_that_the_caller_gives(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model\n::error::x\x1b[31m"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for command in (
        ("score", folder, "-o", tmp_path / "scores.json", "-v"),
        ("inspect", folder),
        ("inspect", tmp_path / "gone\n::error::x\x1b[31m"),
        ("gone\n::error::x\x1b[31m",),
        ("inspect", tmp_path, "extra\n::error::x\x1b[31m"),
    ):
        code, text = told(capfd, *command)
        assert code in (1, 2)
        assert text
        assert unsafe_lines(text) == [], command


def test_check_and_report(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arms = Arms(
        **{name: gate_arm(name, backend=f"cpu{ACTIVE}") for name in ("baseline", "candidate")}
    )
    report = gate_report((gate_row(candidate_ms=120.0),), arms=arms)
    path = tmp_path / f"name{ACTIVE}".replace("/", "") / "report.json"
    path.parent.mkdir()
    report.model_copy(update={"title": ACTIVE}).write(path)
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    code, text = told(capfd, "check", path, "--max-slowdown", "1%")
    assert code == 1
    commands = [line for line in text.split("\n") if line.startswith("::error title=")]
    assert len(commands) == 1
    assert unsafe_lines(text) == commands
    assert all(line.isprintable() for line in text.split("\n"))
    for command in (("report", path), ("check", path, "--max-kl", "nonsense")):
        _, text = told(capfd, *command)
        assert unsafe_lines(text) == []


def test_a_library_s_warning_and_log(capfd: pytest.CaptureFixture[str]) -> None:
    code = (
        "import sys, logging, warnings, exporter.cli as c\n"
        f"mark = {ACTIVE!r}\n"
        "@c.cli.command()\n"
        "def loud():\n"
        "    warnings.warn(mark)\n"
        "    logging.getLogger('library').warning(mark)\n"
        "    print(mark)\n"
        "    raise ValueError('first' + mark.replace('\\n', ''))\n"
        "sys.exit(c.run(['loud']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 2
    text = (done.stdout + done.stderr).decode()
    assert "UserWarning" in text
    assert unsafe_lines(text) == []


class Terminal(io.StringIO):
    """A terminal, as far as bars see."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("terminal", [True, False])
def test_progress(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("COLUMNS", "400")
    progress = ConsoleProgress(VERBOSE)
    with progress.task(f"load :x: [bold]{ACTIVE}", 2) as task:
        task.advance()
        progress.say(f"said :x: [bold]{ACTIVE}")
        progress.detail(f"line\nnext{ACTIVE}")
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]|\r", "", stream.getvalue())  # the bars' own
    assert "said :x: [bold]\\n::error" in text
    assert "load :x: [bold]\\n::error" in text
    assert unsafe_lines(text) == []
    if not terminal:
        assert text == stream.getvalue()
        assert len(text.splitlines()) == 5
