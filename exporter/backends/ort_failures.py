"""ONNX Runtime's errors in words that say what to do."""

from __future__ import annotations

import re
from pathlib import Path

from exporter.errors import BackendError

_LOAD_FAILURES = (
    (
        re.compile(r"Protobuf parsing failed|No graph was found|does not have a graph"),
        "{path} is not a complete ONNX file.",
        "It may be cut off: export or copy it again.",
    ),
    (
        re.compile(r"External data path does not exist"),
        "{path}: its external data is missing ({reason}).",
        "Copy the data file beside the ONNX file.",
    ),
    (
        re.compile(r"GetExtDataFromTensorProto|External initializer"),
        "{path}: its external data is shorter than the graph says.",
        "The data file may be cut off: export or copy it again.",
    ),
    (
        re.compile(r"External data path|escapes|outside"),
        "{path}: its external data can't be used ({reason}).",
        "The data must be a plain file in the model's folder.",
    ),
    (
        re.compile(r"released onnx opset|IR version|No Op registered"),
        "{path} needs more than onnxruntime {version} offers: {reason}",
        "Update onnxruntime, or export at an older opset.",
    ),
)

_NO_KERNEL = "Could not find an implementation for"


def lacks_a_kernel(text: str) -> bool:
    """Whether that is why ONNX Runtime does not load a file.

    Args:
        text: What it says.
    """
    return _NO_KERNEL in text


def load_failure(path: Path, text: str, version: str) -> BackendError:
    """The error for a file that ONNX Runtime does not load.

    Args:
        path: The file.
        text: What ONNX Runtime says.
        version: Its version.
    """
    reason = first_sentence(text)
    for pattern, message, hint in _LOAD_FAILURES:
        if pattern.search(text):
            return BackendError(message.format(path=path, reason=reason, version=version), hint)
    return BackendError(f"ONNX Runtime can't load {path}: {reason}")


def first_sentence(text: str) -> str:
    """ONNX Runtime's message without its codes, source places and later lines."""
    text = text.strip().splitlines()[0] if text.strip() else "no reason given"
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = re.sub(r"^Load model from .*? failed:\s*", "", text)
    text = re.sub(r"\S*/onnxruntime\S*:\d+ [^)]*\)(?: const)?\s*", "", text)
    text = re.sub(r"\w+\.cc:\d+ \w+ ", "", text)
    return text if len(text) <= 300 else text[:297] + "..."
