"""Where work is spread over a Ray cluster."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator

from exporter.option_types import Count
from exporter.options import Options, dataclass, option

LOCAL = "local"
"""The address of a cluster on this machine that ends with the call."""

CLUSTER = "On a cluster"
_ADDRESS = re.compile(r"local|auto|[^/\s]+:\d+")


def _address(text: str) -> str:
    if _ADDRESS.fullmatch(text) is None:
        raise ValueError(
            "this is no host:port, auto or local. For a cluster on this machine put --ray last, or "
            "write --ray=local. With ray://… depthcut has to run on a machine of the cluster: give "
            "its host:port"
        )
    return text


@dataclass(frozen=True)
class ClusterOptions(Options):
    """Where work is spread over a Ray cluster."""

    section = CLUSTER
    switch = "address"
    address: Annotated[str, AfterValidator(_address)] = option(
        LOCAL,
        "Distribute the work over the Ray cluster at host:port; auto: the one that runs here. "
        "Without a value: one that is started on this machine and ends with the command.",
        "--ray",
        metavar="[ADDRESS]",
        bare=LOCAL,
        usual="not at all",
        rare=True,
    )
    workers: Count | None = option(
        None,
        "Processes, each with a copy of the model.",
        "--ray-workers",
        usual="one on each machine; two on this one",
        rare=True,
    )
