"""Folders of tiny images, and of classifiers of images with random weights."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

KINDS = tuple(f"kind{number}" for number in range(7))
PROCESSOR: dict[str, Any] = {
    "image_processor_type": "ViTImageProcessor", "do_resize": True, "resample": 2,
    "size": {"height": 16, "width": 16}, "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
}  # fmt: skip


def write_image(path: Path, seed: int, size: tuple[int, int] = (20, 24)) -> Path:
    """A PNG of chance colours, written without a library."""
    height, width = size
    pixels = np.random.default_rng(seed).integers(0, 256, (height, 1 + 3 * width), dtype=np.uint8)
    pixels[:, 0] = 0  # rows without a filter

    def chunk(name: bytes, content: bytes) -> bytes:
        result = name + content
        return struct.pack(">I", len(content)) + result + struct.pack(">I", zlib.crc32(result))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [("IHDR", header), ("IDAT", zlib.compress(pixels.tobytes())), ("IEND", b"")]
    path.parent.mkdir(parents=True, exist_ok=True)
    chunks = (chunk(name.encode(), content) for name, content in parts)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    return path


def write_images(folder: Path, number: int, labels: Sequence[str] = (), *, seed: int = 0) -> Path:
    """So many images side by side, or in a folder for each label."""
    for place in range(number):
        name = f"{place}.png"
        inside = folder / labels[place % len(labels)] / name if labels else folder / name
        write_image(inside, seed + place)
    return folder


def write_classifier(folder: Path, model_type: str = "vit", **changes: Any) -> Path:
    """A random classifier of three layers and seven classes, with its image processor."""
    from tests.exporter.tiny_families import tiny_model

    names = dict(enumerate(KINDS))
    result = {"id2label": names, "label2id": {name: number for number, name in names.items()}}
    model = tiny_model(model_type, head="ImageClassification", **result | changes)
    model.save_pretrained(folder)
    write_processor(folder)
    return folder


def write_processor(folder: Path, **changes: Any) -> None:
    """Its settings beside a model; an entry that is None is left out."""
    values = {name: value for name, value in (PROCESSOR | changes).items() if value is not None}
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
