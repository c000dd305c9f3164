"""The options that say how long is timed, and what besides single runs of a graph."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

import click

from exporter.cli.check_options import Share
from exporter.cli.options import Lengths, speed
from exporter.cli.sections import Count

_F = TypeVar("_F", bound=Callable[..., Any])
_DURATION = re.compile(r"(?P<number>\d+(\.\d+)?) ?(?P<unit>s|m|min|h)?")
_SECONDS = {None: 1, "s": 1, "m": 60, "min": 60, "h": 3600}


class Duration(click.ParamType[float]):
    """Seconds: ``60s``, ``90``, ``2m``, ``1h``."""

    name = "TIME"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Reads the time; a number from code passes."""
        if isinstance(value, int | float):
            return float(value)
        told = _DURATION.fullmatch(str(value).strip())
        if told is None:
            self.fail(f"{value!r} is not a time such as 60s or 2m", param, ctx)
        return float(told["number"]) * _SECONDS[told["unit"]]


class Generations(click.ParamType[tuple[tuple[int, int], ...]]):
    """Prompt lengths with numbers of new tokens: ``128x64,512x32``."""

    name = "PROMPTxNEW"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[tuple[int, int], ...]:
        """Reads the list; a value from code passes."""
        if isinstance(value, tuple):
            return value
        found = []
        for part in str(value).split(","):
            told = re.fullmatch(r" *(\d+) *[xX] *(\d+) *", part)
            if told is None:
                self.fail(f"{part!r} is not a prompt and new tokens such as 128x64", param, ctx)
            found.append((int(told[1]), int(told[2])))
        return tuple(found)


def timing_options(function: _F) -> _F:
    """Adds how long is timed, and what besides single runs."""
    for option in (
        speed(
            "--load-once", is_flag=True,
            help="Don't load the arms anew between parts of the measurement; their place in memory"
            " is then part of the result.",
        ),
        speed(
            "--rounds", type=Count(2),
            help="Take so many interleaved rounds a row, instead of going by the time budget.",
        ),
        speed(
            "--threshold", type=Share(), default="1%", show_default=True,
            help="Below it a difference counts as none.",
        ),
        speed(
            "--time-budget", type=Duration(), default="60s", show_default=True,
            help="What one row's rounds may take; it ends before where the verdict is clear.",
        ),
        speed(
            "--generate", type=Generations(), default=(), metavar="PROMPTxNEW",
            help="Whole generations, timed to the first token, per token and in all.",
        ),
        speed(
            "--batch", type=Lengths(), default=(1,), show_default=True,
            help="Sequences in a timed call."
        ),
    ):  # fmt: skip
        function = option(function)
    return function
