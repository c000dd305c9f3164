"""Where a model's files may lie: in its folder, or in the blobs of its Hugging Face cache.

The cache (huggingface_hub's "file-based cache") holds each file once, named by its hash, and each
revision as a folder of links to them::

    models--owner--name/blobs/<hash>
    models--owner--name/snapshots/<revision>/onnx/model.onnx -> ../../../blobs/<hash>

Such links leave the model's folder, which onnx, onnx_ir and ONNX Runtime refuse to follow. They are
followed here as far as the blobs of the same repository and no further.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

_REPOSITORY_PREFIXES = ("models--", "datasets--", "spaces--")


def real(path: Path) -> Path:
    """Where a path leads, links followed; one in a circle of links leads to itself."""
    return Path(os.path.realpath(path))


def may_lie_at(model: Path, data: Path) -> bool:
    """Whether a data file is where one may be read from, links followed.

    Args:
        model: The ONNX file as it was named; it may be a link itself.
        data: The data file that it names, in the same folder or below.
    """
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
