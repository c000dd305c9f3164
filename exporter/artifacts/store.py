"""What an interrupted command leaves to the next: entries by name, on disk as they are finished.

One rule says what is stale. The key of an entry is the hash of everything that it was made from; it
is found only under that key, and while its files are as they were. A stale entry stays until
another of its name takes its place.

Whoever opens a store holds the lock of the folder of ours that it lies in: see
:func:`graph_passes.files.placing.working` and :func:`exporter.artifacts.ledger.locked`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, ConfigDict, TypeAdapter, ValidationError
from safetensors.numpy import load_file, save_file

from exporter.errors import UsageError
from exporter.files import sha256_bytes, sha256_file, write_text
from graph_passes.files.locking import FOLDER
from graph_passes.files.placing import append
from graph_passes.files.reading import TABLE_BYTES, parse_json, read_text

_T = TypeVar("_T")
_FIRST = '{"name": '


def key_hash(made_from: Any) -> str:
    """The hash of everything that an entry was made from; JSON, but for what ``str`` tells."""
    return sha256_bytes(json.dumps(made_from, sort_keys=True, default=str).encode())


def is_name(name: str) -> bool:
    """Whether a name is of a file below a folder of results, and outside of the folder of ours."""
    path = Path(name)
    inside = not path.is_absolute() and bool(path.parts) and ".." not in path.parts
    return inside and "\0" not in name and FOLDER not in path.parts


def _checked(name: str) -> str:
    if not is_name(name):
        raise ValueError("this leads out of the folder")
    return name


class StoreEntry(BaseModel):
    """Something that was finished.

    Attributes:
        key: The hash of everything that it was made from.
        files: The SHA-256 of its files, by their names below a folder.
        value: What is to be known of it; JSON.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, ser_json_inf_nan="constants"
    )

    key: str
    files: dict[Annotated[str, AfterValidator(_checked)], str] = {}
    value: Any = None

    @classmethod
    def of(cls, key: str, folder: Path, files: Iterable[Path], value: Any = None) -> StoreEntry:
        """What was finished just now, with files below a folder."""
        names = {path.relative_to(folder).as_posix(): sha256_file(path) for path in files}
        return cls(key=key, files=names, value=value)

    def holds(self, key: str, path_of: Callable[[str], Path]) -> bool:
        """The rule: whether it was made from the same, and its files are as they were.

        Args:
            key: Of what is wanted.
            path_of: Where a file is now.
        """
        return self.key == key and all(
            path.is_file() and sha256_file(path) == sha256
            for path, sha256 in ((path_of(name), sha256) for name, sha256 in self.files.items())
        )


class Store:
    """The entries of one file, one JSON object a line.

    A line that a crash cut short counts as missing, and so does one that is no entry.

    Args:
        path: The file, in a folder that may have to be made; None keeps entries in memory alone.
        made_from: What all entries depend on; JSON.
        folder: The one that entries' files lie below; None: the file's own.

    Raises:
        UsageError: The file is something else.
        UnsafeInputError: A line of it is nested deeper than any that is written here.
    """

    def __init__(
        self, path: Path | None, made_from: Any = None, folder: Path | None = None
    ) -> None:
        self._path, self._made_from, self._own_key = path, made_from, _key(made_from, None)
        self._folder = folder or (Path() if path is None else path.parent)
        self._entries = {} if path is None else _read(path)
        self._begun = False

    @property
    def count(self) -> int:
        """How many entries are found without a key of their own."""
        return sum(entry.key == self._own_key for entry in self._entries.values())

    def find(self, name: str, key: Any = None) -> Any:
        """The value of an entry; None where there is none, or a stale one.

        Args:
            name: Of the entry.
            key: What it depends on beside the store's own key.
        """
        entry = self._entries.get(name)
        if entry is None or not entry.holds(self._key(key), self._folder.joinpath):
            return None
        return entry.value

    def is_stale(self, name: str) -> bool:
        """Whether there is an entry of the name that :meth:`find` doesn't find: it is another."""
        return name in self._entries and self.find(name) is None

    def keep(
        self,
        name: str,
        value: Any,
        key: Any = None,
        files: Iterable[Path] = (),
        *,
        at_once: bool = True,
    ) -> None:
        """Writes an entry down, and through to the disk.

        Args:
            name: Of the entry; one that has it is replaced.
            value: JSON, other than null.
            key: What it depends on beside the store's own key.
            files: What belongs to it, below the store's folder.
            at_once: False writes it with the next entry: alone it isn't worth a file.
        """
        entry = StoreEntry.of(self._key(key), self._folder, files, value)
        self._entries[name] = entry
        if self._path is None or not (at_once or self._begun):
            return
        if self._begun:
            append(self._path, _line(name, entry))
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self._path, "".join(_line(*each) for each in self._entries.items()))
        self._begun = True

    def once(
        self,
        name: str,
        kind: TypeAdapter[_T],
        make: Callable[[], _T],
        key: Any = None,
        on_found: Callable[[], None] = lambda: None,
    ) -> _T:
        """What an earlier call has found under a name, or what is found now.

        Args:
            name: Of the entry.
            kind: Of the result; a kept one of another kind is made again.
            make: Makes the result. One that is empty is not kept.
            key: As for :meth:`find`.
            on_found: Called where it was found.
        """
        kept = self.find(name, key)
        with contextlib.suppress(ValidationError):
            if kept is not None:
                found = kind.validate_python(kept)
                on_found()
                return found
        made = make()
        if made:
            self.keep(name, kind.dump_python(made, mode="json"), key)
        return made

    def find_arrays(self, name: str) -> tuple[Any, dict[str, NDArray[Any]]] | None:
        """The value and the arrays of an entry; None where there is none, or a stale one."""
        value = self.find(name)
        return None if value is None else (value, load_file(self._arrays_of(name)))

    def keep_arrays(self, name: str, value: Any, arrays: Mapping[str, NDArray[Any]]) -> None:
        """The same as :meth:`keep`, for arrays: they get a file of their own, safetensors.

        Args:
            name: Of the entry.
            value: JSON, other than null.
            arrays: By name.
        """
        file = self._arrays_of(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        part.unlink(missing_ok=True)
        save_file({each: np.ascontiguousarray(array) for each, array in arrays.items()}, part)
        part.replace(file)
        self.keep(name, value, files=[file])

    def _arrays_of(self, name: str) -> Path:
        assert self._path is not None
        return self._path.with_suffix("") / f"{key_hash(name)[:32]}.safetensors"

    def _key(self, key: Any) -> str:
        return self._own_key if key is None else _key(self._made_from, key)


def _key(made_from: Any, key: Any) -> str:
    return key_hash([made_from, key])


def _read(path: Path) -> dict[str, StoreEntry]:
    try:
        text = read_text(path, limit=TABLE_BYTES)
    except (FileNotFoundError, UnicodeDecodeError):
        return {}
    if not text.startswith(_FIRST) and not _FIRST.startswith(text):
        raise UsageError(
            f"{path} exists, and was not written by depthcut for an interrupted command.",
            "Move it away, or name another output.",
        )
    entries: dict[str, StoreEntry] = {}
    for line in text.splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
            told = parse_json(line, str(path))
            name = told.pop("name")
            entries[str(name)] = StoreEntry.model_validate(told)
    return entries


def _line(name: str, entry: StoreEntry) -> str:
    return json.dumps({"name": name, **entry.model_dump(mode="json")}) + "\n"
