"""What both arms say, side by side: answers to prompts; for encoders, nearest neighbours.

A model wrote it, so it is a stranger's: on one line, without what a terminal or a page acts on.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from exporter.artifacts import (
    Answer,
    ComparisonReport,
    NearestNeighbours,
    QueryNeighbours,
    SampleAnswers,
)
from exporter.printable import one_line
from exporter.report.sections.blocks import Block, Grid, Note, Section

_BRIEFLY = 5
"""Prompts on a terminal; the page has all."""
_BRIEF_CHARACTERS = 250
_CUT = "…"


def answers_section(report: ComparisonReport) -> Section | None:
    """Sample answers or nearest neighbours; or why there are none."""
    blocks = list(_blocks(report))
    return Section("answers", "What the models say", blocks, stays_open=True) if blocks else None


def answer_grids(report: ComparisonReport, *, brief: bool = False) -> Iterator[Grid]:
    """The same as tables alone.

    Args:
        report: The comparison.
        brief: For a terminal: the first prompts, shortened, with empty rows between.
    """
    accuracy = report.accuracy
    if accuracy is None:
        return
    if accuracy.answers is not None and accuracy.answers.answers:
        yield _answers(accuracy.answers, brief)
    if accuracy.neighbours is not None and accuracy.neighbours.queries:
        yield _neighbours(accuracy.neighbours, brief)


def _blocks(report: ComparisonReport) -> Iterator[Block]:
    yield from answer_grids(report)
    accuracy = report.accuracy
    if accuracy is None:
        return
    for found in (accuracy.answers, accuracy.neighbours):
        if found is not None and found.left_out:
            yield Note(f"{one_line(found.left_out)}.", lead="Left out:")
    if accuracy.answers is not None and accuracy.answers.answers:
        yield Note(_how_answered(accuracy.answers))
    if accuracy.neighbours is not None and accuracy.neighbours.queries:
        yield Note(_how_near(accuracy.neighbours))


def _how_answered(found: SampleAnswers) -> str:
    asked = "asked in the model's chat template" if found.chat else "continued as they are"
    return (
        f"Prompts ({one_line(found.source)}) were {asked}, with the likeliest token each time, "
        f"for at most {found.new_tokens} tokens; {_CUT} marks an answer that was cut there. A few "
        "answers show what a loss looks like; they don't measure it."
    )


def _how_near(found: NearestNeighbours) -> str:
    return (
        f"Of {found.sentences} sentences ({one_line(found.source)}), those with the highest cosine "
        "of their embedding with the query's, which is in brackets. A few sentences show what a "
        "loss looks like; the cosine and the ranking of pairs on the evaluation text measure it."
    )


def _answers(found: SampleAnswers, brief: bool) -> Grid:
    rows: list[Sequence[str]] = []
    for each in found.answers[: _BRIEFLY if brief else None]:
        rows += [[]] if brief and rows else []
        rows.append([_shown(each.prompt, brief), *_pair(each.baseline, each.candidate, brief)])
    template = ", in the chat template" if found.chat else ""
    header = ["prompt", "baseline", "candidate"]
    return Grid(f"Sample answers{template}", header, rows, is_prose=True)


def _pair(baseline: Answer, candidate: Answer, brief: bool) -> tuple[str, str]:
    first, second = (
        _shown(answer.text, brief) + ("" if answer.ended else f" {_CUT}")
        for answer in (baseline, candidate)
    )
    return first, second


def _neighbours(found: NearestNeighbours, brief: bool) -> Grid:
    rows: list[Sequence[str]] = []
    for each in found.queries:
        rows += [[]] if brief and rows else []
        rows += _ranked(each, brief)
    return Grid("Nearest neighbours", ["query", "baseline", "candidate"], rows, is_prose=True)


def _ranked(each: QueryNeighbours, brief: bool) -> Iterator[list[str]]:
    for place, pair in enumerate(zip(each.baseline, each.candidate, strict=False)):
        query = "" if place else _shown(each.query, brief)
        yield [query, *(f"{_shown(one.sentence, brief)} ({one.cosine:.2f})" for one in pair)]


def _shown(text: str, brief: bool) -> str:
    """A text on one line; what is empty is told, since an empty cell goes on with the one above."""
    line = one_line(" ".join(text.split())) or "(nothing)"
    return textwrap.shorten(line, _BRIEF_CHARACTERS, placeholder=f" {_CUT}") if brief else line
