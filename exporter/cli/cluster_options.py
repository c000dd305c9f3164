"""Options that spread a command's work over a Ray cluster, and what they make of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import click

from exporter.cli.sections import Count, option_in
from exporter.progress import Progress

if TYPE_CHECKING:
    from exporter.artifacts import ImportanceReport
    from exporter.choose.selection import MakeMeter
    from exporter.score.cluster import Pool

_F = TypeVar("_F", bound=Callable[..., Any])
# As exporter.score.cluster.connection has it, which --help must not load.
_LOCAL = "local"
_ADDRESS = re.compile(r"local|auto|[^/\s]+:\d+")

spreading = option_in("On a cluster")


class ClusterAddress(click.ParamType[str]):
    """Where a Ray cluster is: ``host:port``, ``auto`` or ``local``."""

    name = "ADDRESS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Refuses what can't be one, such as the argument behind a bare --ray."""
        if _ADDRESS.fullmatch(str(value)) is None:
            self.fail(
                f"{value!r} is no host:port, auto or local. For a cluster on this machine put "
                "--ray last, or write --ray=local. With ray://… depthcut has to run on a machine "
                "of the cluster: give its host:port.",
                param,
                ctx,
            )
        return str(value)


def ray_options(function: _F) -> _F:
    """Adds the cluster and the number of workers."""
    for option in (
        spreading(
            "--ray-workers", type=Count(),
            help="Of --ray: processes, each with a copy of the model. [one on each machine; two on "
            "this one]",
        ),
        spreading(
            "--ray", type=ClusterAddress(), is_flag=False, flag_value=_LOCAL,
            metavar="[ADDRESS]",
            help="Spread the work over the Ray cluster at host:port; auto: the one that runs here. "
            "Alone: one that is started on this machine and ends with the command.",
        ),
    ):  # fmt: skip
        function = option(function)
    return function


def asks_for_cluster(options: Mapping[str, Any]) -> bool:
    """Whether the work is to be spread.

    Raises:
        UsageError: Something is said of a cluster that nobody asked for.
    """
    from exporter.errors import UsageError

    if options.get("ray") is None and options.get("ray_workers") is not None:
        raise UsageError("--ray-workers is for --ray.", "Give both, or neither.")
    return options.get("ray") is not None


def refuse_with_budget(options: Mapping[str, Any]) -> None:
    """Refuses a cluster where a budget is to be held.

    Raises:
        UsageError: One was asked for.
    """
    from exporter.errors import UsageError

    if asks_for_cluster(options):
        raise UsageError(
            "--ray spreads searches for numbers; a plan for a budget is made in one process.",
            "Leave --ray away.",
        )


def pool_of(options: Mapping[str, Any], progress: Progress) -> AbstractContextManager[Pool]:
    """The workers that the options ask for."""
    from exporter.score.cluster import open_pool

    return open_pool(options["ray"], workers=options["ray_workers"], progress=progress)


@contextmanager
def one_cluster(options: Mapping[str, Any], progress: Progress) -> Iterator[None]:
    """Stays connected over all that runs in the block, where a cluster is asked for at all."""
    with pool_of(options, progress) if asks_for_cluster(options) else nullcontext():
        yield


def cluster_scored(model: str, options: Mapping[str, Any], progress: Progress) -> ImportanceReport:
    """One model scored on a cluster, as the options of `depthcut score` ask."""
    from exporter.cli.requests import score_options, source_options
    from exporter.score.cluster import score_on_cluster

    with pool_of(options, progress) as pool:
        return score_on_cluster(
            model,
            pool,
            score_options(options),
            load=vars(source_options(options)),
            progress=progress,
        )


def spread_meters(
    options: Mapping[str, Any], stack: ExitStack, progress: Progress
) -> MakeMeter | None:
    """What measures a search's candidates on a cluster; None where no cluster is asked for.

    Args:
        options: click's.
        stack: Ends the workers.
        progress: Told what goes on.

    Raises:
        UsageError: The search measures nothing that could be spread.
    """
    from exporter.errors import UsageError

    if not asks_for_cluster(options):
        return None
    if options["search"] not in ("greedy", "evolution"):
        raise UsageError(
            f"--ray spreads what a search measures; --search {options['search'] or 'one-shot'} "
            "measures no candidates.",
            "Take --search greedy or evolution, or leave --ray away.",
        )
    from exporter.cli.requests import source_options
    from exporter.score.cluster import cluster_meter
    from exporter.score.cluster.loading import ModelAddress

    def make(loaded: Any, text: Any, batch_size: int, positions: int) -> Any:
        pool = stack.enter_context(pool_of(options, progress))
        meter = cluster_meter(
            pool,
            ModelAddress.of(loaded, vars(source_options(options))),
            text,
            num_layers=loaded.ref.num_layers,
            batch_size=batch_size,
            positions=positions,
        )
        return stack.enter_context(meter)

    return make
