"""Runs a sample's script with this process's `depthcut`, which has everything imported."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from exporter.cli import run

SAMPLES = Path(__file__).parents[2] / "samples"
_STAND_IN = """\
#!/bin/sh
printf '%s\\0' "$@" > {folder}/arguments
echo > {folder}/asked
read -r code < {folder}/told
cat {folder}/stdout
cat {folder}/stderr >&2
exit "$code"
"""


def run_sample(
    folder: Path, script: str, *arguments: str | Path, **settings: str
) -> subprocess.CompletedProcess[str]:
    """Runs a script of the samples."""
    here = folder / "depthcut-here"
    here.mkdir(exist_ok=True)
    (here / "depthcut").write_text(_STAND_IN.format(folder=here))
    (here / "depthcut").chmod(0o755)
    path = os.pathsep.join([str(here), str(Path(sys.executable).parent), os.environ["PATH"]])
    with mock.patch.dict(os.environ, {**settings, "PATH": path}):
        return _served(here, ["sh", str(SAMPLES / script), *map(str, arguments)])


def _served(here: Path, call: list[str]) -> subprocess.CompletedProcess[str]:
    with (
        _pipe(here / "asked") as result,
        _pipe(here / "told") as outcome,
        (here / "out").open("w+") as out,
        (here / "err").open("w+") as err,
    ):
        process = subprocess.Popen(call, stdout=out, stderr=err)
        while process.poll() is None:
            if select.select([result], [], [], 0.02)[0]:
                os.read(result, 1)
                os.write(outcome, f"{_answered(here)}\n".encode())
    said = ((here / name).read_text() for name in ("out", "err"))
    return subprocess.CompletedProcess(call, process.returncode, *said)


@contextlib.contextmanager
def _pipe(path: Path) -> Iterator[int]:
    """Both ends of a named pipe: whoever opens it meets the other end, and never its close."""
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    pipe = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    try:
        yield pipe
    finally:
        os.close(pipe)


def _answered(here: Path) -> int:
    """The exit code of the command that is asked for."""
    arguments = (here / "arguments").read_text().split("\0")[:-1]
    with (
        (here / "stdout").open("w") as out,
        (here / "stderr").open("w") as err,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        return run(arguments)
