"""What fails in a library that gets its tasks from the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from exporter.errors import DepthcutError, TaskError, first_line, pass_on_memory_error


@contextmanager
def failing_as_task(library: str, what: str, hint: str) -> Iterator[None]:
    """Runs a library that scores tasks; what it raises becomes an error of the task.

    Data sets, templates, tasks and the hub raise classes of their own. Our own errors pass, and so
    does a want of memory.

    Args:
        library: As users call it; the error's code is its name with ``-failed``.
        what: What it was to score.
        hint: What to do.
    """
    try:
        yield
    except DepthcutError:
        raise
    except Exception as error:
        pass_on_memory_error(error)
        raise TaskError(
            f"{library} can't score {what}: {first_line(error)}.", hint, code=f"{library}-failed"
        ) from error
