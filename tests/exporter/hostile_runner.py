"""Runs commands one after the other in a process that notes what each does beyond computing.

Called with a JSON file of a list of argument lists; prints a JSON list with, for each, the exit
code, what was said on standard error, and what the interpreter's audit events tell: connections,
names that were looked up, programs that were started, and the files that were opened.
"""

from __future__ import annotations

import contextlib
import io
import json
import signal
import sys
from pathlib import Path
from typing import Any

_NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto")
_PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn")
_LONGEST_S = 60

_seen: dict[str, list[str]] = {"network": [], "programs": [], "opened": []}


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if event in _NETWORK:
        _seen["network"].append(f"{event} {arguments[-1]!r}")
    elif event in _PROGRAMS:
        _seen["programs"].append(f"{event} {arguments[0]!r}")
    elif event == "open" and isinstance(arguments[0], str | bytes):
        name = arguments[0]
        _seen["opened"].append(name if isinstance(name, str) else name.decode(errors="replace"))


def _hang(_signal: int, _frame: object) -> None:
    raise SystemExit("it hung")


def _run(arguments: list[str]) -> dict[str, Any]:
    from exporter.cli import run

    for item in _seen.values():
        item.clear()
    said = io.StringIO()
    signal.signal(signal.SIGALRM, _hang)
    signal.alarm(_LONGEST_S)
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            code: Any = run(arguments)
    except BaseException as error:
        code = repr(error)
    finally:
        signal.alarm(0)
    return {"code": code, "said": said.getvalue(), **{k: list(v) for k, v in _seen.items()}}


if __name__ == "__main__":
    sys.addaudithook(_note)
    told = [_run(item) for item in json.loads(Path(sys.argv[1]).read_text())]
    print(json.dumps(told))
