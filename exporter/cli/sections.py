"""Help under headings: options by what they are about, commands by where they stand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import click

_F = TypeVar("_F", bound=Callable[..., Any])
_REST = "Options"


class Count(click.ParamType[int]):
    """A number from 1 on, or from another smallest one; its help doesn't say so each time."""

    name = "N"

    def __init__(self, smallest: int = 1) -> None:
        self._range = click.IntRange(min=smallest)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Refuses what is no number, or too small."""
        return int(self._range.convert(value, param, ctx))


class SectionOption(click.Option):
    """An option that stands under a heading.

    Attributes:
        section: The heading.
    """

    def __init__(self, *arguments: Any, section: str, **settings: Any) -> None:
        self.section = section
        super().__init__(*arguments, **settings)


def option_in(section: str) -> Callable[..., Callable[[_F], _F]]:
    """`click.option` for options under a heading."""
    return partial(click.option, cls=SectionOption, section=section)


class SectionedCommand(click.Command):
    """A command with so many options that its help needs headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the options of each heading, in the order in which the headings come first."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record is not None:
                sections.setdefault(getattr(param, "section", _REST), []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


class SectionedGroup(click.Group):
    """Commands in the order in which they were added, under headings."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._sections: dict[str, list[click.Command]] = {}

    def add_sections(self, sections: Mapping[str, list[click.Command]]) -> None:
        """Adds commands, by heading."""
        for title, commands in sections.items():
            self._sections[title] = commands
            for command in commands:
                self.add_command(command)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes each heading's commands."""
        width = max(map(len, self.commands))
        for title, commands in self._sections.items():
            with formatter.section(title):
                formatter.write_dl(
                    [
                        ((c.name or "").ljust(width), c.get_short_help_str(limit=99))
                        for c in commands
                    ]
                )
