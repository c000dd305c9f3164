"""The budget of the house: lines, files, options and words, counted and held to budget.toml."""

from __future__ import annotations

import ast
import functools
import math
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILE = Path(__file__).with_name("budget.toml")
PACKAGES = ("exporter", "graph_passes", "tests", "samples", "docker")
NO_CODE = frozenset((".md", ".npz", ".png", ".typed", ".pyc"))
SLACK = 0.02
"""How far a number of the budget may stand above what is counted, as a share of it."""
SHARES_ROOM = 0.3
"""The same in points of a percentage, which rises, too, where other lines go."""
MOST = {"files.exporter_longest_lines": 800}
"""What is a rule of the house, and stays where it stands."""
LEAST = frozenset(("files.exporter_mean_lines",))
"""What may not fall; everything else may not rise."""

Numbers = dict[str, float]


def lines_of(path: Path) -> int:
    return len(path.read_text("utf-8", "replace").splitlines())


def files(folder: Path) -> Iterator[Path]:
    """What counts as code: templates, styles and data, too."""
    for path in sorted(folder.rglob("*")):
        counts = path.suffix not in NO_CODE and "__pycache__" not in path.parts
        if counts and path.is_file() and path != FILE:
            yield path


def counted_lines() -> Numbers:
    numbers: Numbers = {}
    for package in PACKAGES:
        by_room: Numbers = {}
        for path in files(ROOT / package):
            inside = path.relative_to(ROOT / package).parts
            room = f"{package}/{inside[0]}" if len(inside) > 1 else f"{package}/*.py"
            by_room[room] = by_room.get(room, 0) + lines_of(path)
        numbers[package] = sum(by_room.values())
        numbers |= by_room if package == "exporter" else {}
    return numbers


def counted_files() -> Numbers:
    lines = [lines_of(path) for path in (ROOT / "exporter").rglob("*.py")]
    return {
        "exporter": len(lines),
        "exporter_mean_lines": round(sum(lines) / len(lines), 1),
        "exporter_longest_lines": max(lines),
    }


def span(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def is_text(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def counted_code() -> tuple[Numbers, Numbers]:
    """Shares of exporter's lines in percent; what both packages have of refusals and codes."""
    lines = docstrings = imports = refusals = 0
    codes = set[str]()
    for package in ("exporter", "graph_passes"):
        for path in (ROOT / package).rglob("*.py"):
            nodes = list(ast.walk(ast.parse(path.read_bytes())))
            for node in nodes:
                if isinstance(node, ast.FunctionDef):
                    refusals += node.name.lstrip("_").startswith("refuse")
                elif isinstance(node, ast.keyword) and node.arg == "code" and is_text(node.value):
                    codes.add(ast.literal_eval(node.value))
            if package == "exporter":
                lines += lines_of(path)
                texts = (n for n in nodes if isinstance(n, ast.Expr) and is_text(n.value))
                docstrings += sum(map(span, texts))
                imports += sum(span(n) for n in nodes if isinstance(n, ast.Import | ast.ImportFrom))
    shares = {"docstrings": docstrings, "imports": imports}
    return (
        {name: round(100 * count / lines, 1) for name, count in shares.items()},
        {"refuse_functions": refusals, "error_codes": len(codes)},
    )


def counted_options() -> Numbers:
    """Options as ``--help-all`` shows them; those of every command are the group's."""
    import click

    from exporter.cli import cli

    numbers: Numbers = {}
    for name in cli.list_commands():
        command = cli.get_command(None, name)
        assert command is not None
        params = command.get_params(click.Context(command, **command.context_settings))
        options = [param for param in params if isinstance(param, click.Option)]
        numbers[name] = sum(not option.hidden for option in options)
    general = len(cli.get_params(click.Context(cli)))
    return {"all": general + sum(numbers.values()), **numbers}


def counted_words() -> Numbers:
    pages = [*ROOT.glob("*.md"), *(p for name in PACKAGES for p in (ROOT / name).rglob("*.md"))]
    kept = [page for page in pages if page.name != "CHANGELOG.md"]
    return {"documentation": sum(len(page.read_text("utf-8").split()) for page in kept)}


def flat(tables: dict[str, Numbers]) -> Numbers:
    return {
        f"{table}.{name}": n for table, numbers in tables.items() for name, n in numbers.items()
    }


@functools.cache
def counted() -> Numbers:
    """Everything, as ``table.name``."""
    shares, code = counted_code()
    return flat(
        {
            "lines": counted_lines(),
            "files": counted_files(),
            "percent": shares,
            "code": code,
            "options": counted_options(),
            "words": counted_words(),
        }
    )


def budget() -> Numbers:
    return flat(tomllib.loads(FILE.read_text("utf-8")))


def is_over(name: str, count: float, allowed: float) -> bool:
    return count < allowed if name in LEAST else count > allowed


def is_loose(name: str, count: float, allowed: float) -> bool:
    """Whether the budget stands so far from the count that it holds nothing."""
    if name in MOST:
        return allowed != MOST[name]
    if name in LEAST:  # it falls, too, where lines go and the files stay
        return count - allowed > 4 * SLACK * count
    return allowed - count > max(SLACK * count, 2 * SHARES_ROOM if isinstance(count, float) else 1)


def with_room(name: str, count: float) -> float:
    """The number to write: the count and half of the slack."""
    if name in MOST:
        return MOST[name]
    if name in LEAST:
        return math.floor(count * (1 - 2 * SLACK))
    room = SHARES_ROOM if isinstance(count, float) else int(count * SLACK / 2)
    return round(count + room, 1)


def lowered(text: str, counts: Numbers) -> str:
    """The file with each number that is too loose lowered; a line whose subject is gone goes."""
    kept, table = list[str](), ""
    for line in text.splitlines():
        if heading := re.fullmatch(r"\[(\w+)\]", line):
            table = heading[1]
        if not (entry := re.fullmatch(r'"?([^"=]+?)"? = ([\d.]+)', line)):
            kept.append(line)
            continue
        name = f"{table}.{entry[1]}"
        if name in counts and is_loose(name, counts[name], float(entry[2])):
            line = f"{line.partition(' = ')[0]} = {with_room(name, counts[name]):g}"
        if name in counts:
            kept.append(line)
    return "\n".join(kept) + "\n"


def main() -> None:
    counts, allowed = counted(), budget()
    if "--lower" in sys.argv:
        FILE.write_text(lowered(FILE.read_text("utf-8"), counts), "utf-8")
        return
    for name, count in counts.items():
        over = is_over(name, count, allowed.get(name, 0))
        print(f"{name:40}{count:>9g} of {allowed.get(name, 0):>9g}{'  OVER' if over else ''}")


if __name__ == "__main__":
    main()
