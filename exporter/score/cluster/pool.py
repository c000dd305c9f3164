"""A Ray cluster, its workers that keep what they have set up, and work handed out to them."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import secrets
import signal
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from exporter.errors import ClusterError, DepthcutError, first_line
from exporter.files import scratch_folder
from exporter.optional import require
from exporter.progress import QUIET, Progress
from exporter.score.cluster import worker as worker_module
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


_OBJECT_STORE_BYTES = 128 << 20
_LONGEST_FOLDER = 43  # Ray's sockets lie 64 bytes below; a socket's path has at most 107.
_PATIENCE_S = 5.0
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else a warning at every start
    "RAY_worker_niceness": "0",  # else 15: anything else that runs here would come first
}
_AUTH = "RAY_AUTH_"
_NO_ANSWER_HINT = (
    "Start one with `ray start --head`, give its host:port, and run depthcut on one of its "
    "machines; --ray alone starts one here."
)


@contextlib.contextmanager
def connected(address: str | None, cpus: int, progress: Progress) -> Iterator[Any]:
    """Gives Ray, connected; the connection ends with the block.

    A process that is connected already stays so, whatever the address.
    """
    with _environment(_ENVIRONMENT):
        ray = require("ray", extra="cluster")
        if ray.is_initialized():
            yield ray
            return
        with contextlib.ExitStack() as stack:
            # Ray tells of lost workers on standard output, which is kept for results.
            silent = _inside(ray, "worker", "print_to_stdstream", lambda *_args, **_kwargs: None)
            stack.enter_context(silent)
            if address in (None, LOCAL):
                with progress.task("start a local Ray cluster"):
                    _start(ray, cpus, stack)
            else:
                with progress.task(f"connect to the Ray cluster at {address}"):
                    _connect(ray, str(address), stack)
            yield ray


def _start(ray: Any, cpus: int, stack: contextlib.ExitStack) -> None:
    stack.enter_context(_this_machine_only(ray))
    stack.enter_context(_own_token())
    # Ray opens its folder to all users: the one above it keeps them out.
    folder = stack.enter_context(scratch_folder("ray", longest=_LONGEST_FOLDER))
    stack.callback(ray.shutdown)
    try:
        with _signals_kept():
            ray.init(
                address=LOCAL,
                num_cpus=cpus,
                num_gpus=0,
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=str(folder),
                _node_ip_address="127.0.0.1",
            )
    except Exception as error:
        raise ClusterError(f"Ray does not start here: {first_line(error)}.") from error


def _connect(ray: Any, address: str, stack: contextlib.ExitStack) -> None:
    _refuse_silence(address)
    stack.callback(ray.shutdown)
    try:
        with _signals_kept():
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (Exception, SystemExit) as error:  # Ray ends the process where it gives up
        raise ClusterError(
            f"No Ray cluster can be used at {address}: {first_line(error)}.", _NO_ANSWER_HINT
        ) from error


def _refuse_silence(address: str) -> None:
    """At once, where Ray itself waits for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), _PATIENCE_S).close()
    except (OSError, OverflowError) as error:
        raise ClusterError(
            f"Nothing answers at {address}: {first_line(error)}.", _NO_ANSWER_HINT, code="no-answer"
        ) from error


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Settings that Ray's own processes inherit; what the user has set holds."""
    new = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            os.environ.pop(name, None)


@contextlib.contextmanager
def _own_token() -> Iterator[None]:
    """Only this process may use the cluster, where Ray knows tokens.

    Without one it writes its own into the user's home. It keeps the first that it was given, so
    there is one a process.
    """
    if any(name.startswith(_AUTH) for name in os.environ):
        yield
        return
    with _environment({f"{_AUTH}TOKEN": _token()}):
        try:
            yield
        finally:
            os.environ.pop(f"{_AUTH}MODE", None)  # set by Ray


@functools.cache
def _token() -> str:
    return secrets.token_hex(32)


@contextlib.contextmanager
def _this_machine_only(ray: Any) -> Iterator[None]:
    """As Ray does on Windows; else it takes 127.0.0.1 for the machine's outer address."""
    with (
        _environment({"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}),
        _inside(ray, "ray_constants", "ENABLE_RAY_CLUSTER", False),
    ):
        yield


@contextlib.contextmanager
def _inside(ray: Any, module: str, name: str, value: object) -> Iterator[None]:
    """Another value for one of Ray's own names, where this Ray has it."""
    place = getattr(getattr(ray, "_private", None), module, None)
    if not hasattr(place, name):
        yield
        return
    before = getattr(place, name)
    setattr(place, name, value)
    try:
        yield
    finally:
        setattr(place, name, before)


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray puts its own handler in the place of the caller's."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None:  # None: set by no Python code
            signal.signal(signal.SIGTERM, before)
