"""Commands in forks of one process that has everything imported."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import select
import shlex
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

_LIBRARIES = (
    "scipy.stats", "rich.progress", "jinja2", "tokenizers", "yaml", "safetensors.torch", "torch",
    "onnx_ir.passes.common", "transformers.generation", "onnxscript",
    "transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama",
    "transformers.models.bert.modeling_bert", "torch.onnx._internal.exporter._core",
)  # fmt: skip
_NOT_IMPORTED = (".__main__", ".worker", "pytest_plugin", "entry_points.__init__")
BROKEN = 99
"""What a fork ends with that raised."""


def warm_up() -> None:
    """Imports what commands need, the way that they do, and runs nothing."""
    import exporter
    from exporter.optional import require

    sys.dont_write_bytecode = True
    require("onnxruntime", extra="cpu")
    root = Path(exporter.__path__[0])
    files = (path.relative_to(root.parent).with_suffix("") for path in sorted(root.rglob("*.py")))
    for name in (*_LIBRARIES, *(".".join(file.parts) for file in files)):
        if not name.endswith(_NOT_IMPORTED):
            with contextlib.suppress(ImportError):
                importlib.import_module(name.removesuffix(".__init__"))
    gc.collect()
    gc.freeze()


def depthcut(line: str) -> int:
    """Runs a command line in this process."""
    from exporter.cli import run

    sys.argv = ["depthcut", *shlex.split(line)]
    return run(sys.argv[1:])


def start(
    task: Callable[[], int], work: Path, streams: tuple[Path, Path], environment: Mapping[str, str]
) -> int:
    """Starts a task in a fork, in a group of its own; its streams may be one file."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = BROKEN
    try:
        os.setpgid(0, 0)
        for number, path in enumerate(streams, start=1):
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND
            handle = os.open(path, flags, 0o644)
            os.dup2(handle, number)
            os.close(handle)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", closefd=False) for n in (1, 2))  # under pytest
        os.environ.clear()
        os.environ.update(environment)
        tempfile.tempdir = environment.get("TMPDIR")  # else Python tries it out
        os.chdir(work)
        code = task()
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def ends(pid: int, seconds: float, meanwhile: Callable[[], None] | None = None) -> bool:
    """Whether a process ends within a time; what is to be done meanwhile is done every 2 ms."""
    end, handle = time.monotonic() + seconds, os.pidfd_open(pid)
    try:
        while (left := end - time.monotonic()) > 0:
            if select.select([handle], [], [], 0.002 if meanwhile else left)[0]:
                return True
            if meanwhile:
                with contextlib.suppress(OSError):
                    meanwhile()
        return False
    finally:
        os.close(handle)
