"""Multiple-choice items of a local file: JSON lines, one item each."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import PlainSerializer, PlainValidator

from exporter.artifacts import TaskResult
from exporter.compare.intervals import difference_interval
from exporter.errors import (
    ComparisonError,
    DepthcutError,
    TaskError,
    UnsafeInputError,
    first_line,
    pass_on_memory_error,
)
from exporter.files import sha256_bytes
from exporter.models.ablation.damage import Floats
from graph_passes.files.reading import parse_json

FORMAT_HINT = (
    'Each line is {"query": TEXT, "choices": [TEXT, ...], "gold": NUMBER} or '
    '{"context_options": [TEXT, ...], "continuation": TEXT, "gold": NUMBER}.'
)
_ASKS = ("Question:", "Passage:")


@dataclass(frozen=True)
class Item:
    """A question with its answers."""

    pairs: tuple[tuple[str, str], ...]
    lengths: tuple[int, ...]
    gold: int


@dataclass(frozen=True)
class TaskItems:
    """A task's items."""

    name: str
    source: str
    items: tuple[Item, ...]
    metrics: tuple[str, ...]
    sha256: str


@dataclass(frozen=True)
class TaskFile:
    """The lines of a task's file."""

    name: str
    source: str
    sha256: str
    lines: tuple[tuple[str, str], ...]  # where each is, and its text; one at least, none blank

    def records(self, limit: int | None = None) -> list[tuple[str, dict[str, Any]]]:
        """Where each line is, and its object; of the first that many, or of all."""
        return [(where, _record(line, where)) for where, line in self.lines[:limit]]


def read_task_file(folder: Path, name: str) -> TaskFile:
    """Reads ``NAME.jsonl``."""
    path = folder / f"{name}.jsonl"
    _refuse_unknown(folder, name)
    try:
        content = path.read_bytes()
        text = content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(
            f"{path} can't be read: {error}.", FORMAT_HINT, code="unreadable"
        ) from error
    lines = tuple(
        (f"{path}, line {number}", line)
        for number, line in enumerate(text.split("\n"), start=1)
        if line.strip()
    )
    if not lines:
        raise TaskError(f"{path} holds no item.", FORMAT_HINT, code="no-items")
    return TaskFile(name, path.name, sha256_bytes(content), lines)


def read_task(folder: Path, name: str, *, limit: int | None = None) -> TaskItems:
    """Reads the multiple-choice items of ``NAME.jsonl``."""
    return choice_task(read_task_file(folder, name), limit)


def choice_task(file: TaskFile, limit: int | None) -> TaskItems:
    """The multiple-choice items of a file.

    There is an ``acc_norm`` where choices of unlike length are compared: not where one
    continuation follows several texts.
    """
    items = tuple(_item(record, where) for where, record in file.records(limit))
    one_context = all(len({context for context, _ in item.pairs}) == 1 for item in items)
    metrics = ("acc", "acc_norm") if one_context else ("acc",)
    return TaskItems(file.name, file.source, items, metrics, file.sha256)


def known_tasks(folder: Path) -> list[str]:
    """The names of a folder's tasks."""
    if not folder.is_dir():
        raise TaskError(
            f"{folder} is no folder.", "Name one that holds NAME.jsonl files.", code="no-folder"
        )
    return sorted(path.stem for path in folder.glob("*.jsonl"))


def _refuse_unknown(folder: Path, name: str) -> None:
    known = known_tasks(folder)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        text = f" Did you mean {near[0]}?" if near else ""
        raise TaskError(
            f"{folder} has no task {name!r}.{text}",
            f"It has: {', '.join(known)}." if known else "It holds no NAME.jsonl file.",
            code="unknown-task",
        )


def _record(line: str, where: str) -> dict[str, Any]:
    try:
        record = parse_json(line, "it")
    except (ValueError, UnsafeInputError) as error:
        raise TaskError(
            f"{where}: not valid JSON ({first_line(error)}).", FORMAT_HINT, code="not-json"
        ) from None
    if not isinstance(record, dict):
        raise TaskError(f"{where}: no JSON object.", FORMAT_HINT, code="not-an-object")
    return record


def _item(record: dict[str, Any], where: str) -> Item:
    several = "context_options" in record
    choices = texts_in(record, "context_options" if several else "choices", where)
    common = text_in(record, "continuation" if several else "query", where)
    gold = record.get("gold")
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(choices):
        raise TaskError(
            f'{where}: "gold" is {gold!r}, which is none of the {len(choices)} choices.',
            FORMAT_HINT,
            code="gold-out-of-range",
        )
    if several:
        pairs = tuple((choice, f" {common}") for choice in choices)
    else:
        pairs = tuple((_prompt(common), f" {choice}") for choice in choices)
    return Item(pairs, tuple(len(choice) for choice in choices), gold)


def _prompt(query: str) -> str:
    """As lm-eval's templates: a question is closed by a line ``Answer:``, other text is not."""
    return f"{query.rstrip()}\nAnswer:" if query.startswith(_ASKS) else query


def texts_in(record: Mapping[str, Any], key: str, where: str, hint: str = FORMAT_HINT) -> list[str]:
    """Two or more texts of a line."""
    values = record.get(key)
    if not isinstance(values, list) or len(values) < 2:
        raise TaskError(
            f'{where}: "{key}" is no list of two or more texts.', hint, code="too-few-texts"
        )
    return [_checked(value, key, where, hint) for value in values]


def text_in(record: Mapping[str, Any], key: str, where: str, hint: str = FORMAT_HINT) -> str:
    """A text of a line."""
    return _checked(record.get(key), key, where, hint)


def _checked(value: Any, key: str, where: str, hint: str = FORMAT_HINT) -> str:
    if not isinstance(value, str) or not value.strip():
        raise TaskError(f'{where}: "{key}" holds no text.', hint, code="empty-text")
    return value


_Kept = Annotated[
    Floats,
    PlainValidator(lambda values: np.array(values, np.float64)),
    PlainSerializer(lambda values: values.tolist()),
]
"""An array that goes to JSON and back."""


@dataclass(frozen=True)
class TaskScores:
    """One arm's scores of one task."""

    task: str
    source: str
    metrics: Mapping[str, _Kept]
    lower_is_better: frozenset[str] = frozenset()
    log_likelihoods: Sequence[Sequence[float]] = field(default=())


def compare_scores(baseline: TaskScores, candidate: TaskScores) -> list[TaskResult]:
    """Both arms' scores of the same items, a result for each metric."""
    if {name: len(values) for name, values in baseline.metrics.items()} != {
        name: len(values) for name, values in candidate.metrics.items()
    }:
        raise ComparisonError(f"The arms have scores of other items of {baseline.task}.")
    return [_result(baseline, candidate, metric) for metric in baseline.metrics]


def _result(baseline: TaskScores, candidate: TaskScores, metric: str) -> TaskResult:
    pair = baseline.metrics[metric], candidate.metrics[metric]
    return TaskResult(
        task=baseline.task,
        metric=metric,
        items=len(pair[0]),
        baseline=float(pair[0].mean()),
        candidate=float(pair[1].mean()),
        difference=difference_interval(*pair),
        source=baseline.source,
        higher_is_better=metric not in baseline.lower_is_better,
    )


@contextmanager
def failing_as_task(what: str, hint: str) -> Iterator[None]:
    """Runs lm-eval; what it raises becomes an error of the task.

    Data sets, templates, tasks and the hub raise classes of their own. Our own errors pass, and so
    does a want of memory.
    """
    try:
        yield
    except DepthcutError:
        raise
    except Exception as error:
        pass_on_memory_error(error)
        raise TaskError(
            f"lm-eval can't score {what}: {first_line(error)}.", hint, code="lm-eval-failed"
        ) from error
