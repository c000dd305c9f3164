"""GGUF files with random blocks, and the numbers that they stand for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SUPER = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
"""Where a K type's block has its float16 numbers."""


def random_rows(kind: str, rows: int, columns: int, seed: int = 0) -> NDArray[np.uint8]:
    """Bytes of one type, as a file has them; the scales are small and finite."""
    import gguf

    rng = np.random.default_rng(seed)
    which = gguf.GGMLQuantizationType[kind]
    if kind not in SUPER:
        noise = rng.standard_normal((rows, columns)).astype(np.float32) + np.float32(0.3)
        quantised: NDArray[np.uint8] = gguf.quants.quantize(noise, which)
        return quantised
    block, size = gguf.GGML_QUANT_SIZES[which]
    made = rng.integers(0, 256, (rows * columns // block, size)).astype(np.uint8)
    for place in SUPER[kind]:
        scales = rng.uniform(0.001, 0.002, len(made)).astype(np.float16)
        made[:, place : place + 2] = scales.view(np.uint8).reshape(-1, 2)
    return made.reshape(rows, -1)


def numbers(rows: NDArray[np.uint8], kind: str) -> NDArray[np.float32]:
    """What the package itself makes of them, ``[rows, columns]``."""
    import gguf

    values: NDArray[np.float32] = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind])
    return values


def write_gguf(path: Path, tensors: dict[str, tuple[str, NDArray[np.uint8]]]) -> Path:
    """Writes a file of tensors by name: the type, and the bytes."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    for name, (kind, rows) in tensors.items():
        writer.add_tensor(name, rows, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
