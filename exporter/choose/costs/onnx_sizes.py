"""What an ONNX file's sublayers take; see :mod:`exporter.choose.costs.weighing`."""

from __future__ import annotations

from pathlib import Path

from exporter.choose.costs.graph_sizes import GraphSizes


def sizes(onnx: Path) -> GraphSizes:
    """Weighs every sublayer of an ONNX file.

    Args:
        onnx: The file; its weights are not read.

    Raises:
        OnnxFileError: It can't be read safely.
        CostError: It holds no sublayer that can be cut.
    """
    from exporter.choose.costs.weighing import weigh
    from exporter.engines.runners.cache_form import read_cache_form
    from graph_passes.files.storage import load_model

    windows = read_cache_form(onnx).windows
    return weigh(load_model(onnx), windows, name=str(onnx), longest=longest_text(onnx))


def longest_text(onnx: Path) -> int | None:
    """Positions that a graph can hold, by its caches and the config beside it; None for no limit.

    Args:
        onnx: The ONNX file.

    Raises:
        OnnxFileError: It can't be read safely.
    """
    from exporter.engines.runners.cache_form import read_cache_form
    from exporter.models.model_folder import find_model

    known = (read_cache_form(onnx).longest, find_model(onnx).longest_sequence)
    return min((limit for limit in known if limit is not None), default=None)
