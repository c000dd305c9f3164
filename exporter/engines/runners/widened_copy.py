"""A bfloat16 file's copy in float32, for a runtime that has no kernels for bfloat16."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path

from exporter.engines.runners.base import Capabilities
from exporter.progress import Progress
from exporter.scratch import scratch_folder


class WidenedCopy:
    """A copy in a folder of its own, which goes when nobody holds the copy any more.

    Args:
        model: The ONNX file; its weights go into the copy in float32, at twice their size.
        beside: Puts that folder beside the file, and not where temporary files are, which may be
            small or memory.

    Attributes:
        file: The copy.

    Raises:
        OnnxFileError: The file can't be read, or the disk is full.
    """

    def __init__(self, model: Path, *, beside: bool = False) -> None:
        from exporter.engines.widening import in_float32
        from graph_passes.files.storage import load_model, save_model

        leave = contextlib.ExitStack()
        self._gone = weakref.finalize(self, leave.close)
        self.file = leave.enter_context(_folder(model if beside else None)) / "model.onnx"
        save_model(in_float32(load_model(model)), self.file)

    def __enter__(self) -> Path:
        """The copy's path."""
        return self.file

    def __exit__(self, *exc_info: object) -> None:
        """Removes the copy."""
        self._gone()


@contextlib.contextmanager
def _folder(beside: Path | None) -> Iterator[Path]:
    if beside is None:
        with scratch_folder("float32") as folder:
            yield folder
        return
    folder = Path(tempfile.mkdtemp(prefix=".depthcut.", dir=beside.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def is_bfloat16(model: Path) -> bool:
    """Whether anything in an ONNX file is bfloat16.

    Raises:
        OnnxFileError: The file can't be read.
    """
    from exporter.engines.widening import has_bfloat16
    from graph_passes.files.storage import load_model

    return has_bfloat16(load_model(model))


def tell_widened(capabilities: Iterable[Capabilities], progress: Progress) -> None:
    """Says so where one of them runs such a copy.

    Args:
        capabilities: Of entered runners or decoders.
        progress: Who is told.
    """
    if any(each.widened for each in capabilities):
        progress.say("ONNX Runtime's CPU has no bfloat16 kernels: the same weights run in float32")
