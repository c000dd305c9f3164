"""How many workers a cluster has room for, and what each of them gets."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from exporter.errors import ClusterError

LOCAL_WORKERS = 2


@dataclass(frozen=True)
class Allocation:
    """The workers of a pool.

    Attributes:
        workers: How many.
        cpus: What each reserves of its machine.
        threads: What each computes with.
    """

    workers: int
    cpus: int
    threads: int


def allocate(
    nodes: Sequence[int], workers: int | None, *, local: bool, whole_nodes: bool = False
) -> Allocation:
    """Divides the machines.

    Threads are as many as processors, or what ``OMP_NUM_THREADS`` says where the command was given.

    Args:
        nodes: The processors of each machine.
        workers: How many are asked for; None: one on each machine, two on a local cluster.
        local: All of it is this machine.
        whole_nodes: None shares a machine with another.

    Raises:
        ClusterError: There is no machine, or not room for so many.
    """
    nodes = sorted((cpus for cpus in nodes if cpus), reverse=True)
    if not nodes:
        raise ClusterError(
            "The Ray cluster has no CPUs.", "Start workers: ray start --address.", code="no-cpus"
        )
    if whole_nodes:
        largest = nodes.count(nodes[0])
        return _allocated(min(workers or largest, largest), nodes[0])
    wanted = workers or (min(LOCAL_WORKERS, nodes[0]) if local else len(nodes))
    for cpus in range(nodes[0], 0, -1):
        if sum(node // cpus for node in nodes) >= wanted:
            return _allocated(wanted, cpus)
    raise ClusterError(
        f"{wanted} workers are asked for, but the cluster has {sum(nodes)} CPUs.",
        f"Ask for at most {sum(nodes)}: --ray-workers.",
        code="too-many-workers",
    )


def _allocated(workers: int, cpus: int) -> Allocation:
    told = os.environ.get("OMP_NUM_THREADS", "")
    return Allocation(workers, cpus, int(told) if told.isdecimal() and int(told) else cpus)
