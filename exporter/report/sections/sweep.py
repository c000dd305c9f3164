"""A sweep's table in sections: what each cell gains and costs, the cut alone, what failed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from exporter.artifacts import FEWEST_ROUNDS, SweepCell, SweepReport, SweepResult, SweepShape
from exporter.artifacts.figures import BRIEF, Figure
from exporter.printable import counted, relative_change
from exporter.report.sections.blocks import (
    Block,
    Bullets,
    Cell,
    Command,
    Document,
    Grid,
    Link,
    Note,
    Section,
    Sign,
    Tone,
    present,
    verdict_sign,
)
from exporter.report.words import dropped_lines, or_dash, speedup_words

_EACH = (
    "Speed is how many times as fast the cut model is, with its 95 % interval. The whole model in "
    "float that a quantised cell is held against was timed in the same rounds and read the same "
    "text; that of a cell in fp16 or bf16 is in that precision too. What the cut alone does in a "
    "cell's own precision, its own report says."
)


def letter(index: int) -> str:
    """A cell's letter: A to Z, then A1 and so on."""
    round_, place = divmod(index, 26)
    return chr(ord("A") + place) + (str(round_) if round_ else "")


@dataclass(frozen=True)
class FinishedCell:
    """A finished cell with its letter."""

    letter: str
    cell: SweepCell
    result: SweepResult

    def words(self, figure: Figure) -> str:
        """A figure against the whole model in float, where that was measured beside it."""
        whole, own = self.result.figures.get(figure.key, (None, None))
        text = or_dash(own, figure.row)
        if own is None or not whole or not math.isfinite(own / whole):
            return text
        return f"{text} ({relative_change(whole, own)})"


def _finished(report: SweepReport) -> list[FinishedCell]:
    """The cells that have a result; their letters count all cells, so that they stay."""
    return [
        FinishedCell(letter(index), cell, cell.result)
        for index, cell in enumerate(report.cells)
        if cell.result is not None and cell.status == "done"
    ]


def gain(shape: SweepShape) -> tuple[float, float, float]:
    """How many times as fast as the whole model in float, and the interval."""
    if shape.over_float is not None:
        return shape.over_float.value, *shape.over_float.ci95
    return shape.speedup.ratio, *shape.speedup.ci95


def sweep_lead(report: SweepReport) -> str:
    """The sweep in a sentence."""
    counts = Counter(cell.status for cell in report.cells)
    axes = ("model", "plan", "precision")
    numbers = (len({getattr(cell, axis) for cell in report.cells}) for axis in axes)
    text = " x ".join(map(counted, numbers, axes))
    states = [f"{counts['done']} done"]
    states += [f"{counts['failed']} failed"] if counts["failed"] else []
    states += [f"{counts['missing']} not run"] if counts["missing"] else []
    return f"{text}: {counted(len(report.cells), 'cell')}, {', '.join(states)}."


def sweep_document(report: SweepReport) -> Document:
    """All sections that there is something to say in."""
    rows, grid = _finished(report), cells_grid(report)
    blocks: list[Block] = [grid, Note(_EACH)] if rows else [grid]
    sections = [
        Section("cells", "All cells", blocks, stays_open=True),
        _failures(report),
        _machines(rows),
        _plans(rows),
        Section("file", "The sweep's file", [Command(report.text.rstrip(), "yaml")]),
    ]
    return Document(
        command="sweep",
        version=report.versions.get("depthcut", ""),
        title="Sweep",
        subject=report.source,
        lead=sweep_lead(report),
        sections=present(sections),
    )


def cells_grid(report: SweepReport, *, brief: bool = False) -> Grid:
    """A row a cell, finished or not; where ``brief``, speedups stand without their intervals."""
    rows = _finished(report)
    shapes, known = _shape_names(rows), {row.letter: row for row in rows}
    header = ["model", "cell", "precision", *shapes, *(one.brief for one in BRIEF), "files, MB"]
    table: list[list[Cell]] = []
    for index, cell in enumerate(report.cells):
        new = index == 0 or cell.model != report.cells[index - 1].model
        row = known.get(letter(index))
        name = f"{letter(index)}: {cell.plan}"
        figures = (
            _figures(row, shapes, brief) if row else [_state(cell), *["-"] * (len(header) - 4)]
        )
        link: Cell = Link(name, f"{cell.folder}/report.html") if row else name
        table.append([cell.model if new else "", link, cell.precision, *figures])
    return Grid("Against the whole model in float", header, table, right=range(3, len(header)))


def _shape_names(rows: Sequence[FinishedCell]) -> list[str]:
    return list(dict.fromkeys(shape.name for row in rows for shape in row.result.shapes))


def _state(cell: SweepCell) -> Sign:
    return Sign("failed", "bad") if cell.status == "failed" else Sign("not run", "unsure")


def _figures(row: FinishedCell, shapes: Sequence[str], brief: bool) -> list[Cell]:
    result = row.result
    speeds = {shape.name: _speed(shape, brief) for shape in result.shapes}
    size = f"{result.candidate_bytes / 1e6:,.1f}"
    return [
        *(speeds.get(shape, "-") for shape in shapes),
        *map(row.words, BRIEF),
        f"{size} ({relative_change(result.whole_bytes, result.candidate_bytes)})",
    ]


def _speed(shape: SweepShape, brief: bool) -> Sign:
    """The gain, with a sign for whether that is one: by the verdict, or by the interval."""
    ratio, low, high = gain(shape)
    tone: Tone = verdict_sign(shape.verdict).tone
    if shape.over_float is not None and shape.rounds >= FEWEST_ROUNDS:
        tone = "good" if low > 1 else "bad" if high < 1 else "unsure"
    words = f"{ratio:.2f}x" if brief else speedup_words(ratio, (low, high), digits=2)
    return Sign(words, tone)


def _failures(report: SweepReport) -> Section | None:
    table = [
        [
            f"{cell.model}, {cell.plan}, {cell.precision}",
            cell.failure.error,
            " ".join(filter(None, (cell.failure.message, cell.failure.hint))),
        ]
        for cell in report.cells
        if cell.failure is not None
    ]
    if not table:
        return None
    grid = Grid("Cells that failed", ["cell", "error", "what it says"], table)
    again = Note("The same command tries these again and leaves the others as they are.")
    return Section("failures", "What failed", [grid, again])


def failure_lines(report: SweepReport) -> list[str]:
    """What each failed cell says, for a terminal."""
    return [
        f"{cell.model}, {cell.plan}, {cell.precision}: {cell.failure.message}"
        for cell in report.cells
        if cell.failure is not None
    ]


def _machines(rows: Sequence[FinishedCell]) -> Section | None:
    """Where it was measured, with a warning where that was not one machine."""
    places: dict[str, list[str]] = {}
    for row in rows:
        where = f"{row.result.machine}, {counted(row.result.threads, 'thread')}"
        places.setdefault(where, []).append(row.letter)
    if not places:
        return None
    lines = [f"{where}: {', '.join(letters)}" for where, letters in places.items()]
    bullets: list[Bullets | Note] = [Bullets(lines)]
    if len({row.result.machine for row in rows}) > 1:
        bullets.append(
            Note(
                "Times of different machines don't compare, and their speedups only with care.",
                "Several machines.",
            )
        )
    notices = dict.fromkeys(notice for row in rows for notice in row.result.notices)
    bullets += [Note(notice) for notice in notices]
    return Section("machines", "Where it was measured", bullets)


def _plans(rows: Sequence[FinishedCell]) -> Section | None:
    """What each plan dropped of each model; it may differ by precision where it was chosen so."""
    lines: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        dropped = "; ".join(dropped_lines(row.result.deletions))
        lines.setdefault((row.cell.model, row.cell.plan, dropped), []).append(row.letter)
    if not lines:
        return None
    table = [
        [model, plan, dropped, ", ".join(letters)]
        for (model, plan, dropped), letters in lines.items()
    ]
    grid = Grid("What was dropped", ["model", "plan", "dropped", "cells"], table)
    return Section("dropped", "What was dropped", [grid])
