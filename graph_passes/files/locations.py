"""Where a model's files may lie: in its folder, or in the blobs of its Hugging Face cache."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

_REPOSITORY_PREFIXES = ("models--", "datasets--", "spaces--")


def real(path: Path) -> Path:
    """Where a path leads, links followed; one in a circle of links leads to itself."""
    return Path(os.path.realpath(path))


def may_lie_at(model: Path, data: Path) -> bool:
    """Whether a data file is where one may be read from, links followed."""
    return may_lie_in(real(model.parent), real(data))


def may_lie_in(folder: Path, place: Path) -> bool:
    """Whether a file is where a model's own may be; both with links followed."""
    return place.is_relative_to(folder) or place.parent == cache_blobs(folder)


def cache_revision(folder: Path) -> str | None:
    """The commit that a folder of the Hugging Face cache stands for; None elsewhere."""
    folder = real(folder)
    return folder.name if cache_blobs(folder) == folder.parent.parent / "blobs" else None


def cache_blobs(folder: Path) -> Path | None:
    """The ``blobs`` folder of the Hugging Face cache that a resolved folder is a snapshot in."""
    for revision in (folder, *folder.parents):
        repository = revision.parent.parent
        is_snapshot = revision.parent.name == "snapshots"
        if is_snapshot and repository.name.startswith(_REPOSITORY_PREFIXES):
            return repository / "blobs"
    return None


def leaves_folder(data: Path) -> bool:
    """Whether a data file is a link to somewhere outside the folder that it is named in."""
    return not real(data).is_relative_to(real(data.parent))


def common_folder(files: Iterable[Path]) -> Path:
    """The lowest folder that holds all files, links followed; there must be one file at least."""
    return Path(os.path.commonpath([real(file).parent for file in files]))
