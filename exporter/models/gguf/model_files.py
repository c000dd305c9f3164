"""A model in one GGUF file, or in shards as llama.cpp's ``llama-gguf-split`` writes them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from exporter.errors import GgufFileError
from exporter.models.gguf.header import Entry, GgufFile, Tensor, broken, read_header

ARCHITECTURE_KEY = "general.architecture"
GGUF_SUFFIX = ".gguf"
SPLIT_NUMBER, SPLIT_COUNT, SPLIT_TENSORS = "split.no", "split.count", "split.tensors.count"
SPLIT_KEYS = (SPLIT_NUMBER, SPLIT_COUNT, SPLIT_TENSORS)

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf", re.DOTALL)
_MOST_SHARDS = 99_999
_HINT = "Put all shards into one folder, under the names that they were written with."


@dataclass(frozen=True)
class GgufModel:
    """A model with its metadata, and its tensors in whichever file.

    Attributes:
        files: Its files, in their order.
    """

    files: tuple[GgufFile, ...]

    @property
    def path(self) -> Path:
        """The first file, which has the metadata."""
        return self.files[0].path

    @property
    def entries(self) -> dict[str, Entry]:
        """The metadata."""
        return self.files[0].entries

    @property
    def tensors(self) -> list[Tensor]:
        """Those of all files."""
        return [tensor for file in self.files for tensor in file.tensors]

    @property
    def architecture(self) -> str:
        """What llama.cpp calls the model's kind."""
        entry = self.entries.get(ARCHITECTURE_KEY)
        if entry is None or not entry.text:
            raise broken(self.path, f"it has no {ARCHITECTURE_KEY}", "entry-missing")
        return entry.text

    def entry(self, name: str) -> Entry | None:
        """The architecture's entry of this name, such as ``attention.head_count``."""
        return self.entries.get(f"{self.architecture}.{name}")

    def said(self, names: Sequence[str]) -> Entry | None:
        """The first of the architecture's entries that is there and isn't 0; None: none is."""
        found = map(self.entry, names)
        return next((each for each in found if each is not None and each.whole != 0), None)

    def whole(self, name: str) -> int:
        """The architecture's entry of this name as a whole number."""
        entry = self.entry(name)
        if entry is None or entry.whole is None:
            told = f"it has no whole number {self.architecture}.{name}"
            raise broken(self.path, told, "entry-missing")
        return entry.whole


def read_model(path: Path) -> GgufModel:
    """Reads the headers of a model's file, or of all its shards."""
    named = read_header(path)
    count = _whole(named, SPLIT_COUNT, 1)
    if count <= 1:
        return GgufModel((named,))
    return GgufModel(tuple(_shards(named, count)))


def shard_path(path: Path, number: int, count: int) -> Path:
    """Where a shard of a file lies; they are counted from 0, and in the names from 1."""
    return path.with_name(f"{path.stem}-{number + 1:05}-of-{count:05}.gguf")


def _shards(named: GgufFile, count: int) -> Iterator[GgufFile]:
    told = _SHARD.fullmatch(named.path.name)
    if told is None or int(told["count"]) != count or count > _MOST_SHARDS:
        raise GgufFileError(
            f"{named.path} is one of {count} shards, but its name does not say so: they end in "
            f"-00001-of-{count:05}.gguf.",
            _HINT,
            code="shard-name",
        )
    names: set[str] = set()
    for number in range(count):
        shard = _shard(
            named, shard_path(named.path.with_name(told["stem"] + ".gguf"), number, count)
        )
        if (_whole(shard, SPLIT_NUMBER, -1), _whole(shard, SPLIT_COUNT, 1)) != (number, count):
            told_of = f"it is not shard {number} of {count} by its {SPLIT_NUMBER}, {SPLIT_COUNT}"
            raise broken(shard.path, told_of, "shard-mismatch", _HINT)
        twice = names.intersection(tensor.name for tensor in shard.tensors)
        if twice:
            told_of = f"{min(twice)} is in another shard, too"
            raise broken(shard.path, told_of, "tensor-twice", _HINT)
        names.update(tensor.name for tensor in shard.tensors)
        yield shard
    if len(names) != _whole(named, SPLIT_TENSORS, len(names)):
        wanted = _whole(named, SPLIT_TENSORS, 0)
        told_of = f"its shards have {len(names)} tensors, not {wanted}"
        raise broken(named.path, told_of, "shard-mismatch", _HINT)


def _shard(named: GgufFile, path: Path) -> GgufFile:
    if path.name == named.path.name:
        return named
    try:
        return read_header(path, path.parent)
    except FileNotFoundError as error:
        raise GgufFileError(
            f"{named.path} is one of several shards, and {path} is missing.",
            _HINT,
            code="shard-missing",
        ) from error


def _whole(file: GgufFile, key: str, absent: int) -> int:
    entry = file.entries.get(key)
    number = absent if entry is None else entry.whole
    if number is None:
        raise broken(file.path, f"{key} is no whole number", "entry-missing")
    return number
