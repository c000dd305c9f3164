"""What the documents tell to call exists: commands, options, files, headings, make's targets."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path
from statistics import NormalDist
from typing import Any

import click
import pytest

import exporter.cli as command_line
from exporter.artifacts.base import FILE_KINDS
from exporter.cli.command import SchemaCommand
from exporter.cli.console import ConsoleProgress

ROOT = Path(__file__).parents[2]
FOLDERS = ("exporter", "graph_passes", "samples", "docker", "tests")
DOCUMENTS = [
    *sorted(ROOT.glob("*.md")),
    *sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md")),
]
GENERATED = {"architectures.md", "dialects.md", "builds.md", "rivals.md"}
WRITTEN = [path for path in DOCUMENTS if path.name not in GENERATED]
PATHS = pytest.mark.parametrize("path", WRITTEN, ids=lambda path: str(path.relative_to(ROOT)))
GONE = {
    *("--attention-only", "--backend", "--force", "--heal-rank", "--heal-time", "--kind"),
    *("--load-once", "--method", "--no-compare", "--prompt", "--scheme", "--target-speedup"),
}
"""What options were called before; the changelog says so."""
FOREIGN = {
    "--build-arg", "--cases", "--exportTimes", "--jobs", "--kills", "--llama", "--lower", "--mlx",
    "--model-path", "--save-results", "--seed", "--strace", "--table", "--text", "--times",
    "--tokens", "--trials", "--tries", "--vllm",
}  # fmt: skip
"""Options of docker, trtexec, polygraphy, SGLang, benchmarks and the trials of tests/README.md."""


def shell_lines(text: str) -> list[str]:
    """The lines of all shell examples, continued ones joined."""
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def depthcut_calls(text: str) -> list[list[str]]:
    """The arguments of every `depthcut`, also as the command of its image."""
    texts = []
    for line in shell_lines(text):
        words = shlex.split(line, comments=True)
        starts = [i for i, word in enumerate(words) if word in ("depthcut", "depthcut:cpu")]
        if starts and not any(word == "build" for word in words[: starts[0]]):
            texts.append(words[starts[0] + 1 :])
    return texts


def parse(arguments: list[str]) -> None:
    name, *rest = arguments
    command = command_line.cli.get_command(None, name)
    assert command is not None, f"no command {name}"
    if isinstance(command, SchemaCommand):
        command.read(rest)
    else:
        command.make_context(name, rest, obj=ConsoleProgress())


@pytest.fixture
def no_files_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(self: Any, value: Any, param: Any, ctx: Any) -> Path:
        return value if self.type is str else Path(value)

    monkeypatch.setattr(click.Path, "convert", convert)


@pytest.mark.usefixtures("no_files_needed")
@PATHS
def test_every_call_parses(path: Path) -> None:
    calls = depthcut_calls(path.read_text(encoding="utf-8"))
    assert calls or path != ROOT / "README.md"
    for call in calls:
        parse(call)


@pytest.mark.usefixtures("no_files_needed")
@pytest.mark.parametrize(
    "line", ["depthcut gone a.onnx", "depthcut prune a.onnx -o b --gone", "depthcut compare a -o b"]
)
def test_a_wrong_call_would_be_found(line: str) -> None:
    (call,) = depthcut_calls(f"```sh\nA=1 {line} # words\n```")
    with pytest.raises((AssertionError, click.UsageError)):
        parse(call)


def schema_commands() -> list[SchemaCommand[Any]]:
    commands = (
        command_line.cli.get_command(None, name) for name in command_line.cli.list_commands()
    )
    return [command for command in commands if isinstance(command, SchemaCommand)]


def test_every_option_stands_in_a_document_or_sample() -> None:
    samples = [path for path in (ROOT / "samples").rglob("*") if path.suffix in (".sh", ".yml")]
    paths = {*WRITTEN, *samples} - {ROOT / "CHANGELOG.md"}
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(paths))
    named = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", text))
    unnamed = {
        f"{command.name} {leaf.key}"
        for command in schema_commands()
        for leaf in command.leaves.values()
        if not (leaf.look.argument or leaf.look.config_only)
        and named.isdisjoint(part for name in leaf.names for part in name.split("/"))
    }
    assert unnamed == set()


@PATHS
def test_every_option_that_is_named_exists(path: Path) -> None:
    if path.name == "CHANGELOG.md":
        return  # it names what has gone, too
    commands = schema_commands()
    known = {
        option
        for command in commands
        for param in command.get_params(click.Context(command))
        for option in (*param.opts, *param.secondary_opts)
    }
    prose = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", prose)) - FOREIGN
    named = {name for name in named if not name.startswith("--depthcut-")}
    assert named <= known | {"--model_args", "--model"}


def test_no_message_names_an_option_that_is_gone() -> None:
    sources = [*(ROOT / "exporter").rglob("*.py"), *(ROOT / "graph_passes").rglob("*.py")]
    assert sources
    texts = {str(path): gone_options(path.read_text(encoding="utf-8")) for path in sources}
    assert {path: names for path, names in texts.items() if names} == {}


def gone_options(source: str) -> set[str]:
    """The options of earlier days in the strings of a module."""
    values = (node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant))
    text = "\n".join(value for value in values if isinstance(value, str))
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]+", text)) & GONE


def test_an_option_that_is_gone_would_be_found() -> None:
    assert gone_options('hint = f"Heal with --kind {name}."') == {"--kind"}
    assert gone_options('hint = "Take --kinds attention."') == set()


@PATHS
def test_every_target_and_script_exists(path: Path) -> None:
    assert missing_calls(path.read_text(encoding="utf-8")) == []


def missing_calls(text: str) -> list[str]:
    """Targets of make, scripts and modules that a text calls and that aren't there."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][\w-]*):", makefile, flags=re.MULTILINE))
    called = re.findall(r"(?:`|^)make ([\w-]+)", text, flags=re.MULTILINE)
    scripts = re.findall(r"\bsh (samples/\S+\.sh)", text)
    modules = re.findall(r"python -m\s+(tests(?:\.\w+)*)", text)
    return [
        *(name for name in called if name not in targets),
        *(name for name in scripts if not (ROOT / name).is_file()),
        *(name for name in modules if not _runs(ROOT / name.replace(".", "/"))),
    ]


def _runs(module: Path) -> bool:
    return (module / "__main__.py").is_file() or module.with_suffix(".py").is_file()


def test_a_missing_target_would_be_found() -> None:
    text = "`make gone`, make way\nmake demo\nsh samples/gone.sh python -m tests.gone"
    assert missing_calls(text) == ["gone", "samples/gone.sh", "tests.gone"]


def test_the_table_of_items_follows_from_its_formula() -> None:
    """Of a paired difference's normal interval: two-sided 5 %, found in 80 % of measurements."""
    page = (ROOT / "exporter" / "docs" / "shipping.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) points? \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|$", page, re.M)
    assert len(rows) == 4
    factor = round(sum(map(NormalDist().inv_cdf, (0.975, 0.8))) ** 2, 2)
    assert f"n = {factor} c / d²" in page
    for points, *items in rows:
        needed = [factor * share / (int(points) / 100) ** 2 for share in (0.1, 0.2, 0.3)]
        assert [int(n.replace(",", "")) for n in items] == pytest.approx(needed, abs=1)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(path: Path) -> None:
    assert dead_links(path, path.read_text(encoding="utf-8")) == []


def dead_links(path: Path, text: str) -> list[str]:
    """Links to files, and to headings, that aren't there."""
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    dead = []
    for link in re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)\)", prose):
        name, _, heading = link.partition("#")
        target = path.parent / name if name else path
        if not target.exists() or (heading and heading not in headings(target)):
            dead.append(link)
    return dead


def headings(page: Path) -> list[str]:
    """What GitHub calls the headings of a page."""
    lines = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    words = (re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", line).lower() for line in lines)
    return [re.sub(r"[^\w\- ]", "", line).strip().replace(" ", "-") for line in words]


def test_a_dead_link_would_be_found() -> None:
    text = "[a](gone.md) [b](README.md#gone) `[c](gone)` [d](#safety) [e](https://x) [f](exporter)"
    assert dead_links(ROOT / "README.md", text) == ["gone.md", "README.md#gone"]


def test_the_page_of_files_names_every_kind() -> None:
    page = (ROOT / "exporter" / "docs" / "files.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| .+? \| `(\w+)` \|", page, re.MULTILINE)) == set(FILE_KINDS)
