"""What other libraries print, log and warn, told to a listener instead of the terminal."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from io import StringIO

from exporter.progress import Progress

_LOGGERS = ("torch", "onnxscript", "onnx_ir", "optimum", "transformers")


class _Details(logging.Handler):
    """Passes log records on as details."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self._progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        """One line a record."""
        self._progress.detail(f"{record.name}: {record.getMessage()}")


@contextlib.contextmanager
def told_to(progress: Progress) -> Iterator[None]:
    """Turns what libraries print, log and warn into details."""
    printed = StringIO()
    handler = _Details(progress)
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(printed))
        stack.enter_context(contextlib.redirect_stderr(printed))
        caught = stack.enter_context(warnings.catch_warnings(record=True))
        for logger in _loggers():
            stack.enter_context(_only_handler(logger, handler))
        try:
            yield
        finally:
            for line in (*printed.getvalue().splitlines(), *(str(w.message) for w in caught)):
                progress.detail(line)


def _loggers() -> list[logging.Logger]:
    """The libraries' loggers, and those below them that have handlers of their own.

    Without PyTorch's ``__trace`` loggers: they are silent unless someone listens, and slow then.
    """
    named = [logging.getLogger(name) for name in list(logging.root.manager.loggerDict)]
    ours = [logger for logger in named if logger.name.partition(".")[0] in _LOGGERS]
    return [
        logger
        for logger in ours
        if logger.name in _LOGGERS or (logger.handlers and "__" not in logger.name)
    ]


@contextlib.contextmanager
def _only_handler(logger: logging.Logger, handler: logging.Handler) -> Iterator[None]:
    before, propagate = list(logger.handlers), logger.propagate
    logger.handlers, logger.propagate = [handler], False
    try:
        yield
    finally:
        logger.handlers, logger.propagate = before, propagate
