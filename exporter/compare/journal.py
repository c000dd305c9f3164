"""What a comparison has measured so far, on disk: a run that is killed goes on from there.

A chunk of rounds is kept whole or not at all. Chunks are loads of their own anyway, so that some of
an earlier process are worth as much as those of this one, under the same key: the same files,
options, libraries and machine. Where the number of threads was looked for it is kept, too, and so
are finished results of accuracy; see :mod:`exporter.compare.answers`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.artifacts import ThreadProbe, library_versions
from exporter.artifacts.ledger import FOLDER
from exporter.artifacts.store import key_hash
from exporter.compare.arms import ComparedArm, Pair
from graph_passes.files.placing import append
from graph_passes.files.reading import TABLE_BYTES, parse_json, read_text

if TYPE_CHECKING:
    from exporter.compare.timing.chunk import Chunk
    from exporter.compare.timing.probe import Cell

_NAME = "timing.jsonl"


class Journal:
    """Chunks by cell and number; see ``timing.chunk.Memory``.

    Args:
        root: The output folder.
        key: Everything that times depend on. What was kept under another key is thrown away, once
            there is something to keep under this one.
    """

    def __init__(self, root: Path, key: Mapping[str, Any]) -> None:
        self._path = root / FOLDER / _NAME
        self._head = {"key": key_hash(key)}
        self._probe: ThreadProbe | None = None
        self._answers: dict[str, dict[str, Any]] = {}
        self._chunks = self._read()
        self._begun = False

    @property
    def chunks(self) -> int:
        """How many it brought along."""
        return len(self._chunks)

    @property
    def probe(self) -> ThreadProbe | None:
        """How the number of threads was found, where it was."""
        return self._probe

    def keep_probe(self, probe: ThreadProbe) -> None:
        """Keeps it with the first chunk: alone it is soon found again."""
        self._probe = probe

    def recall(self, cell: Cell, number: int) -> Chunk | None:
        """The chunk of a cell, where it was finished."""
        from exporter.compare.timing.chunk import Chunk

        entry = self._chunks.get(_name(cell, number))
        return None if entry is None else Chunk.from_json(entry["chunk"])

    def keep(self, cell: Cell, number: int, chunk: Chunk) -> None:
        """Writes a finished chunk down, and through to the disk."""
        self._append({"name": _name(cell, number), "chunk": chunk.to_json()})

    def recall_answers(self, name: str, key: str) -> Any:
        """A finished result as JSON; None where there is none under this key."""
        entry = self._answers.get(name)
        return entry["value"] if entry is not None and entry["key"] == key else None

    def keep_answers(self, name: str, key: str, value: Any) -> None:
        """Writes a finished result down, in the place of one of the same name.

        Args:
            name: Of the result.
            key: Hash of what it depends on beside the journal's own key.
            value: JSON.
        """
        self._append({"answers": name, "key": key, "value": value})

    def _append(self, entry: dict[str, Any]) -> None:
        if not self._begun:  # without what is another run's, or was cut off
            self._write()
            self._begun = True
        append(self._path, json.dumps(entry) + "\n")

    def _read(self) -> dict[str, dict[str, Any]]:
        from exporter.compare.timing.chunk import Chunk

        found: dict[str, dict[str, Any]] = {}
        try:
            head, *lines = read_text(self._path, limit=TABLE_BYTES).splitlines()
            if parse_json(head, str(self._path)) != self._head:
                return {}
            for line in lines:
                entry = parse_json(line, str(self._path))
                if "probe" in entry:
                    self._probe = ThreadProbe.model_validate(entry["probe"])
                    continue
                if "answers" in entry:
                    self._answers[entry["answers"]] = {**entry, "key": entry["key"]}
                    continue
                Chunk.from_json(entry["chunk"])
                found[entry["name"]] = entry
        except (OSError, ValueError, KeyError, TypeError):
            # Nothing is there, or the last line was cut off: what stands before it is whole.
            return found
        return found

    def _write(self) -> None:
        from exporter.files import write_text

        probe = () if self._probe is None else ({"probe": self._probe.model_dump(mode="json")},)
        entries = [self._head, *probe, *self._answers.values(), *self._chunks.values()]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self._path, "".join(json.dumps(entry) + "\n" for entry in entries))


def open_journal(pair: Pair, folder: Path) -> Journal:
    """What an earlier run of the same comparison has left in a folder, or a new one.

    Args:
        pair: What times depend on; it need not run yet.
        folder: The output folder.
    """
    from exporter.engines.environment import environment

    threads = pair.options.threads
    machine = environment(threads=threads or 0, gpu=pair.on_gpu)
    same = ("machine", "processor", "cpu_count", "threads", "python", "gpu", "affinity")
    key: dict[str, Any] = {
        "arms": {name: _identity(arm) for name, arm in pair.arms.items()},
        "options": [pair.options.rounds, vars(pair.options.timing)],
        "versions": library_versions(),
        "machine": {name: getattr(machine, name) for name in same},
    }
    journal = Journal(folder, key)
    if journal.chunks:
        pair.progress.say(f"time: going on with {journal.chunks} parts that an earlier run timed")
    return journal


def _identity(arm: ComparedArm) -> list[str]:
    engines = [engine.sha256 for engine in arm.engines]
    return [arm.runner.backend, arm.runner.provider, arm.facts.sha256, *engines]


def forget(root: Path) -> None:
    """Removes what was kept: the report is written."""
    (root / FOLDER / _NAME).unlink(missing_ok=True)


def _name(cell: Cell, number: int) -> str:
    return f"{cell} #{number}"
