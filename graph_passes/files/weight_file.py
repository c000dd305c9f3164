"""External data files: weights copied from file to file without passing through memory.

The kernel copies where it can (copy_file_range), and where the file system can share blocks between
files (XFS, Btrfs, bcachefs), it shares them by itself and copies nothing. For that a range must
begin at a block's boundary in both files, so large weights stand at the same place within a page
here as where they come from. Holes of the source stay holes.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import TracebackType
from typing import Self

import onnx_ir as ir

_ALIGNMENT = 64
_PAGE_BYTES = 4096  # a block of the file systems that share blocks, and what mmap asks for
_LARGE_BYTES = 1 << 20
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
        """Writes a tensor's content, aligned to 64 bytes, or as its source where it is large.

        Args:
            tensor: In memory or in another data file; its shape and type are kept. One in memory
                must live as long as the writer, which knows it again by its identity.

        Returns:
            The tensor in this file.
        """
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
            _write_all(self._file.fileno(), tensor.tobytes())
        self.size = offset + tensor.nbytes
        self._file.truncate(self.size)  # where it ends in a hole
        if tensor.nbytes >= _LARGE_BYTES:
            self._write_back(offset, tensor.nbytes)
        return offset

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
            position = begin
            while position < stop:
                position += self._copy_piece(source, position, stop - position)

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
            return os.copy_file_range(source, self._file.fileno(), left, position)
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


def _write_all(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]


def read_bytes(tensor: ir.ExternalTensor) -> bytes:
    """An external tensor's content, in memory.

    Raises:
        OSError: The file ends too early.
    """
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
