"""To a Ray cluster and back: a local one that ends with the block, or one that is there."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import secrets
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

from exporter.errors import ClusterError, first_line
from exporter.files import scratch_folder
from exporter.optional import require
from exporter.progress import Progress
from exporter.score.cluster.options import LOCAL

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
