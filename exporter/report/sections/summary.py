"""Speed, accuracy, tasks, answers and sizes of both arms, for every form of a report."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence

from exporter.artifacts import CUT, Accuracy, Arm, ComparisonReport, SampleAnswers, TaskResult
from exporter.artifacts.figures import ANSWERS, FIGURES
from exporter.printable import milliseconds, one_line, relative_change, significant
from exporter.report.sections.blocks import Block, Grid, Note, Section, other_part
from exporter.report.sections.verdict import why_no_accuracy
from exporter.report.words import change_words, read_by, short_shape, speedup_words

SummaryRow = tuple[str, str, str, str, str]
"""What, baseline, candidate, change, verdict."""

HEADER: SummaryRow = ("", "baseline", "candidate", "change", "verdict")


def latency_rows(report: ComparisonReport) -> list[SummaryRow]:
    """Median times of both arms, the speedup with its interval, and the verdict."""
    return [
        (
            f"{short_shape(row)}, ms",
            milliseconds(row.baseline.median_ms),
            milliseconds(row.candidate.median_ms),
            speedup_words(row.speedup.ratio, row.speedup.ci95, digits=2),
            row.verdict,
        )
        for row in report.latency
    ]


def accuracy_rows(report: ComparisonReport) -> list[SummaryRow]:
    """What was measured of the answers on text; what was not is left out."""
    accuracy = report.accuracy
    if accuracy is None:
        return []
    rows: list[SummaryRow] = []
    for figure in FIGURES:
        for one in figure.readings(accuracy) if figure.row_name else ():
            before, change = "", ""
            if one.before is not None:
                before = figure.row(one.before)
                change = change_words(one.before, one.value, one.interval)
            elif one.interval is not None:
                change = f"[{', '.join(map(figure.row, one.interval.ci95))}]"
            rows.append(
                (figure.words(figure.row_name, accuracy), before, figure.row(one.value), change, "")
            )
    return rows


_SHARES = ("acc", "exact_match", "recall", "top", "wer")
"""What metrics begin with that are shares of items or words."""


def task_rows(report: ComparisonReport) -> list[SummaryRow]:
    """The score of each task, and the difference with its interval: in points of shares."""
    tasks = report.accuracy.tasks if report.accuracy else []
    return [_task(task) for task in tasks]


def _task(task: TaskResult) -> SummaryRow:
    name, ends = f"{task.task}, {task.metric}", (task.baseline, task.candidate)
    change, low, high = task.difference.value, *task.difference.ci95
    if task.metric.startswith(_SHARES):
        before, after = (f"{100 * share:.2f} %" for share in ends)
        points = f"{100 * change:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"
        return name, before, after, points, ""
    before, after = map(significant, ends)
    return name, before, after, f"{change:+#.3g} [{low:+#.3g}, {high:+#.3g}]", ""


def size_rows(report: ComparisonReport) -> list[SummaryRow]:
    """Bytes on disk, parameters, nodes, and KV cache per token; what is none is left out."""

    def sizes(arm: Arm) -> dict[str, tuple[float, int]]:
        return {
            "files, MB": (arm.file_bytes / 1e6, 1),
            "parameters, million": (arm.parameters / 1e6, 2),
            "graph nodes": (arm.nodes, 0),
            "KV bytes per token": (arm.kv_cache_bytes_per_token, 0),
        }

    after = sizes(report.arms.candidate)
    return [
        (
            what,
            f"{before:,.{digits}f}",
            f"{after[what][0]:,.{digits}f}",
            relative_change(before, after[what][0]),
            "",
        )
        for what, (before, digits) in sizes(report.arms.baseline).items()
        if before or after[what][0]
    ]


_BRIEFLY = 5
"""Prompts on a terminal; the page has all."""
_BRIEF_CHARACTERS = 250


def answers_section(report: ComparisonReport) -> Section | None:
    """Sample answers, or why there are none."""
    blocks = list(_blocks(report))
    return Section("answers", "What the models say", blocks, stays_open=True) if blocks else None


def answer_grids(report: ComparisonReport, *, brief: bool = False) -> Iterator[Grid]:
    """The same as a table alone."""
    accuracy = report.accuracy and report.accuracy.answers
    if accuracy and accuracy.answers:
        yield _answers(accuracy, brief)


def _blocks(report: ComparisonReport) -> Iterator[Block]:
    yield from answer_grids(report)
    accuracy = report.accuracy and report.accuracy.answers
    if accuracy and accuracy.left_out:
        yield Note(f"{one_line(accuracy.left_out)}.", lead="Left out:")
    if accuracy and accuracy.answers:
        yield Note(_how_answered(accuracy))


def _how_answered(answers: SampleAnswers) -> str:
    text = "asked in the model's chat template" if answers.chat else "continued as they are"
    return (
        f"Prompts ({one_line(answers.source)}) were {text}, with the likeliest token each time, "
        f"for at most {answers.new_tokens} tokens;{CUT} marks an answer that was cut there. A "
        "few answers show what a loss looks like; they don't measure it."
    )


def _answers(answers: SampleAnswers, brief: bool) -> Grid:
    rows: list[Sequence[str]] = []
    for answer in answers.answers[: _BRIEFLY if brief else None]:
        rows += [[]] if brief and rows else []
        said = (answer.prompt, answer.baseline, answer.candidate)
        rows.append([_shown(text, brief) for text in said])
    template = ", in the chat template" if answers.chat else ""
    header = ["prompt", "baseline", "candidate"]
    before = sum(repeats_itself(answer.baseline) for answer in answers.answers)
    after = sum(repeats_itself(answer.candidate) for answer in answers.answers)
    loops = f"; {after} of the candidate's repeat themselves, {before} of the baseline's"
    return Grid(f"Sample answers{template}{loops * (after > 0)}", header, rows, is_prose=True)


def repeats_itself(answer: str) -> bool:
    """Whether it ends in the same words over and over: six at least, twice at least."""
    words = re.findall(r"\w+", answer.lower())
    periods = ((period, max(6, 2 * period)) for period in range(1, len(words) // 2 + 1))
    return any(
        length <= len(words) and words[period - length :] == words[-length:-period]
        for period, length in periods
    )


def _shown(text: str, brief: bool) -> str:
    """A text on one line; what is empty is told, since an empty cell goes on with the one above."""
    line = one_line(" ".join(text.split())) or "(nothing)"
    return textwrap.shorten(line, _BRIEF_CHARACTERS, placeholder=CUT) if brief else line


IMAGES_NOTE = (
    "Both models against the images' labels: top1 is the share of images whose class is the "
    "likeliest, top5 of those whose class is among the five likeliest."
)
_INTERVALS = "In brackets: the 95 % interval over documents or samples, both models on the same."


def accuracy_sections(report: ComparisonReport) -> list[Section | None]:
    """Perplexity and its like, or why there is none; then what else was measured."""
    accuracy = report.accuracy
    if accuracy is None:
        note = Note(f"Not measured: {why_no_accuracy(report)}.")
        return [Section("accuracy", "Accuracy", [note])]
    rows = [row[:4] for row in accuracy_rows(report)]
    grid = Grid("Accuracy on the evaluation text", HEADER[:4], rows, right=(1, 2, 3))
    bracketed = any("[" in str(row[3]) for row in grid.rows)
    blocks = [grid, *[Note(_INTERVALS)] * bracketed, *_texts(report, accuracy)]
    return [
        Section("accuracy", "Accuracy", blocks),
        _tasks(report, accuracy),
    ]


def _texts(report: ComparisonReport, accuracy: Accuracy) -> Iterator[Block]:
    words = ANSWERS[accuracy.compared]
    kind = "images" if accuracy.compared == "images" else "text"
    yield Note(
        f"Evaluation {kind}: {accuracy.text_source}, {accuracy.tokens:,} {words.counted} "
        f"(SHA-256 `{accuracy.text_sha256[:12]}`)."
    )
    yield from other_part(report.parts, accuracy.text_source)
    if (other := accuracy.other) is not None:
        yield Note(
            f"The second text: {other.text_source}, {other.tokens:,} tokens "
            f"(SHA-256 `{other.text_sha256[:12]}`)."
        )
    measured = {figure.key for figure in FIGURES if any(figure.readings(accuracy))}
    for figure in FIGURES:
        if figure.missing and figure.key not in measured:
            yield Note(figure.missing.format(words.compared))
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
    first = [Note(IMAGES_NOTE)] if accuracy.compared == "images" else []
    return Section("tasks", "Tasks", [*first, grid, note, *notes])
