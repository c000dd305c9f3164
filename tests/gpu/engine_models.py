"""A tiny Llama and the engines of it that this machine can build."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import onnx_ir as ir
import pytest

from exporter.engines.build.build import build_engines
from exporter.engines.build.libraries import LIBRARIES, Backend, ask_driver
from exporter.engines.build.profiles import Ranges, Span
from tests.llama_shaped import LlamaShape, write_llama

VOCABULARY = 97
RANGES = Ranges(batch=Span(1, 1, 2), prompt=Span(1, 8, 16), context=Span(1, 64, 256))


def write_tiny_llama(
    folder: Path, dtype: ir.DataType = ir.DataType.FLOAT, *, fused_attention: bool = False
) -> Path:
    """Two layers with grouped heads and real weights."""
    shape = LlamaShape(
        layers=2, hidden=64, heads=4, kv_heads=2, intermediate=128, vocabulary=VOCABULARY,
        dtype=dtype, fused_attention=fused_attention,
    )  # fmt: skip
    return write_llama(folder / "model.onnx", shape, noise=0.1)


def skip_unserved(backend: Backend) -> None:
    """Skips, where a library is not installed or has nothing for the card that is there."""
    library, driver = LIBRARIES[backend], ask_driver()
    if importlib.util.find_spec(library.module) is None:
        pytest.skip(f"{library.module} is not installed")
    for card in driver.devices[:1]:
        if not library.supports(card.compute_capability):
            pytest.skip(f"{backend} does not support {card.compute_capability}")


def build_here(onnx: Path, folder: Path, backend: Backend, *, split: bool = False) -> Path:
    """Builds for the card that is there, one engine or one for each phase; gives the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    build_engines(onnx, folder / "m.engine", ranges=RANGES, backend=backend, split=split)
    return folder
