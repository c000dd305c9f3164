"""Parses a GGUF file's header once for a whole load.

transformers parses the header anew for the config, the tokenizer and the weights, and builds
gguf's table of tensor names for every module of the model: most of the time of a load. What is
read and how it is understood stays transformers' and gguf's own.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from exporter.optional import require

__all__ = ["header_read_once"]

_CHANGED = threading.RLock()


@contextlib.contextmanager
def header_read_once() -> Iterator[None]:
    """Lets gguf's readers and tables of names take over what an equal one has worked out before.

    Nothing is kept past the end. A gguf whose classes are not as expected works as ever, slowly.
    Loads in several threads wait for each other.
    """
    gguf = require("gguf", extra="gguf")
    with _CHANGED, contextlib.ExitStack() as stack:
        for name in ("GGUFReader", "TensorNameMap"):
            kind = getattr(gguf, name, None)
            if _is_plain_class(kind):
                stack.enter_context(_replaced(kind, "__init__", _once(kind)))
                stack.enter_context(_replaced(kind, "__setattr__", _set_without_memmap))
        yield


def _is_plain_class(kind: Any) -> bool:
    """Whether all that an instance knows stands in its ``__dict__``."""
    if not isinstance(kind, type) or kind.__dictoffset__ == 0:
        return False
    return not any(
        own in vars(base) for base in kind.__mro__[:-1] for own in ("__slots__", "__setattr__")
    )


def _once(kind: Any) -> Any:
    """The class's ``__init__``, which runs once for the same arguments."""
    real = kind.__init__
    known: dict[Any, dict[str, Any]] = {}

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        key = (args, tuple(kwargs.items()))
        if type(self) is not kind or not _is_hashable(key):
            real(self, *args, **kwargs)
            return
        if key not in known:
            real(self, *args, **kwargs)
            known[key] = vars(self).copy()
        vars(self).update(known[key])

    return init


def _is_hashable(key: Any) -> bool:
    try:
        hash(key)
    except TypeError:
        return False
    return True


def _set_without_memmap(self: Any, name: str, value: Any) -> None:
    # Slicing numpy's memmap costs several times what slicing a plain array over the same bytes
    # does, and a vocabulary is hundreds of thousands of slices.
    object.__setattr__(self, name, np.asarray(value) if isinstance(value, np.memmap) else value)


@contextlib.contextmanager
def _replaced(kind: Any, name: str, value: Any) -> Iterator[None]:
    own = vars(kind).get(name)
    setattr(kind, name, value)
    try:
        yield
    finally:
        if own is None:
            delattr(kind, name)
        else:
            setattr(kind, name, own)
