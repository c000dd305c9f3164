"""The head of a report as a picture: ``python -m tests.browser.picture REPORT PNG``."""

from __future__ import annotations

import struct
import sys
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

WIDTH, HEIGHT = 1180, 480
MOST_BYTES = 200_000
_MOST_COLOURS = 256


def main(report: str, target: str) -> None:
    import blitz_py

    page = Path(report).read_text(encoding="utf-8")
    width, height, pixels = blitz_py.render_rgba(page, width=WIDTH, height=HEIGHT)
    picture = png(np.frombuffer(pixels, np.uint8).reshape(height, width, 4)[..., :3])
    if len(picture) > MOST_BYTES:
        sys.exit(f"The picture has {len(picture):,} bytes, more than {MOST_BYTES:,}.")
    Path(target).write_bytes(picture)


def png(pixels: NDArray[np.uint8]) -> bytes:
    """A picture as the bytes of a PNG file, in its 256 most frequent colours."""
    height, width, _ = pixels.shape
    colours, numbers, counts = np.unique(
        pixels.reshape(-1, 3), axis=0, return_inverse=True, return_counts=True
    )
    palette = colours[np.argsort(-counts, kind="stable")[:_MOST_COLOURS]]
    rows = _nearest(colours, palette)[numbers.ravel()].reshape(height, width)
    unfiltered = np.concatenate([np.zeros((height, 1), np.uint8), rows], axis=1)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [
            _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
            _chunk(b"PLTE", palette.tobytes()),
            _chunk(b"IDAT", zlib.compress(unfiltered.tobytes(), 9)),
            _chunk(b"IEND", b""),
        ]
    )


def _nearest(colours: NDArray[np.uint8], palette: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """For each colour, ``[colours, 3]``, the number of the one in the palette that is nearest."""
    gaps = colours[:, None].astype(np.int32) - palette.astype(np.int32)
    nearest: NDArray[np.uint8] = (gaps**2).sum(axis=2).argmin(axis=1).astype(np.uint8)
    return nearest


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


if __name__ == "__main__":
    main(*sys.argv[1:])
