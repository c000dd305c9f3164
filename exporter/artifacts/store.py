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


_ENGINE_RECORDS = (".engine.json", ".plan.json")


def key_hash(made_from: Any) -> str:
    """The hash of everything that an entry was made from; JSON, but for what ``str`` tells."""
    return sha256_bytes(json.dumps(made_from, sort_keys=True, default=str).encode())


def _content_hash(path: Path) -> str:
    """A file's hash; of an engine's record without the check, which is made anew on each card."""
    if path.name.endswith(_ENGINE_RECORDS):
        with contextlib.suppress(UnsafeInputError, ValueError, TypeError):  # another JSON file
            return key_hash({**read_json(path, limit=TABLE_BYTES), "check": None})
    return sha256_file(path)


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
    parents: dict[str, str] | None = None  # what it was made from: hashes by name

    @classmethod
    def of(
        cls,
        key: str,
        folder: Path,
        files: Iterable[Path],
        value: Any = None,
        parents: dict[str, str] | None = None,
    ) -> StoreEntry:
        """What was finished just now, with files below a folder."""
        names = {path.relative_to(folder).as_posix(): _content_hash(path) for path in files}
        return cls(key=key, files=names, value=value, parents=parents)

    def holds(self, key: str, path_of: Callable[[str], Path]) -> bool:
        """The rule: whether it was made from the same, and its files are as they were."""
        return self.key == key and all(
            path.is_file() and _content_hash(path) == sha256
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


_WORK, _NEW, _NEXT = "work", "new", "stages-next.json"
Make = Callable[[Path], Any]
"""Writes a stage's results into an empty folder, as the output folder will have them, and gives
notes."""


class StageLedger:
    """The stages that were finished in an output folder.

    Each is made in a folder of its own, which one rename takes to the workplace. From there its
    results appear in the output folder, at once where nothing in it is of another request.
    """

    def __init__(
        self, root: Path, *, force: bool = False, given: Mapping[str, str] | None = None
    ) -> None:
        self._root, self._home = root, root / FOLDER
        self._path, self._work = self._home / "stages.json", self._home / _WORK
        self._force = force
        self._given = given or {}  # hashes of what is no stage's, by name
        self._made: set[str] = set()
        self._used: set[str] = set()
        self._forgotten: set[str] = set()
        self._stages, self._published = _read_memory(self._path)

    @property
    def is_new(self) -> bool:
        """True when depthcut has never finished a stage here."""
        return not self._path.exists()

    def path(self, name: str) -> Path:
        """Where a result is now: in the workplace when newly made, else in the output folder."""
        top = Path(name).parts[0]
        for stage, entry in self._stages.items():
            folder = self._work / stage
            if os.path.lexists(folder / top) and top in _tops(entry.files):
                return folder / name
        return self._root / name

    def final(self, path: Path) -> Path:
        """Where a path in the workplace will be; any other as it is."""
        if not path.is_relative_to(self._work):
            return path
        return self._root.joinpath(*path.relative_to(self._work).parts[1:])

    def once(
        self,
        stage: str,
        key: Mapping[str, Any],
        make: Make,
        *,
        of: Iterable[str] = (),  # stages and given things that it is made from
        shared: Path | None = None,  # a folder of stages that several runs have in common
    ) -> str:
        """Finishes a stage; tells whether it is ``reused``, another run's ``shared``, or ``made``.

        A second run that shares the folder waits until the first one has made the stage.
        """
        known = self._used | self._given.keys()
        parents = {name: self._hash(name) for name in of if name in known}
        hashed = key_hash([key, parents])
        if self._valid(stage, hashed):
            return "reused"
        how = "made"
        if shared is None:
            self._settle(stage, self._making(hashed, parents, make))
        else:
            place = shared / f"{stage}-{hashed[:32]}"
            with in_turn(place):
                there = StageLedger(place)
                if there._valid(stage, hashed):
                    how, entry = "shared", there._stages[stage]
                    self._take(stage, entry, there._work / stage)
                else:
                    entry = self._making(hashed, parents, make)
                    # First: what is recorded isn't shared any more.
                    there._take(stage, entry, self._home / _NEW)
                    self._settle(stage, entry)
        self._appear(stage)
        return how

    def _appear(self, stage: str) -> None:
        """Publishes what is finished, where nothing else is there or waits that may not fit to it.

        Where it waits, all that follows does: nobody is left with a path that has gone.
        """
        used = _files(self._stages[name] for name in self._used)
        rest = [path for path in self._work.glob("*") if path.is_file() or any(path.iterdir())]
        if rest == [self._work / stage] and self._published.keys() <= used.keys():
            self._publish()

    def _valid(self, stage: str, hashed: str) -> bool:
        """Tells whether a stage was made from this key and its files are as they were."""
        entry = self._stages.get(stage)
        forced = self._force and stage not in self._made
        if forced or entry is None or not entry.holds(hashed, self.path):
            return False
        self._used.add(stage)
        return True

    def _making(self, hashed: str, parents: dict[str, str], make: Make) -> StoreEntry:
        new = self._emptied()
        notes = make(new)
        placing.remove_tree(new / FOLDER)  # of who wrote a part of it aside
        files = sorted(path for path in new.rglob("*") if path.is_file())
        return StoreEntry.of(hashed, new, files, notes, parents)

    def _emptied(self) -> Path:
        new = self._home / _NEW
        placing.remove_tree(new)
        new.mkdir(parents=True)
        return new

    def _take(self, stage: str, entry: StoreEntry, source: Path) -> None:
        """Takes a stage over from another folder."""
        new = self._emptied()
        for name in entry.files:
            _link(source / name, new / name, source)
        self._settle(stage, entry)

    def _settle(self, stage: str, entry: StoreEntry) -> None:
        """Takes what was made to the workplace, and writes down that the stage is finished."""
        placing.remove_tree(self._work / stage)
        self._work.mkdir(exist_ok=True)
        (self._home / _NEW).rename(self._work / stage)
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

    def copy(self, stage: str, top: str, target: Path, leave_out: Sequence[str] = ()) -> None:
        """Copies what a stage has written below a folder of results to another folder."""
        folder = self.path(top)
        names = (Path(name) for name in self._stages[stage].files)
        for inner in (name.relative_to(top) for name in names if name.parts[0] == top):
            if not any(fnmatch(inner.name, pattern) for pattern in leave_out):
                (target / inner).parent.mkdir(parents=True, exist_ok=True)
                copy_file(folder / inner, target / inner, folder)

    def publish(self) -> list[str]:
        """Moves all that this run made or used to the output folder; tells what it removes there.

        That is what no stage has any more, and what was made from other things than are here now.
        All of it happens, or none. The user's own files stay, in folders that are replaced too.
        """
        stale = self._stale()
        for stage in (self._forgotten | stale) & self._stages.keys():
            del self._stages[stage]
        self._used -= self._forgotten
        self._forgotten.clear()
        self._publish()
        placing.remove_tree(self._work)
        return sorted(stale)

    def _stale(self) -> set[str]:
        gone: set[str] = set()

        def now(name: str) -> str | None:
            left = name not in gone and (name in self._given or name in self._stages)
            return self._hash(name) if left else None

        others = {name: e for name, e in self._stages.items() if name not in self._used}
        while (
            more := {
                stage
                for stage, entry in others.items()
                if entry.parents is None or any(now(n) != h for n, h in entry.parents.items())
            }
            - gone
        ):
            gone |= more
        return gone

    def _hash(self, name: str) -> str:
        return self._given[name] if name in self._given else self.files_hash(name)

    def _publish(self) -> None:
        kept = _files(self._stages.values())
        entries = {stage: self._stages[stage].files for stage in self._used}
        used = {name: sha256 for files in entries.values() for name, sha256 in files.items()}
        tops = {(stage, top) for stage, files in entries.items() for top in _tops(files)}
        new = {top: at for stage, top in sorted(tops) if (at := self._work / stage / top).exists()}
        foreign = [pair for name, at in new.items() for pair in self._foreign(name, at)]
        others = _tops(kept) - _tops(used)
        stale = {n for n in self._published if n not in kept and Path(n).parts[0] not in others}
        gone = [self._root / name for name in sorted(stale) if self._is_ours(name)]
        self._published = {**{n: h for n, h in self._published.items() if n in kept}, **used}
        gone = [path for path in gone if path.relative_to(self._root).parts[0] not in new]
        self._place(new, gone, foreign)
        _remove_empty(*self._work.glob("*"))

    def drop(self, *tops: str) -> None:
        """Removes what is published under these names of the output folder, and is unchanged."""
        wanted = [name for name in sorted(self._published) if Path(name).parts[0] in tops]
        gone = [self._root / name for name in wanted if self._is_ours(name)]
        self._published = {n: h for n, h in self._published.items() if n not in wanted}
        self._place({}, gone, [])

    def _place(
        self,
        new: Mapping[str, Path],
        gone: Sequence[Path],
        foreign: Sequence[tuple[Path, Path]],
    ) -> None:
        write_private(self._home / _NEXT, self._memory())
        moves = [(path, self._root / name) for name, path in new.items()]
        placing.place(self._home, [*moves, (self._home / _NEXT, self._path)], gone, foreign)
        (self._home / _NEXT).unlink(missing_ok=True)

    def _is_ours(self, name: str) -> bool:
        """Whether a file is what the record says that an earlier run wrote, and lies inside."""
        path = self._root / name
        inside = real(path.parent).is_relative_to(real(self._root))
        plain = path.is_file() and not path.is_symlink()
        return inside and plain and _content_hash(path) == self._published.get(name)

    def _foreign(self, name: str, new: Path) -> Iterator[tuple[Path, Path]]:
        """What isn't ours in a folder that is replaced: where it is after that, and where now."""
        old = self._root / name
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
            if is_name(name) and len(Path(name).parts) == 1:
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
    for rest in (gone_of(home), home / _NEW):
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
