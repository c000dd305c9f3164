"""Speed, accuracy and size at a glance: rows for every table of both arms."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean

from exporter.artifacts import (
    Answer,
    Arm,
    ComparisonReport,
    SampleAnswers,
    TaskResult,
)
from exporter.artifacts.figures import BRIEF, FIGURES
from exporter.printable import (
    milliseconds,
    one_line,
    relative_change,
    significant,
)
from exporter.report.sections.blocks import Block, Grid, Note, Section
from exporter.report.sections.verdict import headline
from exporter.report.words import (
    PHASES,
    change_words,
    or_dash,
    short_shape,
    speedup_words,
)

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


def accuracy_rows(report: ComparisonReport, *, brief: bool = False) -> list[SummaryRow]:
    """What was measured of the answers on text; what was not is left out.

    Where ``brief``, changes stand without their 95 % intervals.
    """
    accuracy = report.accuracy
    if accuracy is None:
        return []
    rows: list[SummaryRow] = []
    for figure in FIGURES:
        for one in figure.readings(accuracy) if figure.row_name else ():
            before, change = "", ""
            if one.before is not None:
                before = figure.row(one.before)
                change = change_words(one.before, one.value, None if brief else one.interval)
            elif one.interval is not None and not brief:
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


def accuracy_grid(report: ComparisonReport, caption: str) -> Grid:
    """The rows of accuracy as a table."""
    return Grid(caption, HEADER[:4], [row[:4] for row in accuracy_rows(report)], right=(1, 2, 3))


def size_grid(report: ComparisonReport, caption: str) -> Grid:
    """The rows of sizes as a table."""
    return Grid(caption, HEADER[:4], [row[:4] for row in size_rows(report)], right=(1, 2, 3))


_BRIEFLY = 5
"""Prompts on a terminal; the page has all."""
_BRIEF_CHARACTERS = 250
_CUT = "…"


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
        f"for at most {answers.new_tokens} tokens; {_CUT} marks an answer that was cut there. A "
        "few answers show what a loss looks like; they don't measure it."
    )


def _answers(answers: SampleAnswers, brief: bool) -> Grid:
    rows: list[Sequence[str]] = []
    for answer in answers.answers[: _BRIEFLY if brief else None]:
        rows += [[]] if brief and rows else []
        rows.append(
            [_shown(answer.prompt, brief), *_pair(answer.baseline, answer.candidate, brief)]
        )
    template = ", in the chat template" if answers.chat else ""
    header = ["prompt", "baseline", "candidate"]
    return Grid(f"Sample answers{template}", header, rows, is_prose=True)


def _pair(baseline: Answer, candidate: Answer, brief: bool) -> tuple[str, str]:
    first, second = (
        _shown(answer.text, brief) + ("" if answer.ended else f" {_CUT}")
        for answer in (baseline, candidate)
    )
    return first, second


def _shown(text: str, brief: bool) -> str:
    """A text on one line; what is empty is told, since an empty cell goes on with the one above."""
    line = one_line(" ".join(text.split())) or "(nothing)"
    return textwrap.shorten(line, _BRIEF_CHARACTERS, placeholder=f" {_CUT}") if brief else line


def letter(index: int) -> str:
    """A candidate's letter: A to Z, then A1 and so on."""
    round_, place = divmod(index, 26)
    return chr(ord("A") + place) + (str(round_) if round_ else "")


def overview_section(reports: Mapping[str, ComparisonReport]) -> Section:
    """Several reports side by side: what each dropped, and what that did."""
    phases = list(dict.fromkeys(row.phase for r in reports.values() for row in r.latency))
    header = [
        "candidate", "report", "what", *(f"{PHASES.get(p, p)}, speedup" for p in phases),
        *(figure.brief for figure in BRIEF), "parameters",
    ]  # fmt: skip
    rows = [
        [letter(index), name, *_overview(report, phases)]
        for index, (name, report) in enumerate(reports.items())
    ]
    grid = Grid("All candidates", header, rows, right=range(3, len(header)))
    note = "A phase of several shapes has the geometric mean of their speedups."
    return Section("overview", "All candidates", [grid, Note(note)], stays_open=True)


def _overview(report: ComparisonReport, phases: Sequence[str]) -> list[str]:
    arms, logs = report.arms, dict[str, list[float]]()
    for row in report.latency:
        logs.setdefault(row.phase, []).append(math.log(row.speedup.ratio))
    readings = [next(figure.readings(report.accuracy), None) for figure in BRIEF]
    return [
        headline(report),
        *(or_dash(logs.get(p), lambda ratios: f"{math.exp(fmean(ratios)):.3f}x") for p in phases),
        *(or_dash(one, figure.change) for figure, one in zip(BRIEF, readings, strict=True)),
        relative_change(arms.baseline.parameters, arms.candidate.parameters),
    ]
