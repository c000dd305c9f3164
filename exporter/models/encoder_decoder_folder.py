"""The folder of an exported encoder-decoder: three graphs, in the names of optimum's runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

Graph = Literal["encoder_model", "decoder_model", "decoder_with_past_model"]

ENCODER: Graph = "encoder_model"
FIRST_STEP: Graph = "decoder_model"
"""The decoder's first step: it reads what the encoder gave, and fills both caches."""
NEXT_STEP: Graph = "decoder_with_past_model"
"""Each further step: it reads both caches."""
GRAPHS: tuple[Graph, ...] = (ENCODER, FIRST_STEP, NEXT_STEP)


def graph_file(folder: Path, graph: Graph) -> Path:
    """Where a graph lies in its folder."""
    return folder / f"{graph}.onnx"


def holds_stacks(folder: Path) -> bool:
    """Whether a folder holds an encoder-decoder's graphs, or some of them."""
    return any(graph_file(folder, graph).is_file() for graph in (ENCODER, NEXT_STEP))
