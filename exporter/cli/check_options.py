"""The options of `depthcut check`: limits, what is kept, what is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from exporter.cli.options import ANY_PATH
from exporter.cli.sections import Count, option_in
from exporter.report.ci import FORMATS

_F = TypeVar("_F", bound=Callable[..., Any])
_FIELDS = (
    "model", "backend", "provider", "precision", "device", "threads", "shapes", "text", "versions",
    "form", "quantization",
)  # fmt: skip


limit = option_in("Limits")
judging = option_in("Baselines and verdicts")
output = option_in("Outputs")


class Amount(click.ParamType[float]):
    """A number, or percent: ``1.1`` or ``110%``."""

    name = "NUMBER"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Reads it; a number from code passes."""
        from exporter.errors import UsageError

        try:
            return self._read(value)
        except UsageError as error:
            self.fail(str(error), param, ctx)

    def _read(self, value: Any) -> float:
        from exporter.gate.limits import amount

        return amount(value)


class Share(Amount):
    """A share: ``3%`` or ``0.03``, and no ``3``."""

    name = "SHARE"

    def _read(self, value: Any) -> float:
        from exporter.gate.limits import share

        return share(value)


def limit_options(function: _F) -> _F:
    """Adds the limits, and what decides how sure a verdict must be."""
    number, share = Amount(), Share()
    for option in (
        judging(
            "--commit", help="What the history calls this run. [GITHUB_SHA or CI_COMMIT_SHA]"
        ),
        judging(
            "--history", type=ANY_PATH,
            help="JSON lines: appended to, and looked at for slow drift.",
        ),
        judging(
            "--update-baseline", is_flag=True,
            help="Make the report the baseline of its key, whatever the verdict; exit code 0.",
        ),
        judging(
            "--allow", multiple=True, type=click.Choice(_FIELDS),
            help="Compare although this differs from the baseline; may be given often.",
        ),
        judging(
            "--inconclusive", type=click.Choice(["pass", "fail", "3"]), default="3",
            show_default=True, help="What not knowing counts as: exit code 0, 1 or 3.",
        ),
        judging(
            "--confirm", type=Count(0), default=0, show_default=True,
            help="Measure again, up to N times, before a regression of time is believed.",
        ),
        judging(
            "--noise-floor", type=share, default=0.01, metavar="SHARE",
            help="Changes of time within it are noise, as are those within the measured one. [1%]",
        ),
        limit("--max-memory-increase", type=share, help="Of KV cache and device memory."),
        limit("--max-size-increase", type=share, help="Of files and engines."),
        limit("--max-task-drop", type=share, help="Points of a task's score: 1% is 0.01."),
        limit("--min-embedding-cosine", type=share, help="Encoders: with the unpruned arm."),
        limit("--min-top1-agreement", type=share, help="With the unpruned arm."),
        limit("--max-kl", type=number, metavar="NATS", help="From the unpruned arm."),
        limit("--max-perplexity-increase", type=share, help="Of the evaluation text."),
        limit(
            "--min-speedup", type=number, metavar="FACTOR",
            help="Such as 1.1, over the unpruned arm."
        ),
        limit("--max-slowdown", type=share, help="Such as 3%, of each shape's time."),
    ):  # fmt: skip
        function = option(function)
    return function


def output_options(function: _F) -> _F:
    """Adds what is written for CI systems."""
    for option in (
        output(
            "--github/--no-github", default=None,
            help="Annotations and a step summary. [on where GITHUB_ACTIONS is true]",
        ),
        *(
            output(
                f"--{each.name.replace('_', '-')}", type=ANY_PATH, help=each.help,
                metavar="FOLDER" if each.is_folder else None,
            )
            for each in reversed(FORMATS)
        ),
        output("-o", "--output", type=ANY_PATH, help="The whole check as JSON."),
    ):  # fmt: skip
        function = option(function)
    return function
