"""The reference of all commands, as MyST Markdown, from the options that they are made of."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Iterable

import click

from exporter.cli import cli
from exporter.cli.command import SchemaCommand, help_of
from exporter.options import Leaf

_MARKS = r"[\\*_<>\[\]#|]"


def command_reference() -> str:
    """Every command under a heading of its own."""
    return "\n".join(_command(name) for name in cli.list_commands())


def _command(name: str) -> str:
    command = cli.get_command(None, name)
    assert command is not None, name
    context = click.Context(command, info_name=f"depthcut {name}")
    usage = command.get_usage(context).removeprefix("Usage: ")
    lines = [f"## depthcut {name}", "", _words(command.help), "", "```text", usage, "```", ""]
    lines += [f"```{{program}} depthcut {name}", "```", ""]
    if isinstance(command, SchemaCommand):
        lines += _sections(command, context)
    return "\n".join(lines)


def _sections(command: SchemaCommand, context: click.Context) -> Iterable[str]:  # type: ignore[type-arg]
    """The options by their headings, keys of files at the end of each."""
    shown = [leaf for leaf in command.leaves.values() if not leaf.look.argument]
    sections = dict[str, list[Leaf]]()
    for leaf in shown:
        sections.setdefault(leaf.look.section, []).append(leaf)
    params = {param.name: param for param in command.params}
    for title, leaves in sections.items():
        yield f"### {title}\n"
        for leaf in sorted(leaves, key=lambda leaf: leaf.look.config_only):
            yield _option(leaf, params.get(leaf.key), context)


def _option(leaf: Leaf, param: click.Parameter | None, context: click.Context) -> str:
    record = param.get_help_record(context) if param is not None else None
    name = record[0] if record is not None and not leaf.look.config_only else leaf.key
    words = _words(help_of(leaf))
    if leaf.look.config_only:
        words = f"Only in a `--config` file. {words}"
    return "\n".join([f"```{{option}} {name}", words, "```", ""])


def _words(text: str | None) -> str:
    """Words of a help as Markdown: backticks keep their sense, all else has none."""
    pieces = inspect.cleandoc(text or "").split("`")
    marked = zip(pieces, itertools.cycle((False, True)), strict=False)
    return "".join(f"`{p}`" if code else re.sub(_MARKS, r"\\\g<0>", p) for p, code in marked)
