"""Multiple-choice items of a local file: JSON lines, one item each."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import (
    Field,
    PlainSerializer,
    PlainValidator,
    StringConstraints,
    TypeAdapter,
    ValidationError,
)

from exporter.artifacts import TaskResult
from exporter.compare.intervals import difference_interval
from exporter.errors import ComparisonError, TaskError, UnsafeInputError, blaming, first_line
from exporter.files import sha256_bytes
from exporter.models.ablation.damage import Floats
from graph_passes.files.reading import parse_json

FORMAT_HINT = (
    'Each line is {"query": TEXT, "choices": [TEXT, ...], "gold": NUMBER} or '
    '{"context_options": [TEXT, ...], "continuation": TEXT, "gold": NUMBER}.'
)
_ASKS = ("Question:", "Passage:")
Text = Annotated[str, StringConstraints(pattern=r"\S")]
Texts = Annotated[list[Text], Field(min_length=2)]
SchemaOf = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""The types of a line's fields, by what it has."""
_adapter: Callable[[Any], TypeAdapter[Any]] = cache(TypeAdapter)


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

    def records(
        self, schema_of: SchemaOf, hint: str, limit: int | None = None
    ) -> list[tuple[str, dict[str, Any]]]:
        """Where each line is, and its object; of the first that many, or of all."""
        return [(at, _record(at, line, schema_of, hint)) for at, line in self.lines[:limit]]


def broken(message: str, hint: str) -> TaskError:
    """The error for a file that holds no such task."""
    return TaskError(message, hint, code="broken-task-file")


def _record(where: str, line: str, schema_of: SchemaOf, hint: str) -> dict[str, Any]:
    try:
        record = parse_json(line, "it")
    except (ValueError, UnsafeInputError) as error:
        raise broken(f"{where}: not valid JSON ({first_line(error)}).", hint) from None
    if not isinstance(record, dict):
        raise broken(f"{where}: no JSON object.", hint)
    for key, kind in schema_of(record).items():
        try:
            _adapter(kind).validate_python(record.get(key), strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            words = f'"{key}" is {record.get(key)!r:.80}: {first["msg"]}'
            raise broken(f"{where}: {words}.", hint) from None
    return record


def read_task_file(folder: Path, name: str) -> TaskFile:
    """Reads ``NAME.jsonl``."""
    path, known = folder / f"{name}.jsonl", sorted(file.stem for file in folder.glob("*.jsonl"))
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        raise TaskError(
            f"{folder} has no task {name!r}.{f' Did you mean {near[0]}?' if near else ''}",
            f"It has: {', '.join(known)}." if known else "Name a folder of NAME.jsonl files.",
            code="unknown-task",
        )
    try:
        content = path.read_bytes()
        text = content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise broken(f"{path} can't be read: {error}.", FORMAT_HINT) from error
    lines = tuple(
        (f"{path}, line {number}", line)
        for number, line in enumerate(text.split("\n"), start=1)
        if line.strip()
    )
    if not lines:
        raise broken(f"{path} holds no item.", FORMAT_HINT)
    return TaskFile(name, path.name, sha256_bytes(content), lines)


def read_task(folder: Path, name: str, *, limit: int | None = None) -> TaskItems:
    """Reads the multiple-choice items of ``NAME.jsonl``."""
    return choice_task(read_task_file(folder, name), limit)


def choice_task(file: TaskFile, limit: int | None) -> TaskItems:
    """The multiple-choice items of a file.

    There is an ``acc_norm`` where choices of unlike length are compared: not where one
    continuation follows several texts.
    """
    items = tuple(
        _item(record, where) for where, record in file.records(_schema, FORMAT_HINT, limit)
    )
    one_context = all(len({context for context, _ in item.pairs}) == 1 for item in items)
    metrics = ("acc", "acc_norm") if one_context else ("acc",)
    return TaskItems(file.name, file.source, items, metrics, file.sha256)


def _schema(record: Mapping[str, Any]) -> Mapping[str, Any]:
    if "context_options" in record:
        return {"context_options": Texts, "continuation": Text, "gold": int}
    return {"query": Text, "choices": Texts, "gold": int}


def _item(record: dict[str, Any], where: str) -> Item:
    several = "context_options" in record
    choices = record["context_options" if several else "choices"]
    common, gold = record["continuation" if several else "query"], record["gold"]
    if not 0 <= gold < len(choices):
        words = f'"gold" is {gold}, which is none of the {len(choices)} choices'
        raise broken(f"{where}: {words}.", FORMAT_HINT)
    if several:
        pairs = tuple((choice, f" {common}") for choice in choices)
    else:
        pairs = tuple((_prompt(common), f" {choice}") for choice in choices)
    return Item(pairs, tuple(len(choice) for choice in choices), gold)


def _prompt(query: str) -> str:
    """As lm-eval's templates: a question is closed by a line ``Answer:``, other text is not."""
    return f"{query.rstrip()}\nAnswer:" if query.startswith(_ASKS) else query


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


def failing_as_task(what: str, hint: str) -> AbstractContextManager[None]:
    """Runs lm-eval; data sets, templates, tasks and the hub raise classes of their own."""
    return blaming(f"lm-eval can't score {what}", hint, TaskError, "lm-eval-failed")
