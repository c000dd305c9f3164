"""The errors of depthcut's libraries."""

from __future__ import annotations


class DepthcutError(Exception):
    """Something that the user can act on: what went wrong, where, and what to do.

    Attributes:
        message: What went wrong and where, in one line.
        hint: What to do about it, in one line; empty when the message says it.
        code: What went wrong as a short name, such as ``rank-out-of-range``, that stays when the
            sentence is edited; empty where the class alone tells it.
    """

    def __init__(self, message: str, hint: str = "", *, code: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.code = code

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class UsageError(DepthcutError):
    """The call itself is wrong: options that exclude each other, a name that is not there."""


class UnsafeInputError(UsageError):
    """A file that others made leaves its folder, is no regular file, or is beyond all bounds."""


class TargetInUseError(UsageError):
    """Another process writes the same file or folder."""


class PreparedFolderError(UsageError):
    """A folder or record of ours in an output folder is not as depthcut writes it."""


class InterruptedResultError(DepthcutError):
    """A result was cut off while its files took their places, and can't be completed here."""


class SurgeryError(DepthcutError):
    """The graph can't be cut as asked. The model that was passed in is unchanged."""


class OnnxFileError(DepthcutError):
    """An ONNX file or its external data can't be read safely."""


class UnsafeOnnxFileError(UnsafeInputError, OnnxFileError):
    """An ONNX file names data outside of its folder."""


class FusionError(DepthcutError):
    """The graph can't be written in fused operators. The model that was passed in is unchanged."""
