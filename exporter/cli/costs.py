"""`depthcut costs`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from exporter.cli.budget_options import Request
from exporter.cli.console import ConsoleProgress, echo, echo_json
from exporter.cli.options import (
    ANY_FILE,
    AUTO,
    TextPath,
    Threads,
    json_option,
    verbosity_options,
)
from exporter.cli.sections import Count
from exporter.cli.timing_options import Duration

if TYPE_CHECKING:
    from exporter.choose.costs import At, CostTable
    from exporter.engines.build.libraries import Backend
    from graph_passes.types import Replacement


@click.command(short_help="Measure what each attention and MLP takes of a request's time.")
@click.argument("model", type=TextPath(path_type=str))
@click.option("-o", "--output", type=ANY_FILE, default=Path("costs.json"), show_default=True)
@click.option(
    "--at", type=Request(), default="batch=1,prompt=512,new=128", show_default=True,
    help="The request: one prefill of the prompt, then so many decode steps.",
)  # fmt: skip
@click.option(
    "--replacement", "replacements", type=click.Choice(["none", "bias", "linear"]), multiple=True,
    default=("none", "bias", "linear"), show_default=True,
    help="What may take a sublayer's place; without any is always measured.",
)  # fmt: skip
@click.option("--rank", type=Count(), help="Rank of linear maps. [full]")
@click.option(
    "--provider", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True,
    help="Where ONNX Runtime or PyTorch runs it.",
)  # fmt: skip
@click.option(
    "--engine", type=click.Choice(["tensorrt-rtx", "tensorrt"]),
    help="Build engines of the graph and its variants, and run those on the GPU.",
)  # fmt: skip
@click.option(
    "--threads", type=Threads(), default=AUTO, show_default=True,
    help="CPU threads; auto: the fastest, found in a short probe.",
)  # fmt: skip
@click.option(
    "--time-budget", type=Duration(), default="60s", show_default=True,
    help="What one variant's rounds may take; they end before where its cost is known.",
)  # fmt: skip
@json_option
@verbosity_options
@click.pass_obj
def costs(
    progress: ConsoleProgress,
    /,
    model: str,
    output: Path,
    *,
    at: At,
    replacements: Sequence[str],
    rank: int | None,
    provider: str,
    engine: Backend | None,
    threads: int | str,
    time_budget: float,
    as_json: bool,
) -> None:
    """Measure what each attention and MLP of MODEL takes of a request's time.

    MODEL is an ONNX file or a folder with one, or torch:DIR, a Hugging Face folder that PyTorch
    runs. Variants of it, each with half of the sublayers of one kind and shape cut, are timed
    against the whole one in turns. What an earlier run has left in the output file is kept.
    """
    from exporter.choose.costs import CostSettings, Effort, measure_costs
    from exporter.cli.results import print_rows
    from exporter.errors import UsageError
    from graph_passes.files.placing import working

    if rank is not None and "linear" not in replacements:
        raise UsageError("--rank is for linear maps.", "Add --replacement linear.")
    with working(output):
        table = measure_costs(
            model,
            CostSettings(
                at,
                None if threads == AUTO else int(threads),
                cast("tuple[Replacement, ...]", tuple(replacements)),
                effort=Effort(seconds=time_budget),
                kept=output,
            ),
            provider=provider,
            engine=engine,
            rank=rank,
            progress=progress,
        )
    if as_json:
        echo_json(table.to_json())
        return
    echo(f"A request ({table.at}) takes {table.baseline_ms:.4g} ms. Each cut saves, in ms:")
    print_rows(*_saved(table))
    echo(output)


def _saved(table: CostTable) -> tuple[list[str], list[list[str]]]:
    """The header, and a row for each group of sublayers."""
    from exporter.report.words import significant

    hows = list(dict.fromkeys(t.replacement for group in table.groups for t in group.trials))
    rows = []
    for group in table.groups:
        first = group.members[0]
        layers = ",".join(str(member.layer) for member in group.members)
        found = [group.each_ms(how) for how in hows]
        told = [
            "-" if each is None else f"{significant(each[0], 3)} ± {significant(each[1], 1)}"
            for each in found
        ]
        rows.append([first.kind, layers, *told])
    return ["sublayer", "layers", *("alone" if how == "none" else how for how in hows)], rows
