"""Recordings as samples at a model's own rate.

WAV files are read by SciPy, others by the library soundfile where it is installed. A recording of
another rate is resampled by SciPy's polyphase filter, and that is told; several channels become
their mean.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from math import gcd
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from exporter.errors import TextSourceError, first_line
from exporter.optional import require
from graph_passes.files.reading import read_bytes

SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3")
_LARGEST_BYTES = 1 << 28
_RATES = range(4_000, 400_000)

Samples = NDArray[np.float32]


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
    """Reads a recording at a rate.

    Args:
        path: The file.
        rate: In Hz.
        longest_s: What the model takes, in seconds.

    Raises:
        TextSourceError: The file is missing, no recording, empty, not finite, or too long.
        MissingDependencyError: It is no WAV file, and soundfile is not installed.
    """
    found, file_rate = _decoded(path)
    if file_rate not in _RATES:
        raise TextSourceError(
            f"{path} says that it has {file_rate} samples a second.",
            "Convert it, for example with: ffmpeg -i FILE -ar 16000 out.wav",
            code="odd-rate",
        )
    if not len(found):
        raise TextSourceError(f"{path} holds no sound.", "Leave it out.", code="no-sound")
    if not np.isfinite(found).all():
        raise TextSourceError(
            f"{path} holds samples that are not finite.", "Record it again.", code="not-finite"
        )
    seconds = len(found) / file_rate
    if seconds > longest_s:
        raise TextSourceError(
            f"{path} takes {seconds:.1f} s; the model hears {longest_s:g} s at once.",
            "Cut it into shorter recordings: what is behind would be lost without a word.",
            code="sound-too-long",
        )
    return Sound(_at_rate(found, file_rate, rate), file_rate)


def _at_rate(samples: NDArray[np.float64], file_rate: int, rate: int) -> Samples:
    if file_rate != rate:
        from scipy.signal import resample_poly

        common = gcd(rate, file_rate)
        samples = resample_poly(samples, rate // common, file_rate // common)
    found: Samples = samples.astype(np.float32)
    return found


def _decoded(path: Path) -> tuple[NDArray[np.float64], int]:
    """Mono samples from -1 to 1, and their rate."""
    try:
        content = read_bytes(path, limit=_LARGEST_BYTES)
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
        samples, rate = read(content)
    # Both libraries raise many classes for a file that is none of theirs.
    except (ValueError, RuntimeError, EOFError, OSError) as error:
        raise TextSourceError(
            f"{path} is no recording that can be read: {first_line(error)}.",
            "Convert it, for example with: ffmpeg -i FILE -ar 16000 out.wav",
            code="no-recording",
        ) from error
    return (samples.mean(axis=1) if samples.ndim > 1 else samples), rate


def _by_scipy(content: bytes) -> tuple[NDArray[np.float64], int]:
    from scipy.io import wavfile

    rate, samples = wavfile.read(io.BytesIO(content))
    if samples.dtype == np.uint8:
        return (samples.astype(np.float64) - 128) / 128, int(rate)
    if samples.dtype.kind == "i":
        return samples.astype(np.float64) / -float(np.iinfo(samples.dtype).min), int(rate)
    return samples.astype(np.float64), int(rate)


def _by_soundfile(content: bytes) -> tuple[NDArray[np.float64], int]:
    samples, rate = require("soundfile", extra="speech").read(io.BytesIO(content))
    return samples, int(rate)
