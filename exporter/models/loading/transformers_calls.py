"""How transformers is called here: off the network, and without a word on the user's terminal.

A model's files can name other models, and transformers asks the hub for some things of its own
accord, with the user's token. Whatever a load needs is on the disk: a hub id is fetched before, as
a snapshot.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

from exporter.optional import require

_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}  # fmt: skip
# Read from the environment once, at import; transformers 4.57 keeps a copy of its own.
_FLAGS = {
    "huggingface_hub.constants": (
        "HF_HUB_OFFLINE", "HF_HUB_DISABLE_IMPLICIT_TOKEN", "HF_HUB_DISABLE_TELEMETRY",
    ),
    "transformers.utils.hub": ("_is_offline_mode",),
}  # fmt: skip

_LOCK = threading.Lock()
_inside = 0
_restoring = contextlib.ExitStack()


@contextlib.contextmanager
def hub_off() -> Iterator[None]:
    """Makes every request to the hub an error while the block runs, and hides the user's token.

    It holds for the whole process; where blocks overlap, the last one restores what was.
    """
    global _inside, _restoring
    with _LOCK:
        if _inside == 0:
            _restoring = _switched_off()
        _inside += 1
    try:
        yield
    finally:
        with _LOCK:
            _inside -= 1
            if _inside == 0:
                _restoring.close()


def _switched_off() -> contextlib.ExitStack:
    """All switches set; closing what is given sets them as they were."""
    for name in _FLAGS:  # imported before, or they would keep what they find in the block
        require(name, extra="torch")
    stack = contextlib.ExitStack()
    stack.callback(_forget_sessions)
    for name, value in _ENVIRONMENT.items():
        stack.callback(_set_variable, name, os.environ.get(name))
        os.environ[name] = value
    for module_name, flags in _FLAGS.items():
        module: Any = sys.modules[module_name]
        for flag in flags:
            if hasattr(module, flag):
                stack.callback(setattr, module, flag, getattr(module, flag))
                setattr(module, flag, True)
    _forget_sessions()
    return stack


def _set_variable(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def _forget_sessions() -> None:
    """Sessions of huggingface_hub before 1.0 are made online or offline, and kept."""
    http: Any = sys.modules.get("huggingface_hub.utils._http")
    forget = getattr(http, "reset_sessions", None)
    if forget is not None:
        forget()


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keeps transformers' bars and advice off the terminal; errors still come as exceptions."""
    logging = require("transformers.utils.logging", extra="torch")
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with _quiet_gguf_bar():
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _quiet_gguf_bar() -> Iterator[None]:
    # The GGUF reader draws its bar with tqdm itself, past transformers' own switch.
    reader: Any = require("transformers.modeling_gguf_pytorch_utils", extra="torch")
    bar = reader.tqdm
    reader.tqdm = lambda items, **_: items
    try:
        yield
    finally:
        reader.tqdm = bar
