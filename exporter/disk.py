"""A full disk, told as one by whatever library was writing when it filled up."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from exporter.errors import error_chain

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""No room, a quota, or a limit on files."""
# safetensors and tokenizers are written in Rust: the number is in the text only.
_RUST_ERROR = re.compile(r"\(os error (\d+)\)")
# numpy counts what its write took and does not look at why it stopped.
_SHORT_WRITE = re.compile(r"\d+ requested and \d+ written")


@contextlib.contextmanager
def telling_full_disk(path: Path) -> Iterator[None]:
    """Turns any library's way to say that it could not write any more into one ``OSError``.

    An error that was made from such an error counts as well, whatever its class.

    Args:
        path: What the error names: the file or folder that is written in the block.

    Raises:
        OSError: With ``errno`` (``ENOSPC``; ``EDQUOT`` or ``EFBIG`` where a quota or a limit was
            met), its text and the path. Other errors pass as they are.
    """
    try:
        yield
    except Exception as error:
        number = _full_disk_errno(error)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def _full_disk_errno(error: BaseException) -> int | None:
    return next(filter(None, map(_own_errno, error_chain(error))), None)


def _own_errno(error: BaseException) -> int | None:
    told = _RUST_ERROR.search(str(error))
    number = int(told[1]) if told else getattr(error, "errno", None)
    if isinstance(error, OSError) and number is None and _SHORT_WRITE.search(str(error)):
        number = errno.ENOSPC
    return number if number in FULL else None
