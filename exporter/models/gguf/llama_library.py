"""The one door to llama.cpp, by llama-cpp-python: quiet, and with its complaints at hand."""

from __future__ import annotations

import ctypes
from typing import Any

from exporter.optional import require

_WARNING, _ERROR = 3, 4  # ggml.h
_MOST = 16
_SAID: list[str] = []
_HEARING: dict[str, Any] = {}  # by version; llama.cpp calls it as long as the process lives


def llama_library() -> Any:
    """The module ``llama_cpp``, whose messages go to :func:`said` instead of the terminal.

    Raises:
        MissingDependencyError: Without llama-cpp-python.
    """
    library = require("llama_cpp", extra="llama-cpp")
    library.llama_backend_init()
    hearing = _HEARING.setdefault(library.__version__, library.llama_log_callback(_hear))
    library.llama_log_set(hearing, ctypes.c_void_p(0))
    _SAID.clear()
    return library


def said() -> str:
    """What llama.cpp has told first of what went wrong, behind a colon; empty for nothing."""
    return f": {_SAID[0].rstrip('.')}" if _SAID else ""


def _hear(level: int, text: bytes, _user: Any) -> None:
    if level in (_WARNING, _ERROR) and text.strip() and len(_SAID) < _MOST:
        _SAID.append(text.decode(errors="replace").strip())
