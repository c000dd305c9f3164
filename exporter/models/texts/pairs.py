"""What an encoder-decoder is asked and what is right: texts or recordings and targets."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.errors import (
    DepthcutError,
    TextSourceError,
    UnsafeInputError,
    first_line,
    pass_on_memory_error,
)
from exporter.files import sha256_bytes, sha256_file
from exporter.models.texts.documents import scattered
from exporter.models.texts.passages import paragraphs
from exporter.models.texts.sources import Part, json_lines, read_file, read_texts
from exporter.optional import require
from graph_passes.files.reading import CONFIG_BYTES, check_file, opened

SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3")
LARGEST_BYTES = 1 << 28
"""What the file of a recording may take."""
_BLOCK = 1 << 16
_RATES = range(4_000, 400_000)

Samples = NDArray[np.float32]


def read_sound(path: Path, rate: int, longest_s: float) -> tuple[Samples, int]:
    """A recording's samples, ``[samples]`` from -1 to 1, at a rate; and the file's own rate."""
    samples, file_rate = _decoded(path, longest_s)
    if not np.isfinite(samples).all():
        raise TextSourceError(
            f"{path} holds samples that are not finite.", "Record it again.", code="not-finite"
        )
    if file_rate != rate:
        from scipy.signal import resample_poly

        common = gcd(rate, file_rate)
        samples = resample_poly(samples, rate // common, file_rate // common)
    return samples.astype(np.float32), file_rate


def _decoded(path: Path, longest_s: float) -> tuple[NDArray[np.float64], int]:
    """Mono samples from -1 to 1, and their rate."""
    soundfile = require("soundfile", extra="speech")
    try:
        check_file(path, limit=LARGEST_BYTES)
        # The open file: libsndfile takes minutes to call Python for each of a million chunks.
        with opened(path) as held, soundfile.SoundFile(held.fileno(), closefd=False) as file:
            _refuse_unheard(path, longest_s, int(file.frames), int(file.samplerate))
            # A compressed file may have hundreds of channels: only their mean is kept.
            parts = file.blocks(_BLOCK, always_2d=True)
            return np.concatenate([part.mean(axis=1) for part in parts]), int(file.samplerate)
    except FileNotFoundError:
        raise TextSourceError(
            f"The recording {path} does not exist.",
            "Name a file that is there.",
            code="file-missing",
        ) from None
    except (DepthcutError, UnsafeInputError):
        raise
    # The library raises many classes for a file that is none of its own.
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


RANDOM = "random"
"""Noise in place of a text or a recording."""
_SOUND_HINT = (
    'Give a folder of recordings, or JSON lines such as {"audio": "one.wav", "text": "what is '
    'said"}, or random for noise.'
)
_TEXT_HINT = 'Give JSON lines such as {"source": "...", "target": "..."}, or any text.'


@dataclass(frozen=True)
class Pair:
    """One source; ``target`` is None where it isn't known.

    ``source`` is a text, or the path of a recording.
    """

    source: str
    target: str | None = None


@dataclass(frozen=True)
class Pairs:
    """Sources with their targets, all or none of them."""

    source: str
    pairs: tuple[Pair, ...]
    sha256: str
    content_sha256: str = ""

    @property
    def is_random(self) -> bool:
        """Whether they are noise."""
        return not self.pairs

    @property
    def has_targets(self) -> bool:
        """Whether it is known what is right."""
        return bool(self.pairs) and self.pairs[0].target is not None


def read_pairs(spec: str, *, part: Part, sound: bool) -> Pairs:
    """Reads what a user named."""
    if spec == RANDOM:
        label = f"{RANDOM} ({part})"
        digest = sha256_bytes(label.encode())
        return Pairs(label, (), digest, digest)
    path = Path(spec)
    if sound:
        return _sounds(spec, path)
    if path.suffix.lower() in (".jsonl", ".ndjson") and _names_sources(path):
        lines = list(_lines(path))
        result = [
            Pair(_field(item, "source", at), _target(item, "target", at)) for item, at in lines
        ]
        return _whole(spec, result, [pair.source.encode() for pair in result], _TEXT_HINT)
    texts = read_texts(spec, part=part)
    pairs = tuple(map(Pair, scattered(paragraphs(texts))))
    return Pairs(texts.source, pairs, texts.sha256, texts.sha256)


def _names_sources(path: Path) -> bool:
    first = next(iter(_lines(path)), None)
    return first is not None and "source" in first[0]


def _sounds(spec: str, path: Path) -> Pairs:
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        for file in files:
            check_file(file, limit=LARGEST_BYTES)
        pairs = [Pair(str(file), _beside(file)) for file in files]
        if not files:
            raise TextSourceError(
                f"{path} holds no recordings ({', '.join(SUFFIXES)}).",
                _SOUND_HINT,
                code="no-recordings",
            )
        return _whole(spec, pairs, files, _SOUND_HINT)
    if path.suffix.lower() not in (".jsonl", ".ndjson"):
        raise TextSourceError(
            f"{spec} is no recordings, which this model reads.", _SOUND_HINT, code="no-recordings"
        )
    pairs = []
    for line, at in _lines(path):
        sound = path.parent / _field(line, "audio", at)
        if not sound.exists():  # nor does what has a zero byte in its name
            raise TextSourceError(
                f"{at}: the recording {sound} does not exist.",
                "Paths are taken from the folder of the JSON-lines file.",
                code="file-missing",
            )
        check_file(sound, path.parent, limit=LARGEST_BYTES)
        pairs.append(Pair(str(sound), _target(line, "text", at)))
    return _whole(spec, pairs, [Path(pair.source) for pair in pairs], _SOUND_HINT)


def _beside(sound: Path) -> str | None:
    text = sound.with_suffix(".txt")
    check_file(text, limit=CONFIG_BYTES)
    return read_file(text).strip() if text.is_file() else None


def _whole(spec: str, pairs: Sequence[Pair], sources: Sequence[Path | bytes], hint: str) -> Pairs:
    if not pairs:
        raise TextSourceError(f"{spec} holds no pairs.", hint, code="no-text")
    lacking = [number for number, pair in enumerate(pairs, 1) if pair.target is None]
    if lacking and len(lacking) < len(pairs):
        raise TextSourceError(
            f"{spec}: pair {lacking[0]} has no target, and others have one.",
            "Give all of them a target, or none.",
            code="one-sided",
        )
    held = [
        (sha256_file(source) if isinstance(source, Path) else sha256_bytes(source), pair)
        for pair, source in scattered([*zip(pairs, sources, strict=True)])
    ]
    alone = "\n".join(sorted({digest for digest, _ in held})).encode()
    data = json.dumps([[digest, pair.target] for digest, pair in held]).encode()
    return Pairs(spec, tuple(pair for _, pair in held), sha256_bytes(alone), sha256_bytes(data))


def _lines(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """The objects of a JSON-lines file, and where each stands."""
    for record, number in json_lines(read_file(path), path):
        at = f"{path}, line {number}"
        if not isinstance(record, dict):
            text = f"{at}: a JSON object is needed."
            raise TextSourceError(text, _TEXT_HINT, code="not-an-object")
        yield record, at


def _field(line: dict[str, Any], name: str, at: str) -> str:
    value = line.get(name)
    if not isinstance(value, str) or not value.strip():
        raise TextSourceError(
            f'{at}: the field "{name}" is missing, empty or no string.',
            "Each line needs it.",
            code="field-missing",
        )
    return value


def _target(line: dict[str, Any], name: str, at: str) -> str | None:
    return None if line.get(name) is None else _field(line, name, at)
