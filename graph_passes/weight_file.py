"""External data files: weights copied from file to file without passing through memory."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import TracebackType
from typing import Self

import onnx_ir as ir

_ALIGNMENT = 64
_PIECE_BYTES = 8 << 20
_NO_KERNEL_COPY = {errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM}


class WeightWriter:
    """Writes one data file; the same bytes of the same source are written once.

    Attributes:
        size: How many bytes the file has so far.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._places: dict[tuple[str, int, int] | int, int] = {}
        self._kernel_copy = hasattr(os, "copy_file_range")

    def __enter__(self) -> Self:
        """Creates the file."""
        self._file = self.path.open("wb", buffering=0)
        self._sources: dict[str, int] = {}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes all files."""
        for handle in self._sources.values():
            os.close(handle)
        self._file.close()

    def add(self, tensor: ir.TensorProtocol) -> ir.ExternalTensor:
        """Writes a tensor's content, aligned to 64 bytes.

        Args:
            tensor: In memory or in another data file; its shape and type are kept.

        Returns:
            The tensor in this file.
        """
        key = _identity(tensor)
        if key not in self._places:
            self._places[key] = self._append(tensor)
        return ir.ExternalTensor(
            location=self.path.name,
            offset=self._places[key],
            length=tensor.nbytes,
            dtype=tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=tensor.name or "",
            doc_string=tensor.doc_string,
            base_dir=self.path.parent,
        )

    def _append(self, tensor: ir.TensorProtocol) -> int:
        offset = -(-self.size // _ALIGNMENT) * _ALIGNMENT
        self._file.seek(offset)
        if isinstance(tensor, ir.ExternalTensor):
            self._copy(tensor)
        else:
            _write_all(self._file.fileno(), tensor.tobytes())
        self.size = offset + tensor.nbytes
        return offset

    def _copy(self, tensor: ir.ExternalTensor) -> None:
        source = self._source(tensor.path)
        position, left = tensor.offset or 0, tensor.nbytes
        while left:
            copied = self._copy_piece(source, position, left)
            if not copied:
                raise OSError(errno.EIO, f"{tensor.path} ends too early")
            position, left = position + copied, left - copied

    def _copy_piece(self, source: int, position: int, left: int) -> int:
        if self._kernel_copy:
            try:
                return os.copy_file_range(source, self._file.fileno(), left, position)
            except OSError as error:
                if error.errno not in _NO_KERNEL_COPY:
                    raise
                self._kernel_copy = False
        piece = os.pread(source, min(left, _PIECE_BYTES), position)
        _write_all(self._file.fileno(), piece)
        return len(piece)

    def _source(self, path: str) -> int:
        if path not in self._sources:
            self._sources[path] = os.open(path, os.O_RDONLY)
        return self._sources[path]


def _identity(tensor: ir.TensorProtocol) -> tuple[str, int, int] | int:
    if isinstance(tensor, ir.ExternalTensor):
        return tensor.path, tensor.offset or 0, tensor.nbytes
    return id(tensor)


def _write_all(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]


def read_bytes(tensor: ir.ExternalTensor) -> bytes:
    """A small external tensor's content."""
    handle = os.open(tensor.path, os.O_RDONLY)
    try:
        return os.pread(handle, tensor.nbytes, tensor.offset or 0)
    finally:
        os.close(handle)
