"""What an encoder-decoder is asked and what is right: texts or recordings, with targets or without.

For models of text a JSON-lines file has ``source`` and, if it is known, ``target`` on each line;
any other text gives its paragraphs, without targets. For models of sound it has ``audio``, the path
of a recording, and ``text``, what is said in it; a folder gives its recordings, each with the text
of the ``.txt`` file of the same name, where there is one. ``random`` is noise from a seed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.errors import TextSourceError
from exporter.files import sha256_bytes, sha256_file
from exporter.models.texts.documents import scattered
from exporter.models.texts.passages import paragraphs
from exporter.models.texts.sounds import LARGEST_BYTES, SUFFIXES
from exporter.models.texts.sources import Part, json_lines, read_file, read_texts
from graph_passes.files.reading import CONFIG_BYTES, check_file

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
    """Sources with their targets, all or none of them.

    Attributes:
        source: What a report calls them.
        pairs: At random, always in the same order; none is empty, and none there for noise.
        sha256: Of the sources alone, a recording's by what it holds: the same ones have it in
            whatever order, with whatever targets, and listed in whatever form.
        content_sha256: Of all that they hold.
    """

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
        found = [
            Pair(_field(each, "source", at), _target(each, "target", at)) for each, at in lines
        ]
        return _whole(spec, found, [each.source.encode() for each in found], _TEXT_HINT)
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
        found = [Pair(str(file), _beside(file)) for file in files]
        if not files:
            raise TextSourceError(
                f"{path} holds no recordings ({', '.join(SUFFIXES)}).",
                _SOUND_HINT,
                code="no-recordings",
            )
        return _whole(spec, found, files, _SOUND_HINT)
    if path.suffix.lower() not in (".jsonl", ".ndjson"):
        raise TextSourceError(
            f"{spec} is no recordings, which this model reads.", _SOUND_HINT, code="no-recordings"
        )
    found = []
    for line, at in _lines(path):
        sound = path.parent / _field(line, "audio", at)
        if not sound.exists():  # nor does what has a zero byte in its name
            raise TextSourceError(
                f"{at}: the recording {sound} does not exist.",
                "Paths are taken from the folder of the JSON-lines file.",
                code="file-missing",
            )
        check_file(sound, path.parent, limit=LARGEST_BYTES)
        found.append(Pair(str(sound), _target(line, "text", at)))
    return _whole(spec, found, [Path(pair.source) for pair in found], _SOUND_HINT)


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
    told = json.dumps([[digest, pair.target] for digest, pair in held]).encode()
    return Pairs(spec, tuple(pair for _, pair in held), sha256_bytes(alone), sha256_bytes(told))


def _lines(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """The objects of a JSON-lines file, and where each stands."""
    for record, number in json_lines(read_file(path), path):
        at = f"{path}, line {number}"
        if not isinstance(record, dict):
            told = f"{at}: a JSON object is needed."
            raise TextSourceError(told, _TEXT_HINT, code="not-an-object")
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
