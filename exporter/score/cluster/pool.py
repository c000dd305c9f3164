"""Workers on a Ray cluster that keep what they have set up, and pieces of work handed out to them.

Every piece's result is taken exactly once, whatever becomes of the worker that had it first: a lost
worker is replaced, and its piece is given to the next one that is free.
"""

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
from exporter.score.cluster.allocation import Allocation, allocate
from exporter.score.cluster.connection import connected
from exporter.score.cluster.options import LOCAL
from exporter.score.cluster.worker import versions

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
    workers: int | None = None,
    whole_nodes: bool = False,
    progress: Progress = QUIET,
) -> Iterator[Pool]:
    """Connects to a Ray cluster, or starts a local one that ends with the block.

    Ray runs what it is sent, and has no passwords unless it was started with them: give it only
    clusters that you trust.

    Args:
        address: ``host:port``, ``auto``, or None (or ``local``) for a cluster on this machine.
        workers: How many processes; None: one on each machine, two on a local cluster.
        whole_nodes: A worker has a machine for itself, as timings need it: at most one on each of
            the machines with the most processors.
        progress: Told what goes on.

    Raises:
        MissingDependencyError: Ray is not installed.
        ClusterError: No cluster answers, or it has too few processors.
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
    """Workers to be had; see :func:`open_pool`.

    Args:
        ray: The connected module.
        allocation: How many workers, and what each has.
        progress: Told of lost workers.

    Attributes:
        workers: How many there are at once.
    """

    def __init__(self, ray: Any, allocation: Allocation, progress: Progress = QUIET) -> None:
        self._ray, self._allocation, self._progress = ray, allocation, progress
        self.workers = allocation.workers
        ray.cloudpickle.register_pickle_by_value(worker_module)

    def run(
        self, setup: Callable[[], S], work: Callable[[S, J], R], jobs: Sequence[J]
    ) -> Iterator[tuple[int, R]]:
        """Does some pieces of work on workers that were set up for them alone.

        Args:
            setup: Makes what every worker keeps, such as a loaded model; runs once in each.
            work: Does one piece.
            jobs: The pieces; an error names one by its ``str``.

        Yields:
            Each piece's number and result, as they come.

        Raises:
            DepthcutError: What a worker raised, as it raised it.
            ClusterError: The workers don't fit, a piece was lost again and again, or a worker
                raised something else.
        """
        with self.group(setup) as group:
            yield from group.run(work, jobs)

    @contextlib.contextmanager
    def group(self, setup: Callable[[], S]) -> Iterator[WorkerGroup[S]]:
        """Workers that stay set up for several rounds of work, until the block ends.

        Args:
            setup: Makes what every worker keeps; runs once in each.
        """
        group: WorkerGroup[S] = WorkerGroup(self._ray, self._allocation, setup, self._progress)
        try:
            yield group
        finally:
            group.close()


@dataclass(eq=False)
class _GroupWorker:
    """One worker.

    Attributes:
        actor: Ray's handle.
        host: Where it runs, once known.
        pending: What it was asked last; None when it is free.
        stage: What that was: ``about``, ``begin``, or a piece's number.
    """

    actor: Any
    host: str = "a machine that is not known yet"
    pending: Any = None
    stage: str | int = "about"


class WorkerGroup(Generic[S]):
    """Workers with their state; see :meth:`Pool.group`.

    Args:
        ray: The connected module.
        allocation: How many workers, and what each has.
        setup: Makes the state.
        progress: Told of lost workers.
    """

    def __init__(
        self, ray: Any, allocation: Allocation, setup: Callable[[], S], progress: Progress = QUIET
    ) -> None:
        self._ray, self._allocation, self._setup, self._progress = ray, allocation, setup, progress
        self._own = versions()
        self._actor = ray.remote(
            num_cpus=allocation.cpus, max_restarts=0, scheduling_strategy="SPREAD"
        )(worker_module.Worker)
        self._members: list[_GroupWorker] = []
        self._failed_starts = 0
        self._told_to_wait = False

    @property
    def workers(self) -> int:
        """How many there are at once."""
        return self._allocation.workers

    def run(self, work: Callable[[S, J], R], jobs: Sequence[J]) -> Iterator[tuple[int, R]]:
        """Does some pieces of work; see :meth:`Pool.run`."""
        round_ = _Round(work, jobs)
        while len(self._members) < min(self.workers, len(jobs)):
            self._members.append(self._started())
        try:
            while round_.open:
                for member in self._members:
                    if member.pending is None and round_.waiting:
                        self._give(member, round_)
                yield from self._collected(round_)
        finally:
            self._drop_busy()

    def close(self) -> None:
        """Ends all workers."""
        for member in list(self._members):
            self._end(member)

    def _started(self) -> _GroupWorker:
        member = _GroupWorker(self._actor.remote(_foreign_folder()))
        member.pending = member.actor.about.remote()
        return member

    def _end(self, member: _GroupWorker) -> None:
        self._members.remove(member)
        self._ray.kill(member.actor)

    def _give(self, member: _GroupWorker, round_: _Round) -> None:
        number = round_.waiting.popleft()
        member.stage = number
        member.pending = member.actor.do.remote(round_.work, round_.jobs[number])

    def _collected(self, round_: _Round) -> Iterator[tuple[int, Any]]:
        """Waits until something has happened."""
        asked = {m.pending: m for m in self._members if m.pending is not None}
        ready, _ = self._ray.wait(list(asked), num_returns=1, timeout=_POLL_S)
        if not ready:
            self._refuse_without_room()
        for ref in ready:
            member = asked[ref]
            try:
                answer = self._ray.get(ref)
            except self._ray.exceptions.RayTaskError as error:
                raise _unanswered(error, member, round_) from error
            except self._ray.exceptions.RayError as error:
                self._replace(member, error, round_)
                continue
            stage, member.pending = member.stage, None
            if isinstance(stage, int):
                yield stage, self._result(answer, member, round_.name(stage))
                round_.open -= 1
            else:
                self._go_on(member, answer)

    def _go_on(self, member: _GroupWorker, answer: Any) -> None:
        """After a worker has said what it is, or has set itself up."""
        try:
            if member.stage == "about":
                member.host = answer["host"]
                _refuse_versions(self._own, answer["versions"], member.host)
                member.stage = "begin"
                member.pending = member.actor.begin.remote(self._setup, self._allocation.threads)
            else:
                self._result(answer, member, "its setup")
                self._failed_starts = 0
        except DepthcutError:
            self._end(member)  # it must get no work, if the caller goes on
            raise

    def _result(self, answer: worker_module.Outcome, member: _GroupWorker, what: str) -> Any:
        """What came out.

        Raises:
            DepthcutError: What the worker raised.
            ClusterError: It raised something else.
        """
        how, value = answer
        if how == "done":
            return value
        if how == "refused" and isinstance(value, DepthcutError):
            raise value
        line, traceback = value
        self._progress.detail(f"cluster: {traceback}")
        raise ClusterError(
            f"A worker on {member.host} failed with {what}: {line}.", code="piece-failed"
        )

    def _replace(self, member: _GroupWorker, error: Exception, round_: _Round) -> None:
        """Hires another worker for a lost one, and puts its piece first in the line."""
        cause = _cause(error)
        self._end(member)  # one that only can't be reached may still be at it
        if isinstance(member.stage, int):
            round_.lost(member.stage, cause)
            what = round_.name(member.stage)
        else:
            self._failed_starts += 1
            what = "its setup"
            if self._failed_starts >= ATTEMPTS:
                raise ClusterError(
                    f"{ATTEMPTS} workers in turn were lost before they had begun, the last on "
                    f"{member.host}: {cause}.",
                    "Is there memory enough for the model in every worker? Ask for fewer: "
                    "--ray-workers.",
                    code="workers-lost",
                )
        self._progress.say(f"cluster: a worker on {member.host} was lost with {what}; tried again")
        self._progress.detail(f"cluster: {cause}")
        self._members.append(self._started())

    def _refuse_without_room(self) -> None:
        """Waiting is in vain where no machine is left that a worker fits on."""
        if all(cpus < self._allocation.cpus for cpus in _nodes(self._ray)):
            raise ClusterError(
                f"No machine with {self._allocation.cpus} CPUs is left in the cluster.",
                "Bring a machine back, and run the command again.",
            )
        if all(m.stage == "about" for m in self._members) and not self._told_to_wait:
            self._told_to_wait = True
            self._progress.say(
                f"cluster: waiting for {self._allocation.cpus} free CPUs for a worker"
            )

    def _drop_busy(self) -> None:
        """A round that was broken off leaves workers at work that nobody waits for."""
        for member in [m for m in self._members if m.pending and isinstance(m.stage, int)]:
            self._end(member)


class _Round:
    """The pieces of one call.

    Attributes:
        work: Does one.
        jobs: All of them.
        waiting: Numbers of those that no worker has.
        open: How many have no result yet.
    """

    def __init__(self, work: Callable[[Any, Any], Any], jobs: Sequence[Any]) -> None:
        self.work, self.jobs = work, jobs
        self.waiting = deque(range(len(jobs)))
        self.open = len(jobs)
        self._lost = [0] * len(jobs)

    def name(self, number: int) -> str:
        """One piece in words."""
        return f"piece {number + 1} of {len(self.jobs)} ({str(self.jobs[number])[:100]})"

    def lost(self, number: int, cause: str) -> None:
        """Puts a piece first in the line.

        Raises:
            ClusterError: It was lost too often.
        """
        self._lost[number] += 1
        if self._lost[number] >= ATTEMPTS:
            raise ClusterError(
                f"{ATTEMPTS} workers in turn were lost with {self.name(number)}: {cause}.",
                "Is there memory enough? Ask for fewer workers (--ray-workers) or a smaller "
                "--batch-size.",
                code="piece-lost",
            )
        self.waiting.appendleft(number)


def _foreign_folder() -> str | None:
    """The working folder, where this process imports nothing from it.

    Ray lets workers import from it first: a torch.py that lies there would be taken for PyTorch.
    """
    here = str(Path.cwd())
    return None if here in map(os.path.abspath, sys.path) else here


def _unanswered(error: Exception, member: _GroupWorker, round_: _Round) -> ClusterError:
    """The worker lives, but what it did can't be sent."""
    what = round_.name(member.stage) if isinstance(member.stage, int) else "its setup"
    told = first_line(getattr(error, "cause", None) or error)
    return ClusterError(
        f"A worker on {member.host} can't tell what came of {what}: {told}.", code="answer-lost"
    )


def _cause(error: Exception) -> str:
    """What Ray says of a worker's end, without its guesses at why."""
    told = " ".join(str(error).partition("The actor is dead because")[2].split())
    told = re.split(r" (?:Some common causes|There are some potential)", told)[0]
    return told.partition("exit detail: ")[2].rstrip(". ") or told or first_line(error)


def _refuse_versions(own: dict[str, str], theirs: dict[str, str], host: str) -> None:
    """Other libraries may compute something else: sums of both would be of neither.

    Raises:
        ClusterError: A version differs.
    """
    differ = [f"{n} {theirs.get(n, 'missing')} instead of {v}" for n, v in own.items()
              if theirs.get(n) != v]  # fmt: skip
    if differ:
        raise ClusterError(
            f"The worker on {host} has {', '.join(differ)}.",
            "Install the same versions on all machines of the cluster, and restart Ray there.",
            code="other-versions",
        )
