"""Recordings as samples at a model's own rate.

WAV files are read by SciPy, others by the library soundfile where it is installed. A recording of
another rate is resampled by SciPy's polyphase filter, and that is told; several channels become
their mean.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import gcd
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from exporter.errors import DepthcutError, TextSourceError, first_line, pass_on_memory_error
from exporter.optional import require
from graph_passes.files.reading import read_bytes

SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3")
LARGEST_BYTES = 1 << 28
"""What the file of a recording may take."""
_BLOCK = 1 << 16
_MOST_CHUNKS = 1_000
_RATES = range(4_000, 400_000)

Samples = NDArray[np.float32]
_Check = Callable[[int, int], None]
"""Is told the frames and the rate of a recording; raises where they can't be taken."""


@dataclass(frozen=True)
class Sound:
    """A recording.

    Attributes:
        samples: ``[samples]``, from -1 to 1, at the rate that was asked for.
        file_rate: The rate that its file has, in Hz.
    """

    samples: Samples
    file_rate: int


def read_sound(path: Path, rate: int, longest_s: float) -> Sound:
    """Reads a recording at a rate."""
    samples, file_rate = _decoded(path, longest_s)
    if not np.isfinite(samples).all():
        raise TextSourceError(
            f"{path} holds samples that are not finite.", "Record it again.", code="not-finite"
        )
    return Sound(_at_rate(samples, file_rate, rate), file_rate)


def _at_rate(samples: NDArray[np.float64], file_rate: int, rate: int) -> Samples:
    if file_rate != rate:
        from scipy.signal import resample_poly

        common = gcd(rate, file_rate)
        samples = resample_poly(samples, rate // common, file_rate // common)
    found: Samples = samples.astype(np.float32)
    return found


def _decoded(path: Path, longest_s: float) -> tuple[NDArray[np.float64], int]:
    """Mono samples from -1 to 1, and their rate."""
    try:
        content = read_bytes(path, limit=LARGEST_BYTES)
    except FileNotFoundError:
        raise TextSourceError(
            f"The recording {path} does not exist.",
            "Name a file that is there.",
            code="file-missing",
        ) from None
    except OSError as error:
        raise TextSourceError(f"{path} can't be read: {error.strerror}.") from error
    read = _by_scipy if path.suffix.lower() == ".wav" else _by_soundfile
    try:
        return read(content, partial(_refuse_unheard, path, longest_s))
    except DepthcutError:
        raise
    # Both libraries raise many classes for a file that is none of theirs.
    except Exception as error:
        pass_on_memory_error(error)
        raise TextSourceError(
            f"{path} is no recording that can be read: {first_line(error)}.",
            "Convert it, for example with: ffmpeg -i FILE -ar 16000 out.wav",
            code="no-recording",
        ) from error


def _refuse_unheard(path: Path, longest_s: float, frames: int, rate: int) -> None:
    """Refuses a recording by its length and rate, before its samples become floats."""
    if rate not in _RATES:
        raise TextSourceError(
            f"{path} says that it has {rate} samples a second.",
            "Convert it, for example with: ffmpeg -i FILE -ar 16000 out.wav",
            code="odd-rate",
        )
    if not frames:
        raise TextSourceError(f"{path} holds no sound.", "Leave it out.", code="no-sound")
    if frames > longest_s * rate:
        raise TextSourceError(
            f"{path} takes {frames / rate:.1f} s; the model hears {longest_s:g} s at once.",
            "Cut it into shorter recordings: what is behind would be lost without a word.",
            code="sound-too-long",
        )


def _by_scipy(content: bytes, check: _Check) -> tuple[NDArray[np.float64], int]:
    from scipy.io import wavfile

    _refuse_crumbs(content)
    rate, samples = wavfile.read(io.BytesIO(content))
    check(len(samples), int(rate))
    kind = samples.dtype
    mono = samples.mean(axis=1, dtype=np.float64) if samples.ndim > 1 else samples
    mono = mono.astype(np.float64)
    if kind == np.uint8:
        return (mono - 128) / 128, int(rate)
    if kind.kind == "i":
        return mono / -float(np.iinfo(kind).min), int(rate)
    return mono, int(rate)


def _refuse_crumbs(content: bytes) -> None:
    """Refuses a WAV file of more chunks than one has: SciPy reads past them one by one."""
    form, at = "<I" if content[:3] == b"RIF" and content[3:4] != b"X" else ">I", 12
    for _ in range(_MOST_CHUNKS):
        if at + 8 > len(content):
            return
        size: int = struct.unpack_from(form, content, at + 4)[0]
        at += 8 + size + size % 2
    raise ValueError(f"it has more than {_MOST_CHUNKS} chunks")


def _by_soundfile(content: bytes, check: _Check) -> tuple[NDArray[np.float64], int]:
    with require("soundfile", extra="speech").SoundFile(io.BytesIO(content)) as file:
        check(int(file.frames), int(file.samplerate))
        # A compressed file may have hundreds of channels: only their mean is kept.
        parts = file.blocks(_BLOCK, always_2d=True)
        return np.concatenate([part.mean(axis=1) for part in parts]), int(file.samplerate)
