"""The one door to llama.cpp, by llama-cpp-python: quiet, and with its complaints at hand."""

from __future__ import annotations

import ctypes
from typing import Any

from exporter.optional import require

_WARNING, _ERROR = 3, 4  # ggml.h
_MOST = 16
_SAID: dict[int, list[str]] = {_ERROR: [], _WARNING: []}
_HEARING: dict[str, Any] = {}  # by version; llama.cpp calls it as long as the process lives


def llama_library() -> Any:
    """The module ``llama_cpp``, whose messages go to :func:`said` instead of the terminal."""
    library = require("llama_cpp", extra="llama-cpp")
    library.llama_backend_init()
    hearing = _HEARING.setdefault(library.__version__, library.llama_log_callback(_hear))
    library.llama_log_set(hearing, ctypes.c_void_p(0))
    forget_said()
    return library


def forget_said() -> None:
    """Drops what llama.cpp has told; before a call whose failure is to be explained."""
    for texts in _SAID.values():
        texts.clear()


def said() -> str:
    """The first error that llama.cpp has told of, else its first warning, behind a colon.

    Empty for neither.
    """
    text = next((texts[0] for texts in _SAID.values() if texts), "")
    return f": {text.rstrip('.')}" if text else ""


def _hear(level: int, text: bytes, _user: Any) -> None:
    texts = _SAID.get(level)
    if texts is not None and text.strip() and len(texts) < _MOST:
        texts.append(text.decode(errors="replace").strip())
