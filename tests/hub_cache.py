"""A model in the layout of Hugging Face's cache: links into a folder of blobs."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

REVISION = "0123456789abcdef0123456789abcdef01234567"


def into_cache(folder: Path, cache: Path, *, subfolder: str = "onnx") -> Path:
    """Moves a folder's files into a cache, and gives the folder of links that stands for them."""
    repository = cache / "models--owner--name"
    snapshot = repository / "snapshots" / REVISION / subfolder
    blobs = repository / "blobs"
    for made in (snapshot, blobs):
        made.mkdir(parents=True)
    up = Path(*[".."] * len(snapshot.relative_to(repository).parts))
    for file in sorted(folder.iterdir()):
        name = hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.move(file, blobs / name)
        (snapshot / file.name).symlink_to(up / "blobs" / name)
    return snapshot
