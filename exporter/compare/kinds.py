"""What an arm is, told by how it is written: an ONNX file or folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from exporter.compare.arms import ComparedArm
from exporter.compare.options import CompareOptions
from exporter.errors import UsageError


def open_arm(path: Path, options: CompareOptions, *, threads: int) -> ComparedArm:
    """Finds an arm's files; its runner is not entered yet.

    Raises:
        OnnxFileError: The file is no complete ONNX model.
        ComparisonError: ``config.json`` is no JSON object.
        BackendError: The provider is not known.
    """
    from exporter.backends.onnxruntime import OnnxRuntimeRunner
    from exporter.measure.graph_facts import read_facts
    from exporter.measure.model_folder import find_model

    folder = find_model(path)
    runner = OnnxRuntimeRunner(folder.onnx, provider=options.provider, threads=threads)
    return ComparedArm((runner,), folder, read_facts(folder.onnx))


def reference_names(paths: Sequence[Path]) -> list[str]:
    """What the report calls each reference: the end of its path, or all of it where two end alike.

    Raises:
        UsageError: One is named twice.
    """
    if len(set(paths)) < len(paths):
        twice = next(path for path, count in Counter(paths).items() if count > 1)
        raise UsageError(f"The reference {twice} is given twice.")
    ends = [path.name for path in paths]
    return [
        end if ends.count(end) == 1 else str(path) for end, path in zip(ends, paths, strict=True)
    ]
