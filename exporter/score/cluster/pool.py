"""A Ray cluster, workers on it that keep what they have set up, and work handed out to them."""

from __future__ import annotations

import contextlib
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
from typing import Any, TypeVar

from exporter.errors import ClusterError, DepthcutError, first_line
from exporter.files import scratch_folder
from exporter.optional import require
from exporter.progress import QUIET, Progress
from exporter.score.cluster import worker as worker_module
from exporter.score.cluster.worker import versions
from exporter.score.options import LOCAL

S = TypeVar("S")
J = TypeVar("J")
R = TypeVar("R")

LOCAL_WORKERS = 2
ATTEMPTS = 3
"""A piece of work that so many workers were lost with is given up."""
_POLL_S = 10.0


@dataclass(frozen=True)
class Allocation:
    """The workers of a pool."""

    workers: int
    cpus: int

    @property
    def threads(self) -> int:
        """As many as processors, or what ``OMP_NUM_THREADS`` says where the command was given."""
        value = os.environ.get("OMP_NUM_THREADS", "")
        return int(value) if value.isdecimal() and int(value) else self.cpus


def allocate(
    nodes: Sequence[int], workers: int | None, *, local: bool, whole_nodes: bool = False
) -> Allocation:
    """Divides the machines."""
    nodes = sorted((cpus for cpus in nodes if cpus), reverse=True)
    if not nodes:
        raise ClusterError(
            "The Ray cluster has no CPUs.",
            "Start workers: ray start --address.",
            code="too-many-workers",
        )
    if whole_nodes:
        largest = nodes.count(nodes[0])
        return Allocation(min(workers or largest, largest), nodes[0])
    wanted = workers or (min(LOCAL_WORKERS, nodes[0]) if local else len(nodes))
    for cpus in range(nodes[0], 0, -1):
        if sum(node // cpus for node in nodes) >= wanted:
            return Allocation(wanted, cpus)
    raise ClusterError(
        f"{wanted} workers are asked for, but the cluster has {sum(nodes)} CPUs.",
        f"Ask for at most {sum(nodes)}: --ray-workers.",
        code="too-many-workers",
    )


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
    """Workers to be had; see :func:`open_pool`. Ray makes a lost one, and its piece, anew."""

    def __init__(self, ray: Any, allocation: Allocation, progress: Progress = QUIET) -> None:
        self._ray, self._allocation, self._progress = ray, allocation, progress
        self.workers = allocation.workers
        ray.cloudpickle.register_pickle_by_value(worker_module)

    def run(
        self, setup: Callable[[], S], work: Callable[[S, J], R], jobs: Sequence[J]
    ) -> Iterator[tuple[int, R]]:
        """Does some pieces of work on workers that are set up for them alone."""
        ray, own = self._ray, versions()
        task, waiting = ray.put((setup, work)), deque(enumerate(jobs))
        worker = ray.remote(
            num_cpus=self._allocation.cpus,
            max_restarts=-1,
            max_task_retries=ATTEMPTS - 1,
            scheduling_strategy="SPREAD",
        )(worker_module.Worker)
        idle = [
            worker.remote(self._allocation.threads, _foreign_folder())
            for _ in range(min(self.workers, len(jobs)))
        ]
        actors, pending = [*idle], dict[Any, tuple[Any, int]]()
        with contextlib.ExitStack() as stack:
            for actor in actors:
                stack.callback(ray.kill, actor)
            # Ray tells of lost workers on standard output, which is kept for results.
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
            while waiting or pending:
                while idle and waiting:
                    actor, (number, job) = idle.pop(), waiting.popleft()
                    # In a list, so that a worker with other versions can still say which it has.
                    pending[actor.do.remote(own, [task, ray.put(job)])] = actor, number
                ready, _ = ray.wait(list(pending), num_returns=1, timeout=_POLL_S)
                cpus = self._allocation.cpus
                if not ready and all(there < cpus for there in _nodes(ray)):
                    raise ClusterError(
                        f"No machine with {cpus} CPUs is left in the cluster.",
                        "Bring a machine back, and run the command again.",
                    )
                for ref in ready:
                    actor, number = pending.pop(ref)
                    idle.append(actor)
                    name = f"piece {number + 1} of {len(jobs)} ({str(jobs[number])[:100]})"
                    yield number, self._answer(ref, name)

    def _answer(self, ref: Any, what: str) -> Any:
        """What came out."""
        try:
            return self._ray.get(ref)
        except self._ray.exceptions.RayTaskError as error:
            cause = getattr(error, "cause", None) or error
            if isinstance(cause, DepthcutError):
                raise cause from None
            self._progress.detail(f"cluster: {error}")
            raise ClusterError(
                f"A worker failed with {what}: {type(cause).__name__}: {first_line(cause)}.",
                code="piece-failed",
            ) from error
        except self._ray.exceptions.RayError as error:
            raise ClusterError(
                f"{ATTEMPTS} workers in turn were lost with {what}: {_cause(error)}.",
                "Is there memory enough in every worker? Ask for fewer (--ray-workers) or a "
                "smaller --batch-size.",
                code="piece-lost",
            ) from error


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


_OBJECT_STORE_BYTES = 128 << 20
_LONGEST_FOLDER = 43  # Ray's sockets lie 64 bytes below; a socket's path has at most 107.
_PATIENCE_S = 5.0
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else a warning at every start
    "RAY_worker_niceness": "0",  # else 15: anything else that runs here would come first
}
_TOKEN = {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
"""Else Ray writes one into the user's home. It keeps the first that a process gives it."""
_NO_ANSWER_HINT = (
    "Start one with `ray start --head`, give its host:port, and run depthcut on one of its "
    "machines; --ray alone starts one here."
)


@contextlib.contextmanager
def connected(address: str | None, cpus: int, progress: Progress) -> Iterator[Any]:
    """Gives Ray, connected; the connection ends with the block.

    A process that is connected already stays so, whatever the address.
    """
    local = address in (None, LOCAL)
    with _environment(local), contextlib.ExitStack() as stack:
        ray = require("ray", extra="cluster")
        if ray.is_initialized():
            yield ray
            return
        options: dict[str, Any] = {"address": address}
        if local:
            _keep_on_loopback(ray, stack)
            # Ray opens its folder to all users: the one above it keeps them out.
            folder = stack.enter_context(scratch_folder("ray", longest=_LONGEST_FOLDER))
            options = {
                "address": LOCAL,
                "num_cpus": cpus,
                "num_gpus": 0,
                "include_dashboard": False,
                "object_store_memory": _OBJECT_STORE_BYTES,
                "_temp_dir": str(folder),
                "_node_ip_address": "127.0.0.1",
            }
        else:
            _refuse_silence(str(address))
        stack.callback(ray.shutdown)
        where = "start a local Ray cluster" if local else f"connect to the Ray cluster at {address}"
        with progress.task(where), _sigterm_kept():
            try:
                ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
            except (Exception, SystemExit) as error:  # Ray ends the process where it gives up
                text = "Ray does not start here" if local else f"No Ray can be used at {address}"
                raise ClusterError(f"{text}: {first_line(error)}.", _NO_ANSWER_HINT) from error
        yield ray


def _keep_on_loopback(ray: Any, stack: contextlib.ExitStack) -> None:
    """As on Windows; else Ray takes 127.0.0.1 for the machine's outer address.

    Its processes read the variable; this one has read it when Ray was imported.
    """
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    constants, name = ray._private.ray_constants, "ENABLE_RAY_CLUSTER"
    stack.callback(setattr, constants, name, getattr(constants, name, True))
    setattr(constants, name, False)


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
def _environment(local: bool) -> Iterator[None]:
    """Settings that Ray's own processes inherit; what the user has set holds."""
    before = {name: value for name, value in os.environ.items() if name.startswith("RAY_")}
    own_token = local and not any(name.startswith("RAY_AUTH_") for name in before)
    values = _ENVIRONMENT | (_TOKEN if own_token else {})
    os.environ.update(values | before)
    try:
        yield
    finally:
        for name in [name for name in os.environ if name.startswith("RAY_")]:
            del os.environ[name]  # Ray sets some, too
        os.environ.update(before)


@contextlib.contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Ray puts its own handler in the place of the caller's."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
