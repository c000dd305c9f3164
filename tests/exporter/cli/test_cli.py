"""The command line: help, exit codes, progress, what each command asks for."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import pytest

import exporter.cli as command_line
from exporter.cli import cli, run
from exporter.cli import export as module
from exporter.cli.command import SchemaCommand
from exporter.cli.console import ConsoleProgress
from exporter.cli.export import ExportCall
from exporter.errors import ComparisonError, DisturbedMachineError, PlanError, UsageError
from graph_passes import save_model
from tests.made_reports import full_importance
from tests.reading import in_file
from tests.tiny_gguf import TinyGguf
from tests.tiny_graphs import TinySpec, tiny_model

COMMANDS = ["export", "score", "plan", "prune", "compare", "check", "inspect"]
HEAVY = ["torch", "transformers", "onnxruntime", "onnx", "onnx_ir", "scipy", "pydantic", "rich"]


def test_help_loads_nothing_heavy() -> None:
    script = (
        "import sys, exporter.cli as c; code = c.run(['--help']);"
        f"print('LOADED', [m for m in {HEAVY} if m in sys.modules]); sys.exit(code)"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "LOADED []" in ran.stdout
    assert all(name in ran.stdout for name in COMMANDS)


def test_the_commands_stand_in_order_and_none_is_missing_or_cut_short(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command_line.run(["--help"]) == 0
    part = capsys.readouterr().out.split("Everything in one command:")[1]
    listed = re.findall(r"^  ([a-z-]+)  +\S", part, re.MULTILINE)
    assert listed == command_line.cli.list_commands()
    assert listed[:3] == ["export", "sweep", "score"]
    assert "..." not in part


def test_options_of_every_command_stand_before_its_name_or_behind_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exporter.engines.doctor._output_of", lambda _: "")  # tries no library
    (config := tmp_path / "c.yaml").write_text("quantize_method: hqq\n")
    (tmp_path / "m.onnx").touch()
    model, result = str(tmp_path / "m.onnx"), list[str]()
    for option in (["--config", str(config)], ["--show-config"]):
        words = ["quantize", model, "-o", "x", "--config", str(config), "--show-config"]
        del words[(at := words.index(option[0])) : at + len(option)]
        assert command_line.run([*option, *words]) == 0
        result.append(capsys.readouterr().out)
    assert result[0] == result[1]
    assert "quantize_method: hqq" in result[0]
    for words in (["--json", "doctor"], ["doctor", "--json"]):
        assert command_line.run(words) == 0
        assert json.loads(capsys.readouterr().out)["components"]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.run(["--version"]) == 0
    assert re.fullmatch(r"depthcut \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    "args",
    [
        ["export", "model"],
        ["export", "model", "-o", "x", "--drop-attn", "0"],
        ["export", "model", "-o", "x", "--prefill", "a,b"],
        ["export", "model", "-o", "x"],
        ["export", "model", "-o", "x", "--drop-joint", "2", "builds: 2"],
        ["export", "model", "-o", "x", "--drop-joint", "2", "compute_capability: sm89"],
        [
            *("export", "model", "-o", "x", "--drop-joint", "2", "--engine", "tensorrt-rtx"),
            "compute_capability: ','",
        ],
        ["compare", "a", "b", "-o", "x", "--engine-onnx", "a"],
        ["export", "model", "-o", "x", "--drop-joint", "2", "--drop-attn", "2"],
        ["inspect", "file-missing.onnx"],
        ["no-such-command"],
    ],
)
def test_a_wrong_call_is_2(
    args: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command_line.run(in_file(tmp_path, args)) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["keys.yaml"]


def test_everything_goes_by_force_alone(tmp_path: Path) -> None:
    scores = full_importance(layers=2).write(tmp_path / "importance.json")
    before, output = scores.read_text(), tmp_path / "plan.json"
    assert command_line.run(["plan", str(scores), "-o", str(scores), "--drop-attn", "1"]) == 2
    assert scores.read_text() == before
    call = ["plan", str(scores), "-o", str(output), "-q", "--drop-joint", "4"]
    assert command_line.run(call) == 2
    assert not output.exists()
    assert command_line.run([*call, "--allow-empty", "--parameters", "10%"]) == 2
    assert command_line.run([*call, "--allow-empty"]) == 0
    assert len(json.loads(output.read_text())["deletions"]) == 4


def test_a_graph_is_emptied_by_force_alone(tmp_path: Path) -> None:
    model, output = tmp_path / "model.onnx", tmp_path / "out" / "model.onnx"
    save_model(tiny_model(TinySpec(layers=2)), model)
    call = ["prune", str(model), "-o", str(output), "-q"]
    for drop in ([], ["--drop", "block:0-1"]):
        assert command_line.run([*call, *drop]) == 2
    assert not output.exists()
    assert command_line.run([*call, *drop, "--allow-empty"]) == 0
    report = json.loads((output.parent / "prune.json").read_text())
    assert len(report["deleted"]) == 4
    assert report["verification"]["passed"] is True


@pytest.mark.parametrize(
    ("drop", "named"),
    [
        ("mlp:0", ["mlp 0"]),
        ("mlp:0,1", ["mlp 0"]),
        ("block:0", []),
        ("block:2", ["block 2"]),
        ("attention:0", []),
    ],
)
def test_what_was_cut_earlier_is_named(
    tmp_path: Path, drop: str, named: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    whole, cut = tmp_path / "whole.onnx", tmp_path / "cut" / "model.onnx"
    save_model(tiny_model(TinySpec(layers=4)), whole)
    call = ["--verify", "none", "--drop"]
    first = ["prune", str(whole), "-o", str(cut), *call, "mlp:0", "--drop", "block:2"]
    assert command_line.run(first) == 0
    assert capsys.readouterr().err == ""
    again = str(tmp_path / "again" / "model.onnx")
    assert command_line.run(["prune", str(cut), "-o", again, *call, drop]) == 0
    printed = capsys.readouterr().err
    kinds = ("mlp 0", "mlp 1", "block 0", "block 2", "attention 0")
    assert [name for name in kinds if f" {name} " in printed] == named


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A command that raises the parameter."""

    @click.command()
    @click.option("-v", is_flag=True)
    @click.pass_obj
    def fails(progress: ConsoleProgress, v: bool) -> None:
        progress.verbosity = int(v)
        raise request.param

    monkeypatch.setitem(command_line.cli.commands, "fails", fails)


@pytest.mark.parametrize(
    ("failing", "code", "line"),
    [
        (PlanError("layer 31 does not exist.", "Layers are 0 to 29."), 2, "Layers are 0 to 29."),
        (UsageError("Say one."), 2, "depthcut: Say one."),
        (ComparisonError("The clock jumps."), 2, "depthcut: The clock jumps."),
        (DisturbedMachineError("Others took 30%."), 3, "depthcut: Others took 30%."),
        (KeyboardInterrupt(), 130, "Interrupted"),
        (OSError(28, "No space left on device", "x.onnx.data"), 2, "disk is full at x.onnx.data"),
        (PermissionError(13, "Permission denied", "/x"), 2, "Permission denied at /x."),
        (ValueError("odd\nthing"), 2, "Unexpected ValueError: odd (-v shows the traceback)"),
        (MemoryError(), 2, "Out of memory"),
    ],
    indirect=["failing"],
)
@pytest.mark.usefixtures("failing")
def test_every_end_is_one_line_and_its_code(
    code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line.run(["fails"]) == code
    printed = capsys.readouterr().err
    assert line in printed
    assert "Traceback" not in printed
    assert len(printed.strip().splitlines()) == 1


@pytest.mark.parametrize("failing", [PlanError("no.")], indirect=True)
@pytest.mark.usefixtures("failing")
def test_verbose_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.run(["fails", "-v"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_progress_off_a_terminal_is_a_plain_line(capsys: pytest.CaptureFixture[str]) -> None:
    for verbosity in (0, -1):
        progress = ConsoleProgress(verbosity)
        with progress.task("count", 3) as task:
            task.advance()
            progress.say("found [bold]3[/bold]")
        lines = capsys.readouterr().err.splitlines()
        if verbosity == 0:
            assert lines[0] == "found [bold]3[/bold]"
            assert re.fullmatch(r"count: done in \d+\.\d s", lines[1])
    assert lines == [], "it was to be quiet"
    progress = ConsoleProgress()
    with pytest.raises(PlanError), progress.task("search"), progress.task("run"):
        raise PlanError("no.")
    assert capsys.readouterr().err == "search ...\n"


def test_a_long_task_begins_with_a_line_where_no_terminal_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("exporter.cli.console.BEGIN_AFTER_S", 0.0)
    monkeypatch.setattr(sys, "stderr", log := io.StringIO())
    with ConsoleProgress().task("load"):
        for _ in range(1000):  # another thread writes it
            if log.getvalue():
                break
            time.sleep(0.01)
        assert log.getvalue() == "load ...\n"
    assert "load: done in" in log.getvalue()


@pytest.mark.parametrize(("sent", "verbosity"), [(signal.SIGTERM, 0), (signal.SIGINT, -1)])
def test_interrupt_from_outside_is_130(
    tmp_path: Path, sent: signal.Signals, verbosity: int
) -> None:
    script = (
        "import os, signal, sys, click, exporter.cli as c\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # also below nohup
        "@c.cli.command()\n"
        "@click.pass_obj\n"
        "def wait(progress):\n"
        f"    progress.verbosity = {verbosity}\n"
        f"    os.kill(os.getpid(), {sent.value})\n"
        "    signal.pause()\n"
        "sys.exit(c.run(['wait']))\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False,
        cwd=tmp_path, env=env, timeout=60,
    )  # fmt: skip
    assert ran.returncode == 130
    assert ("Stopping" in ran.stderr) == (verbosity == 0)
    assert "Interrupted" in ran.stderr


@pytest.mark.parametrize("module", ["depthcut_packages", "exporter.cli", "click"])
def test_an_interrupt_while_modules_load_is_130_and_one_line(tmp_path: Path, module: str) -> None:
    script = (
        "import sys\n"
        "class Interrupting:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == sys.argv[1]:\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupting())\n"
        "from depthcut_command import main\n"
        "sys.argv[2:] = ['--version']\n"
        "main()\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run(
        [sys.executable, "-c", script, module], capture_output=True, text=True, check=False,
        cwd=tmp_path, env=env, timeout=60,
    )  # fmt: skip
    assert ran.returncode == 130
    assert len(ran.stderr.splitlines()) == 1


@pytest.mark.parametrize("code", [0, 1])
def test_a_commands_own_exit_code_is_the_programs(
    code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    @click.command("answers")
    def answers() -> None:
        click.get_current_context().exit(code)

    monkeypatch.setitem(command_line.cli.commands, "answers", answers)
    assert command_line.run(["answers"]) == code


@pytest.mark.parametrize("call", [["inspect"], ["package"], ["generate"], ["compare"]])
def test_a_path_that_is_no_text_is_a_wrong_call(
    call: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    odd.mkdir()
    (odd / "model.onnx").write_bytes(b"")
    rest = {"generate": ["hi"], "compare": [str(tmp_path), "-o", str(tmp_path / "out")]}
    assert command_line.run([*call, str(odd / "model.onnx"), *rest.get(call[0], [])]) == 2
    assert "is not UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "told"),
    [(["a.onnx"], "6 sites"), (["a.onnx", "model.onnx"], "6 sites"), ([], "holds no ONNX file"),
     (["a.onnx", "b.onnx"], "2 ONNX files and no model.onnx")],
)  # fmt: skip
def test_a_folder_stands_for_its_onnx_file(
    names: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in names:
        save_model(tiny_model(TinySpec(layers=3)), tmp_path / name)
    assert command_line.run(["inspect", str(tmp_path)]) == (0 if "sites" in told else 2)
    assert told in "".join(capsys.readouterr())


@pytest.mark.parametrize("kind", ["", "torch:"])
def test_a_report_is_kept_out_of_a_models_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    (tmp_path / "m").mkdir()
    model = str(tmp_path / "m")
    assert command_line.run(["compare", f"{kind}{model}", f"{kind}{model}", "-o", model]) == 2
    assert model in capsys.readouterr().err
    assert not list((tmp_path / "m").iterdir())


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (["prune", "model", "--no-such-option"], "No such option"),
        (["exprot", "model"], "Did you mean 'export'"),
    ],
)
def test_what_is_not_there_is_named(
    call: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line.run(call) == 2
    assert told in capsys.readouterr().err


def _target(*options: str) -> Any:
    command = cli.get_command(None, "export")
    assert isinstance(command, SchemaCommand)
    call = command.read(["MODEL", "-o", "out", *options])
    assert isinstance(call, ExportCall)
    return call.request.target


@pytest.mark.parametrize(
    ("options", "target"),
    [
        ([], "onnxruntime-cpu"),
        (["--quick"], "onnxruntime-cpu"),
        (["--at-most", "5%"], "onnxruntime-cpu"),
        (["min_embedding_cosine: 0.978"], "onnxruntime-cpu"),
        (["--at-most", "5%", "--target", "portable"], "portable"),
        (["--at-most", "5%", "opset: 20"], "portable"),
        (["--provider", "cuda"], "portable"),
        (["--at-most", "5%", "--provider", "cuda"], "portable"),
        (["--provider", "cuda", "--dtype", "float16"], "onnxruntime-cuda"),
        (["--dtype", "float16"], "portable"),
        (["--drop-attn", "2"], "portable"),
        (["--faster", "1.1x"], "portable"),
    ],
)
def test_limits_on_quality_take_the_same_form_as_no_limits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: list[str], target: str
) -> None:
    options = in_file(tmp_path, options)
    monkeypatch.setattr(module, "find_spec", lambda _: object())
    assert _target(*options) == target
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    assert _target(*options) == "portable"


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    save_model(tiny_model(), tmp_path / "model.onnx")
    return tmp_path


def inspected(capsys: pytest.CaptureFixture[str], path: Path) -> dict[str, Any]:
    assert run(["inspect", str(path), "--json"]) == 0
    results: dict[str, Any] = json.loads(capsys.readouterr().out)
    return results


def test_a_graph_tells_its_sites(graph: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(inspected(capsys, graph)["sites"]) == 6
    assert run(["inspect", str(graph)]) == 0
    assert "6 sites can be cut." in capsys.readouterr().out


def test_a_gguf_file_tells_its_sublayers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = inspected(capsys, TinyGguf.llama(layers=2).write(tmp_path / "a.gguf"))
    named = [(sublayer["layer"], sublayer["kind"]) for sublayer in result["sublayers"]]
    assert named == [(0, "attention"), (0, "mlp"), (1, "attention"), (1, "mlp")]
    assert all(sublayer["bytes"] == 4 * sublayer["parameters"] for sublayer in result["sublayers"])
