"""Every call of depthcut in the samples' scripts can be read, also of those that run too long."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
import yaml

from exporter.cli import cli
from exporter.cli.command import SchemaCommand
from tests.samples.running import SAMPLES

SCRIPTS = sorted(
    path
    for path in SAMPLES.glob("*/*.sh")
    if "depthcut " in path.read_text() and path.parent.name != "07_ci"  # run by test_ci_gate.py
)


def calls(script: Path) -> list[list[str]]:
    """The words of each call, with the defaults of its variables, without what a user may add."""
    text = script.read_text(encoding="utf-8").replace("\\\n", " ")
    known = dict(re.findall(r"^(\w+)=\$\{\w+:-([^}]*)\}", text, flags=re.MULTILINE))
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text.replace('"$@"', ""))
    texts = []
    for line in re.findall(r"^[^#\n]*?\bdepthcut ((?!\$)[a-z].*)$", text, flags=re.MULTILINE):
        words = [re.sub(r"\$(\w+)", lambda m: known.get(m[1], m[0]), w) for w in shlex.split(line)]
        texts.append(_of_depthcut(words, script.parent))
    return texts


def _of_depthcut(words: list[str], here: Path) -> list[str]:
    """Without what the shell does with a call."""
    ends = [i for i, word in enumerate(words) if word in (">", "|", "||", "&&", "}")]
    words = words[: min(ends, default=len(words))]
    return [re.sub(r"\$here|\$\(dirname \$0\)", str(here), word) for word in words]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_call_is_one_that_depthcut_has(script: Path) -> None:
    result = calls(script)
    assert result
    for name, *rest in result:
        command = cli.get_command(None, name)
        assert command is not None, name
        known = {
            option for param in command.get_params(click.Context(command)) for option in param.opts
        }
        parts = {word.split("=")[0] for word in rest if word.startswith("--")}
        assert parts <= known, (name, parts - known)
        for file in map(Path, rest):
            if file.suffix == ".yaml" and file.is_file() and isinstance(command, SchemaCommand):
                keys = yaml.safe_load(file.read_text(encoding="utf-8"))
                assert keys.keys() <= command.leaves.keys(), file


def test_a_call_that_is_gone_would_be_found(tmp_path: Path) -> None:
    script = tmp_path / "run.sh"
    script.write_text('out=${1:-there}\ndepthcut prune a.onnx -o "$out/b" --gone 1 > /dev/null\n')
    assert calls(script) == [["prune", "a.onnx", "-o", "there/b", "--gone", "1"]]
    with pytest.raises(AssertionError, match="--gone"):
        test_every_call_is_one_that_depthcut_has(script)
