"""What the arms answer: on the evaluation text, in tasks, in generated text."""

from __future__ import annotations

from collections.abc import Iterator

from exporter.artifacts import (
    Accuracy,
    ComparisonReport,
)
from exporter.artifacts.figures import ANSWERS, FIGURES
from exporter.report.sections.blocks import Block, Grid, Note, Section, other_part
from exporter.report.sections.summary import HEADER, accuracy_grid, task_rows
from exporter.report.sections.verdict import why_no_accuracy
from exporter.report.words import read_by

IMAGES_NOTE = (
    "Both models against the images' labels: top1 is the share of images whose class is the "
    "likeliest, top5 of those whose class is among the five likeliest."
)
_IMAGES = ("images", "images")
_INTERVALS = "In brackets: the 95 % interval over documents or samples, both models on the same."


def accuracy_sections(report: ComparisonReport) -> list[Section | None]:
    """Perplexity and its like, or why there is none; then what else was measured."""
    accuracy = report.accuracy
    if accuracy is None:
        note = Note(f"Not measured: {why_no_accuracy(report)}.")
        return [Section("accuracy", "Accuracy", [note])]
    grid = accuracy_grid(report, "Accuracy on the evaluation text")
    bracketed = any("[" in str(row[3]) for row in grid.rows)
    blocks = [grid, *[Note(_INTERVALS)] * bracketed, *_texts(report, accuracy)]
    return [
        Section("accuracy", "Accuracy", blocks),
        _tasks(report, accuracy),
    ]


def _texts(report: ComparisonReport, accuracy: Accuracy) -> Iterator[Block]:
    kind, of = ("text", ANSWERS[accuracy.compared].counted) if accuracy.images is None else _IMAGES
    yield Note(
        f"Evaluation {kind}: {accuracy.text_source}, {accuracy.tokens:,} {of} "
        f"(SHA-256 `{accuracy.text_sha256[:12]}`)."
    )
    yield from other_part(report.parts, accuracy.text_source)
    if (other := accuracy.other) is not None:
        yield Note(
            f"The second text: {other.text_source}, {other.tokens:,} tokens "
            f"(SHA-256 `{other.text_sha256[:12]}`)."
        )
    compared = "embeddings" if accuracy.embeddings else ANSWERS[accuracy.compared].counted
    measured = {figure.key for figure in FIGURES if any(figure.readings(accuracy))}
    for figure in FIGURES:
        if figure.missing and figure.key not in measured:
            yield Note(figure.missing.format(compared))
    if (text := report.calibration) is None:
        yield Note(f"Which {kind} importance was measured on is not on record here.")
    else:
        known = f"{text.describe(read_by(report))} (SHA-256 `{text.sha256[:12]}`)"
        yield Note(f"Importance was measured on other {kind}: {known}.")
    for figure in FIGURES:
        if figure.note and figure.key in measured:
            yield Note(figure.note)


def _tasks(report: ComparisonReport, accuracy: Accuracy) -> Section | None:
    tasks = accuracy.tasks
    if not tasks:
        return None
    rows = [
        [name if task.higher_is_better else f"{name} (lower is better)", f"{task.items:,}", *cells]
        for task, (name, *cells, _) in zip(tasks, task_rows(report), strict=True)
    ]
    header = ["task", "items", *HEADER[1:4]]
    grid = Grid("Tasks on the same items", header, rows, right=range(1, 5))
    note = Note(
        "The change is candidate minus baseline, of shares in percentage points; in brackets its "
        "95 % interval, from a paired bootstrap over items."
    )
    sources = dict.fromkeys(f"{task.task}: {task.source}" for task in tasks if task.source)
    notes = [Note(f"{'; '.join(sources)}.", lead="Items from:")] if sources else []
    first = [] if accuracy.images is None else [Note(IMAGES_NOTE)]
    return Section("tasks", "Tasks", [*first, grid, note, *notes])
