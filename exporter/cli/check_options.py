"""The options of `depthcut check`: limits, what is kept, what is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from exporter.cli.options import ANY_PATH

_F = TypeVar("_F", bound=Callable[..., Any])
_FIELDS = (
    "model", "backend", "provider", "precision", "device", "threads", "shapes", "text", "versions",
)  # fmt: skip


class Amount(click.ParamType[float]):
    """A share: ``3%`` or ``0.03``."""

    name = "SHARE"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Reads the share; a number from code passes."""
        from exporter.errors import UsageError
        from exporter.regression.limits import amount

        try:
            return amount(value)
        except UsageError as error:
            self.fail(str(error), param, ctx)


def limit_options(function: _F) -> _F:
    """Adds the limits, and what decides how sure a verdict must be."""
    share = Amount()
    for option in (
        click.option(
            "--commit", help="What the history calls this run. [GITHUB_SHA or CI_COMMIT_SHA]"
        ),
        click.option(
            "--history", type=ANY_PATH,
            help="JSON lines: appended to, and looked at for slow drift.",
        ),
        click.option(
            "--update-baseline", is_flag=True,
            help="Make the report the baseline of its key, whatever the verdict; exit code 0.",
        ),
        click.option(
            "--allow", multiple=True, type=click.Choice(_FIELDS),
            help="Compare although this differs from the baseline; may be given often.",
        ),
        click.option(
            "--inconclusive", type=click.Choice(["pass", "fail", "3"]), default="3",
            show_default=True, help="What not knowing counts as: exit code 0, 1 or 3.",
        ),
        click.option(
            "--confirm", type=click.IntRange(min=0), default=0, metavar="N", show_default=True,
            help="Measure again, up to N times, before a regression of time is believed.",
        ),
        click.option(
            "--noise-floor", type=share, default=0.01, metavar="SHARE",
            help="Changes of time within it are noise, as are those within the measured one. [1%]",
        ),
        click.option("--max-memory-increase", type=share, help="Of KV cache and device memory."),
        click.option("--max-size-increase", type=share, help="Of files and engines."),
        click.option("--max-task-drop", type=share, help="Points of a task's score: 1% is 0.01."),
        click.option("--min-embedding-cosine", type=share, help="Encoders: with the unpruned arm."),
        click.option("--min-top1-agreement", type=share, help="With the unpruned arm."),
        click.option("--max-kl", type=share, metavar="NATS", help="From the unpruned arm."),
        click.option("--max-perplexity-increase", type=share),
        click.option(
            "--min-speedup", type=share, metavar="FACTOR", help="Over the unpruned arm: 1.1."
        ),
        click.option("--max-slowdown", type=share, help="Of each shape's time: 3%."),
    ):  # fmt: skip
        function = option(function)
    return function


def output_options(function: _F) -> _F:
    """Adds what is written for CI systems."""
    for option in (
        click.option(
            "--github/--no-github", default=None,
            help="Annotations and a step summary. [on where GITHUB_ACTIONS is true]",
        ),
        click.option("--gitlab-metrics", type=ANY_PATH, help="OpenMetrics text."),
        click.option("--pytest-benchmark", type=ANY_PATH, help="pytest-benchmark's JSON."),
        click.option("--bencher", type=ANY_PATH, help="Bencher Metric Format."),
        click.option(
            "--github-benchmark", type=ANY_PATH, metavar="FOLDER",
            help="smaller.json and bigger.json for github-action-benchmark.",
        ),
        click.option("--junit", type=ANY_PATH, help="JUnit XML."),
        click.option("-o", "--output", type=ANY_PATH, help="The whole check as JSON."),
    ):  # fmt: skip
        function = option(function)
    return function
