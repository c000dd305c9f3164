"""What an interrupted command leaves to the next: entries by name, on disk as they are finished."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, ConfigDict, TypeAdapter, ValidationError
from safetensors.numpy import load_file, save_file

from exporter.errors import UsageError
from exporter.files import sha256_bytes, sha256_file, write_private, write_text
from graph_passes.errors import UnsafeInputError
from graph_passes.files import placing
from graph_passes.files.locations import real
from graph_passes.files.locking import FOLDER as FOLDER
from graph_passes.files.locking import held, refuse_links
from graph_passes.files.placing import append
from graph_passes.files.reading import TABLE_BYTES, copy_file, parse_json, read_json, read_text
from graph_passes.files.record import gone_of

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
    """Something that was finished."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, ser_json_inf_nan="constants"
    )

    key: str  # the hash of everything that it was made from
    files: dict[Annotated[str, AfterValidator(_checked)], str] = {}  # SHA-256 by name
    value: Any = None  # JSON

    @classmethod
    def of(cls, key: str, folder: Path, files: Iterable[Path], value: Any = None) -> StoreEntry:
        """What was finished just now, with files below a folder."""
        names = {path.relative_to(folder).as_posix(): sha256_file(path) for path in files}
        return cls(key=key, files=names, value=value)

    def holds(self, key: str, path_of: Callable[[str], Path]) -> bool:
        """The rule: whether it was made from the same, and its files are as they were."""
        return self.key == key and all(
            path.is_file() and sha256_file(path) == sha256
            for path, sha256 in ((path_of(name), sha256) for name, sha256 in self.files.items())
        )


class Store:
    """The entries of one file, one JSON object a line.

    A line that a crash cut short counts as missing, and so does one that is no entry.
    """

    def __init__(self, path: Path | None, made_from: Any = None) -> None:
        self._path, self._made_from, self._own_key = path, made_from, _key(made_from, None)
        self._folder = Path() if path is None else path.parent
        self._entries = {} if path is None else _read(path)
        self._begun = False

    @property
    def count(self) -> int:
        """How many entries are found without a key of their own."""
        return sum(entry.key == self._own_key for entry in self._entries.values())

    def find(self, name: str, key: Any = None) -> Any:
        """The value of an entry; None where there is none, or a stale one."""
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
    ) -> None:
        """Writes an entry down, and through to the disk."""
        entry = StoreEntry.of(self._key(key), self._folder, files, value)
        self._entries[name] = entry
        if self._path is None:
            return
        if self._begun:
            append(self._path, _line(name, entry))
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self._path, "".join(_line(*item) for item in self._entries.items()))
        self._begun = True

    def once(
        self,
        name: str,
        kind: TypeAdapter[_T],
        make: Callable[[], _T],
        key: Any = None,
        on_found: Callable[[], None] = lambda: None,
    ) -> _T:
        """What an earlier call has found under a name, or what is found now."""
        kept = self.find(name, key)
        with contextlib.suppress(ValidationError):
            if kept is not None:
                result = kind.validate_python(kept)
                on_found()
                return result
        made = make()
        if made:
            self.keep(name, kind.dump_python(made, mode="json"), key)
        return made

    def find_arrays(self, name: str) -> tuple[Any, dict[str, NDArray[Any]]] | None:
        """The value and the arrays of an entry; None where there is none, or a stale one."""
        value = self.find(name)
        return None if value is None else (value, load_file(self._arrays_of(name)))

    def keep_arrays(self, name: str, value: Any, arrays: Mapping[str, NDArray[Any]]) -> None:
        """The same as :meth:`keep`, for arrays: they get a file of their own, safetensors."""
        file = self._arrays_of(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        part.unlink(missing_ok=True)
        save_file({key: np.ascontiguousarray(array) for key, array in arrays.items()}, part)
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
            result = parse_json(line, str(path))
            name = result.pop("name")
            entries[str(name)] = StoreEntry.model_validate(result)
    return entries


def _line(name: str, entry: StoreEntry) -> str:
    return json.dumps({"name": name, **entry.model_dump(mode="json")}) + "\n"


_WORK, _NEXT = "work", "stages-next.json"


class StageLedger:
    """The stages that were finished in an output folder."""

    def __init__(self, root: Path, *, force: bool = False) -> None:
        self._root = root
        self._path = root / FOLDER / "stages.json"
        self._force = force
        self._made: set[str] = set()
        self._used: set[str] = set()
        self._forgotten: set[str] = set()
        self._stages, self._published = _read_memory(self._path)
        self.work = root / FOLDER / _WORK  # where a stage writes its files

    @property
    def is_new(self) -> bool:
        """True when depthcut has never finished a stage here."""
        return not self._path.exists()

    def path(self, name: str) -> Path:
        """Where a result is now: in the workplace when newly made, else in the output folder.

        A folder is in one of them as a whole, as it will be published.
        """
        is_new = os.path.lexists(self.work / Path(name).parts[0])
        return (self.work if is_new else self._root) / name

    def valid(self, stage: str, key: Mapping[str, Any]) -> bool:
        """Tells whether a stage was made from this key and its files are as they were."""
        entry = self._stages.get(stage)
        forced = self._force and stage not in self._made
        if forced or entry is None or not entry.holds(key_hash(key), self.path):
            return False
        self._used.add(stage)
        return True

    def once(
        self,
        stage: str,
        key: Mapping[str, Any],
        make: Callable[[], tuple[Sequence[Path], Any]],  # files in the workplace, and notes
        shared: Path | None = None,  # a folder of stages that several runs have in common
    ) -> str:
        """Finishes a stage; tells whether it is ``reused``, another run's ``shared``, or ``made``.

        A second run that shares the folder waits until the first one has made the stage.
        """
        if self.valid(stage, key):
            return "reused"
        if shared is None:
            self.record(stage, key, *make())
            return "made"
        place = shared / f"{stage}-{key_hash(key)[:32]}"
        with in_turn(place):
            there = StageLedger(place)
            if there.valid(stage, key):
                self._take(stage, there._stages[stage], there.work)
                return "shared"
            files, notes = make()
            entry = StoreEntry.of(key_hash(key), self.work, files, notes)
            there._take(stage, entry, self.work)  # first: what is recorded isn't shared any more
            self._finish(stage, entry)
        return "made"

    def _take(self, stage: str, entry: StoreEntry, work: Path) -> None:
        """Takes over a stage from another folder's workplace."""
        for path in (self.work / top for top in _tops(entry.files)):
            placing.remove_tree(path) if path.is_dir() else path.unlink(missing_ok=True)
        for name in entry.files:
            _link(work / name, self.work / name, work)
        self._finish(stage, entry)

    def record(
        self, stage: str, key: Mapping[str, Any], files: Sequence[Path], notes: Any = None
    ) -> None:
        """Writes down that a stage is finished, with its files' hashes and its notes."""
        self._finish(stage, StoreEntry.of(key_hash(key), self.work, files, notes))

    def _finish(self, stage: str, entry: StoreEntry) -> None:
        self._made.add(stage)
        self._used.add(stage)
        self._stages[stage] = entry
        write_private(self._path, self._memory())

    def _memory(self) -> str:
        stages = {name: entry.model_dump(mode="json") for name, entry in self._stages.items()}
        result = {"stages": stages, "published": self._published}
        return json.dumps(result, indent=1, sort_keys=True) + "\n"

    def owns(self, top: str) -> bool:
        """Whether anything of that name in the output folder was ever a stage's."""
        return top in _tops((*self._published, *_files(self._stages.values())))

    def has(self, stage: str) -> bool:
        """Whether a stage was ever finished here."""
        return stage in self._stages

    def forget(self, stage: str) -> None:
        """Lets a stage and its files go when the others are published."""
        self._forgotten.add(stage)

    def notes(self, stage: str) -> Any:
        """What was noted when the stage was finished."""
        return self._stages[stage].value

    def files_hash(self, stage: str) -> str:
        """One hash over the stage's files: the key of whatever is made from them."""
        return key_hash(self._stages[stage].files)

    def hashes(self, *stages: str) -> dict[str, str]:
        """That of each of these stages which this run has made or used."""
        return {stage: self.files_hash(stage) for stage in stages if stage in self._used}

    def copy(self, stage: str, top: str, target: Path, leave_out: Sequence[str] = ()) -> None:
        """Copies what a stage has written below a folder of results to another folder."""
        folder = self.path(top)
        for inner in self._inner(stage, top):
            if not any(fnmatch(inner.name, pattern) for pattern in leave_out):
                (target / inner).parent.mkdir(parents=True, exist_ok=True)
                copy_file(folder / inner, target / inner, folder)

    def take_along(self, stage: str, top: str) -> None:
        """Gives what is published of a stage, and unchanged, to the same folder in the workplace.

        Files that a stage has made there stay. The others are hard links where there are some: the
        published folder goes when the new one takes its place.
        """
        for inner in self._inner(stage, top):
            old, new = self._root / top / inner, self.work / top / inner
            if os.path.lexists(new) or not self._is_ours(f"{top}/{inner.as_posix()}"):
                continue
            _link(old, new, self._root)

    def _inner(self, stage: str, top: str) -> list[Path]:
        names = map(Path, self._stages[stage].files if self.has(stage) else ())
        return [path.relative_to(top) for path in names if path.parts[0] == top]

    def publish(self) -> None:
        """Moves what this run made or used from the workplace to the output folder.

        What earlier runs published and no stage has any more goes. All of it happens, or none. The
        user's own files stay, in folders that are replaced too.
        """
        for stage in self._forgotten:
            del self._stages[stage]
        kept = _files(self._stages.values())
        used = _files(self._stages[stage] for stage in self._used - self._forgotten)
        new = sorted(name for name in _tops(used) if (self.work / name).exists())
        foreign = [pair for name in new for pair in self._foreign(name)]
        others = _tops(kept) - _tops(used)
        stale = {n for n in self._published if n not in kept and Path(n).parts[0] not in others}
        gone = [self._root / name for name in sorted(stale) if self._is_ours(name)]
        self._published = {**{n: h for n, h in self._published.items() if n in kept}, **used}
        gone = [path for path in gone if path.relative_to(self._root).parts[0] not in new]
        self._place(new, gone, foreign)
        self._forgotten.clear()
        placing.remove_tree(self.work)

    def drop(self, *tops: str) -> None:
        """Removes what is published under these names of the output folder, and is unchanged."""
        wanted = [name for name in sorted(self._published) if Path(name).parts[0] in tops]
        gone = [self._root / name for name in wanted if self._is_ours(name)]
        self._published = {n: h for n, h in self._published.items() if n not in wanted}
        self._place([], gone, [])

    def _place(
        self, new: Sequence[str], gone: Sequence[Path], foreign: Sequence[tuple[Path, Path]]
    ) -> None:
        home = self._root / FOLDER
        write_private(home / _NEXT, self._memory())
        moves = [(self.work / name, self._root / name) for name in new]
        placing.place(home, [*moves, (home / _NEXT, self._path)], gone, foreign)
        (home / _NEXT).unlink(missing_ok=True)

    def _is_ours(self, name: str) -> bool:
        """Whether a file is what the record says that an earlier run wrote, and lies inside."""
        path = self._root / name
        inside = real(path.parent).is_relative_to(real(self._root))
        plain = path.is_file() and not path.is_symlink()
        return inside and plain and sha256_file(path) == self._published.get(name)

    def _foreign(self, name: str) -> Iterator[tuple[Path, Path]]:
        """What isn't ours in a folder that is replaced: where it is after that, and where now."""
        old, new = self._root / name, self.work / name
        if old.is_symlink() or not (old.is_dir() and new.is_dir()):
            return
        for folder, folders, files in os.walk(old):
            links = [item for item in folders if Path(folder, item).is_symlink()]
            folders[:] = [item for item in folders if item != FOLDER]
            for path in (Path(folder, item) for item in (*files, *links)):
                if path.relative_to(self._root).as_posix() not in self._published:
                    yield _with_room(new / path.relative_to(old), path), path


def _link(source: Path, target: Path, folder: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # no hard links here, or none between these folders
        copy_file(source, target, folder)


def _with_room(place: Path, path: Path) -> Path:
    """The place that a user's file has in a new folder, if nothing is there."""
    with contextlib.suppress(FileExistsError, NotADirectoryError):
        place.parent.mkdir(parents=True, exist_ok=True)
        if not os.path.lexists(place):
            return place
    raise UsageError(
        f"{path} was not written by depthcut, and is in the place of a new result.",
        "Move it away and run the command again; it resumes from here.",
    )


def _files(entries: Iterable[StoreEntry]) -> dict[str, str]:
    return {name: sha256 for entry in entries for name, sha256 in entry.files.items()}


def _tops(names: Iterable[str]) -> set[str]:
    return {Path(name).parts[0] for name in names}


def _read_memory(path: Path) -> tuple[dict[str, StoreEntry], dict[str, str]]:
    """The finished stages, and what is published of them: name to hash."""
    try:
        result = read_json(path, limit=TABLE_BYTES)
        stages, published = dict(result["stages"]), dict(result["published"])
    except (OSError, ValueError, TypeError, KeyError, UnsafeInputError):
        # No memory, or a broken one: everything is made again.
        return {}, {}
    entries: dict[str, StoreEntry] = {}
    for name, entry in stages.items():
        with contextlib.suppress(ValidationError):  # anybody may have written it
            entries[name] = StoreEntry.model_validate(entry)
    return entries, {name: sha256 for name, sha256 in published.items() if is_name(name)}


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Keeps a second run out of an output folder for as long as the block runs.

    What a killed run left is completed where its files were about to take their places, and else
    cleared away, but for finished stages. A block that made nothing leaves the disk as it was,
    without the folders that were made for it.
    """
    home = root / FOLDER
    with held(home, root):
        placing.complete(home, overwriting=True)
        _clear(home)
        for path in home.iterdir():
            if path.name != placing.RESULTS and path.is_dir():
                refuse_links(path)
        try:
            yield
        finally:
            _clear(home)
            _remove_empty(home / _WORK, home)


def _clear(home: Path) -> None:
    """Removes what a killed run left but for finished stages, and what a publication replaced."""
    for rest in (gone_of(home), home / _WORK / FOLDER):
        placing.remove_tree(rest)
    if not placing.is_pending(home):
        (home / _NEXT).unlink(missing_ok=True)


def _remove_empty(*folders: Path) -> None:
    for folder in sorted(folders, key=lambda path: -len(path.parts)):
        with contextlib.suppress(OSError):
            folder.rmdir()


@contextmanager
def in_turn(root: Path) -> Iterator[None]:
    """Waits until no other process is in such a block for the same folder.

    For what is read, changed and written back in a moment; a run that has :func:`locked` the folder
    for an hour is not waited for.
    """
    with held(root / FOLDER / "turn", root, wait_s=None):
        yield
