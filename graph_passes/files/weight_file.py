"""External data files: weights copied from file to file without passing through memory."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import onnx_ir as ir

_ALIGNMENT = 64
_PAGE_BYTES = 4096  # a block of the file systems that share blocks, and what mmap asks for
_LARGE_BYTES = 1 << 20
_PIECE_BYTES = 8 << 20
_KERNEL_BYTES = 256 << 20
_BYTE_BITS = 8
_NO_KERNEL_COPY = {errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM}


class WeightWriter:
    """Writes one data file; the same bytes of the same source are written once."""

    def __init__(self, path: Path, *, told: Callable[[int], None] | None = None) -> None:
        self.path = path
        self.size = 0  # how many bytes the file has so far
        self._told = told
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
        """Writes a tensor's content, aligned to 64 bytes, or as its source where it is large."""
        key = _identity(tensor)
        if key not in self._places:
            self._places[key] = self._append(tensor)
        return self._placed(tensor, self._places[key])

    def add_passing(self, tensor: ir.TensorProtocol) -> ir.ExternalTensor:
        """The same of a tensor that needn't live on, and so is never known again."""
        return self._placed(tensor, self._append(tensor))

    def _placed(self, tensor: ir.TensorProtocol, offset: int) -> ir.ExternalTensor:
        return ir.ExternalTensor(
            location=self.path.name,
            offset=offset,
            length=tensor.nbytes,
            dtype=tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=tensor.name or "",
            doc_string=tensor.doc_string,
            base_dir=self.path.parent,
        )

    def _append(self, tensor: ir.TensorProtocol) -> int:
        offset = _place_after(self.size, tensor)
        self._file.seek(offset)
        if isinstance(tensor, ir.ExternalTensor):
            self._copy(tensor)
        else:
            self._write(tensor)
        self.size = offset + tensor.nbytes
        self._file.truncate(self.size)  # where it ends in a hole
        if tensor.nbytes >= _LARGE_BYTES:
            self._write_back(offset, tensor.nbytes)
        return offset

    def _tell(self, count: int) -> None:
        if self._told is not None:
            self._told(count)

    def _write(self, tensor: ir.TensorProtocol) -> None:
        for piece in _pieces(tensor):
            _write_all(self._file.fileno(), piece)
            self._tell(len(piece))

    def _write_back(self, offset: int, length: int) -> None:
        """Has the kernel begin to write, so that little is left to wait for at the end."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), offset, length, os.POSIX_FADV_DONTNEED)

    def _copy(self, tensor: ir.ExternalTensor) -> None:
        source = self._source(tensor.path)
        position = tensor.offset or 0
        end = position + tensor.nbytes
        if os.fstat(source).st_size < end:
            raise OSError(errno.EIO, f"{tensor.path} ends too early")
        while position < end:
            begin, stop = _next_data(source, position, end)
            self._file.seek(begin - position, os.SEEK_CUR)
            self._tell(begin - position)
            position = begin
            while position < stop:
                copied = self._copy_piece(source, position, stop - position)
                self._tell(copied)
                position += copied

    def _copy_piece(self, source: int, position: int, left: int) -> int:
        copied = self._copy_in_kernel(source, position, left) if self._kernel_copy else 0
        if not copied:  # some special files give nothing to the kernel
            piece = os.pread(source, min(left, _PIECE_BYTES), position)
            _write_all(self._file.fileno(), piece)
            copied = len(piece)
        if not copied:
            raise OSError(errno.EIO, "The source of the weights ends too early")
        return copied

    def _copy_in_kernel(self, source: int, position: int, left: int) -> int:
        if position % _PAGE_BYTES:
            left = min(left, _PAGE_BYTES - position % _PAGE_BYTES)
        elif left > _PAGE_BYTES:
            left -= left % _PAGE_BYTES  # whole pages can be shared
        try:
            most = min(left, _KERNEL_BYTES)  # so that progress is told, and Ctrl-C is heard
            return os.copy_file_range(source, self._file.fileno(), most, position)
        except OSError as error:
            if error.errno not in _NO_KERNEL_COPY:
                raise
            self._kernel_copy = False
            return 0

    def _source(self, path: str) -> int:
        if path not in self._sources:
            self._sources[path] = os.open(path, os.O_RDONLY)
        return self._sources[path]


def _identity(tensor: ir.TensorProtocol) -> tuple[str, int, int] | int:
    if isinstance(tensor, ir.ExternalTensor):
        return tensor.path, tensor.offset or 0, tensor.nbytes
    return id(tensor)


def _place_after(size: int, tensor: ir.TensorProtocol) -> int:
    """Where a tensor is to begin; the same on every machine."""
    if tensor.nbytes < _LARGE_BYTES:
        return _aligned(size, _ALIGNMENT)
    within_page = 0
    if isinstance(tensor, ir.ExternalTensor) and (tensor.offset or 0) % _ALIGNMENT == 0:
        within_page = (tensor.offset or 0) % _PAGE_BYTES
    return _aligned(size - within_page, _PAGE_BYTES) + within_page


def _aligned(size: int, to: int) -> int:
    return -(-size // to) * to


def _next_data(source: int, position: int, end: int) -> tuple[int, int]:
    """The first stretch between two positions that is no hole; both are ``end`` if all is one."""
    if not hasattr(os, "SEEK_DATA"):
        return position, end
    try:
        begin = os.lseek(source, position, os.SEEK_DATA)
        return min(begin, end), min(os.lseek(source, begin, os.SEEK_HOLE), end)
    except OSError as error:
        # ENXIO: only a hole is left. Anything else: this file system can't tell.
        return (end, end) if error.errno == errno.ENXIO else (position, end)


def _pieces(tensor: ir.TensorProtocol) -> Iterator[memoryview]:
    """A tensor's bytes in the order of the file; turning it round takes a piece at a time."""
    if tensor.dtype.bitwidth < _BYTE_BITS:  # packed
        yield memoryview(tensor.tobytes())
        return
    array = np.atleast_1d(tensor.numpy())
    rows = max(1, _PIECE_BYTES // max(1, array.nbytes // max(1, len(array))))
    for begin in range(0, len(array) if array.size else 0, rows):
        yield _raw(array[begin : begin + rows])


def _raw(array: np.ndarray[Any, Any]) -> memoryview:
    """An array's bytes, little-endian as ONNX has them."""
    if array.dtype.byteorder == ">" or (sys.byteorder == "big" and array.dtype.itemsize > 1):
        array = array.astype(array.dtype.newbyteorder("<"))
    return np.ascontiguousarray(array).view(np.uint8).reshape(-1).data


def _write_all(handle: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]


def read_bytes(tensor: ir.ExternalTensor) -> bytes:
    """An external tensor's content, in memory."""
    content = bytearray()
    handle = os.open(tensor.path, os.O_RDONLY)
    try:
        while left := tensor.nbytes - len(content):  # one read gives 2 GB at most
            piece = os.pread(handle, left, (tensor.offset or 0) + len(content))
            if not piece:
                raise OSError(errno.EIO, f"{tensor.path} ends too early")
            content += piece
    finally:
        os.close(handle)
    return bytes(content)
