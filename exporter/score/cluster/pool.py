"""Workers on a Ray cluster that keep what they have set up, and work handed out to them."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from exporter.errors import ClusterError, DepthcutError, first_line
from exporter.progress import QUIET, Progress
from exporter.score.cluster import worker as worker_module
from exporter.score.cluster.connection import connected
from exporter.score.cluster.options import LOCAL
from exporter.score.cluster.worker import versions

LOCAL_WORKERS = 2


@dataclass(frozen=True)
class Allocation:
    """The workers of a pool."""

    workers: int
    cpus: int
    threads: int


def allocate(
    nodes: Sequence[int], workers: int | None, *, local: bool, whole_nodes: bool = False
) -> Allocation:
    """Divides the machines.

    Threads are as many as processors, or what ``OMP_NUM_THREADS`` says where the command was given.
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
    value = os.environ.get("OMP_NUM_THREADS", "")
    return Allocation(workers, cpus, int(value) if value.isdecimal() and int(value) else cpus)


S = TypeVar("S")
J = TypeVar("J")
R = TypeVar("R")

ATTEMPTS = 3
"""A piece of work that so many workers were lost with is given up."""

_POLL_S = 10.0


@contextlib.contextmanager
def open_pool(
    address: str | None = None,
    *,
    workers: int | None = None,  # None: one on each machine, two on a local cluster
    whole_nodes: bool = False,
    progress: Progress = QUIET,
) -> Iterator[Pool]:
    """Connects to a Ray cluster, or starts a local one that ends with the block.

    Ray runs what it is sent, and has no passwords unless it was started with them: give it only
    clusters that you trust.
    """
    own = len(os.sched_getaffinity(0))
    with connected(address, max(own, workers or 1), progress) as ray:
        nodes = _nodes(ray)
        local = address in (None, LOCAL) and len(nodes) == 1
        allocation = allocate(nodes, workers, local=local, whole_nodes=whole_nodes)
        progress.detail(
            f"cluster: {allocation.workers} workers, {allocation.cpus} CPUs and "
            f"{allocation.threads} threads each"
        )
        yield Pool(ray, allocation, progress)


def _nodes(ray: Any) -> list[int]:
    """The processors of each machine that is there."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    return [int(node["Resources"].get("CPU", 0)) for node in alive]


class Pool:
    """Workers to be had; see :func:`open_pool`."""

    def __init__(self, ray: Any, allocation: Allocation, progress: Progress = QUIET) -> None:
        self._ray, self._allocation, self._progress = ray, allocation, progress
        self.workers = allocation.workers
        ray.cloudpickle.register_pickle_by_value(worker_module)

    def run(
        self, setup: Callable[[], S], work: Callable[[S, J], R], jobs: Sequence[J]
    ) -> Iterator[tuple[int, R]]:
        """Does some pieces of work on workers that were set up for them alone."""
        with self.group(setup) as group:
            yield from group.run(work, jobs)

    @contextlib.contextmanager
    def group(self, setup: Callable[[], S]) -> Iterator[WorkerGroup[S]]:
        """Workers that stay set up for several rounds of work, until the block ends."""
        group: WorkerGroup[S] = WorkerGroup(self._ray, self._allocation, setup, self._progress)
        try:
            yield group
        finally:
            group.close()


class WorkerGroup(Generic[S]):
    """Workers with their state; see :meth:`Pool.group`. Ray makes a lost one, and its piece, anew.

    Args:
        ray: The connected module.
        allocation: How many workers, and what each has.
        setup: Makes the state.
        progress: Told where no worker gets a place.
    """

    def __init__(
        self, ray: Any, allocation: Allocation, setup: Callable[[], S], progress: Progress = QUIET
    ) -> None:
        self._ray, self._allocation, self._progress = ray, allocation, progress
        self._own = versions()
        self._actor = ray.remote(
            num_cpus=allocation.cpus,
            max_restarts=-1,
            max_task_retries=ATTEMPTS - 1,
            scheduling_strategy="SPREAD",
        )(worker_module.Worker)
        self._setup = ray.put(setup)
        self._idle: list[Any] = []
        self._pending: dict[Any, tuple[Any, str | int]] = {}
        """What was asked, of which actor: ``about``, ``begin``, or a piece's number."""
        self._is_waiting = False

    @property
    def workers(self) -> int:
        """How many there are at once."""
        return self._allocation.workers

    def run(self, work: Callable[[S, J], R], jobs: Sequence[J]) -> Iterator[tuple[int, R]]:
        """Does some pieces of work; see :meth:`Pool.run`."""
        waiting, missing = deque(range(len(jobs))), len(jobs)
        for _ in range(min(self.workers, missing) - len(self._idle) - len(self._pending)):
            self._start()
        try:
            while missing:
                while self._idle and waiting:
                    actor, number = self._idle.pop(), waiting.popleft()
                    ref = actor.do.remote(self._setup, work, jobs[number])
                    self._pending[ref] = actor, number
                for number, result in self._collected(jobs):
                    missing -= 1
                    yield number, result
        finally:
            # What was broken off leaves workers at work that nobody waits for.
            for ref, (actor, stage) in list(self._pending.items()):
                if isinstance(stage, int):
                    del self._pending[ref]
                    self._ray.kill(actor)

    def close(self) -> None:
        """Ends all workers."""
        for actor in (*self._idle, *(actor for actor, _ in self._pending.values())):
            self._ray.kill(actor)
        self._idle.clear()
        self._pending.clear()

    def _start(self) -> None:
        actor = self._actor.remote(self._allocation.threads, _foreign_folder())
        self._pending[actor.about.remote()] = actor, "about"

    def _collected(self, jobs: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """Waits until something has happened."""
        ready, _ = self._ray.wait(list(self._pending), num_returns=1, timeout=_POLL_S)
        if not ready:
            self._refuse_without_room()
        for ref in ready:
            actor, stage = self._pending.pop(ref)
            if isinstance(stage, int):
                self._idle.append(actor)
                name = f"piece {stage + 1} of {len(jobs)} ({str(jobs[stage])[:100]})"
                yield stage, self._answer(ref, name, "piece-lost")
                continue
            try:
                answer = self._answer(ref, "its setup", "workers-lost")
                if stage == "about":
                    _refuse_versions(self._own, **answer)
            except DepthcutError:
                self._ray.kill(actor)  # it must get no work, if the caller goes on
                raise
            if stage == "about":
                self._pending[actor.begin.remote(self._setup)] = actor, "begin"
            else:
                self._idle.append(actor)

    def _answer(self, ref: Any, what: str, code: str) -> Any:
        """What came out."""
        try:
            how, value = self._ray.get(ref)
        except self._ray.exceptions.RayTaskError as error:
            problem = first_line(getattr(error, "cause", None) or error)
            raise ClusterError(
                f"A worker can't tell what came of {what}: {problem}.", code="answer-lost"
            ) from error
        except self._ray.exceptions.RayError as error:
            raise ClusterError(
                f"{ATTEMPTS} workers in turn were lost with {what}: {_cause(error)}.",
                "Is there memory enough in every worker? Ask for fewer (--ray-workers) or a "
                "smaller --batch-size.",
                code=code,
            ) from error
        if how == "done":
            return value
        if how == "refused" and isinstance(value, DepthcutError):
            raise value
        line, traceback, host = value
        self._progress.detail(f"cluster: {traceback}")
        raise ClusterError(f"A worker on {host} failed with {what}: {line}.", code="piece-failed")

    def _refuse_without_room(self) -> None:
        """Waiting is in vain where no machine is left that a worker fits on."""
        cpus = self._allocation.cpus
        if all(there < cpus for there in _nodes(self._ray)):
            raise ClusterError(
                f"No machine with {cpus} CPUs is left in the cluster.",
                "Bring a machine back, and run the command again.",
            )
        stages = {stage for _, stage in self._pending.values()}
        if stages == {"about"} and not self._idle and not self._is_waiting:
            self._is_waiting = True
            self._progress.say(f"cluster: waiting for {cpus} free CPUs for a worker")


def _foreign_folder() -> str | None:
    """The working folder, where this process imports nothing from it.

    Ray lets workers import from it first: a torch.py that lies there would be taken for PyTorch.
    """
    here = str(Path.cwd())
    return None if here in map(os.path.abspath, sys.path) else here


def _cause(error: Exception) -> str:
    """What Ray says of a worker's end, without its guesses at why."""
    text = " ".join(str(error).partition("The actor is dead because")[2].split())
    text = re.split(r" (?:Some common causes|There are some potential)", text)[0]
    return text.partition("exit detail: ")[2].rstrip(". ") or text or first_line(error)


def _refuse_versions(own: dict[str, str], host: str, versions: dict[str, str]) -> None:
    """Other libraries may compute something else: sums of both would be of neither."""
    differ = [f"{n} {versions.get(n, 'missing')} instead of {v}" for n, v in own.items()
              if versions.get(n) != v]  # fmt: skip
    if differ:
        raise ClusterError(
            f"The worker on {host} has {', '.join(differ)}.",
            "Install the same versions on all machines of the cluster, and restart Ray there.",
            code="other-versions",
        )
