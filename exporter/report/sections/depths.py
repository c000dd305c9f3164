"""Ways of dropping at several numbers: what is recommended, what all of them cost, their tasks."""

from __future__ import annotations

from exporter.artifacts import DepthCell, DepthDamage, DepthInt8, DepthsReport, TaskResult
from exporter.printable import percent, significant
from exporter.report.sections.blocks import (
    Block,
    Bullets,
    Cell,
    Document,
    Grid,
    Note,
    Section,
    Sign,
)
from exporter.report.words import KINDS, counted_kind, dropped_briefly, or_dash


def depths_document(report: DepthsReport) -> Document:
    """The answer with all figures, tasks, and what was dropped."""
    rows: list[list[Cell]] = [
        [dropped_words(cell), dropped_briefly(cell.deletions)]
        for cell in report.cells
        if cell.deletions
    ]
    dropped = Grid("In the order of choice", ["way", "dropped"], rows)
    return Document(
        command="depths",
        version=report.versions.get("depthcut", ""),
        title="Pruning at several depths",
        subject=report.model.source,
        lead=answer_words(report),
        sections=[
            _answer(report),
            *_tasks(report),
            Section("dropped", "What was dropped", [dropped]),
        ],
    )


def _answer(report: DepthsReport) -> Section:
    """A row a cell, the recommendation with its reason, and how far the figures go."""
    header = ["dropped", "size", "speed", "perplexity", "healed", "KL, nats", "top-1", ""]
    best, measured = report.recommended, [c for c in report.cells if c.damage is not None]
    whole: list[Cell] = ["nothing", "", "", significant(report.baseline_perplexity)]
    int8, cut_int8 = report.int8[:1], report.int8[1:]
    rows = [whole + [""] * 4, *(_int8_row("nothing", row) for row in int8)]
    for cell in measured:
        rows.append(_row(cell, is_best=cell is best))
        if cell is best:
            healed = cell.least is cell.healed
            rows += [_int8_row(dropped_words(cell), row, healed=healed) for row in cut_int8]
    refused = [f"{c.way} of {c.number}: {c.refused}" for c in report.cells if c.refused]
    reasons = dict.fromkeys(cell.not_healed for cell in measured if cell.not_healed)
    blocks: list[Block] = [
        Grid("On held-out text", header, rows, right=range(1, 7)),
        *([Bullets(refused)] if refused else []),
        Note(answer_words(report)),
        Note(_about(report)),
        *(Note(reason, lead="Not healed:") for reason in reasons),
    ]
    return Section("answer", "How much may I drop?", blocks)


def _row(cell: DepthCell, *, is_best: bool) -> list[Cell]:
    damage = cell.damage
    assert damage is not None
    return [
        dropped_words(cell),
        or_dash(cell.parameters_removed, lambda removed: f"-{percent(removed)}"),
        or_dash(cell.speedup, "{:.2f}x".format),
        _rise(damage),
        or_dash(cell.healed, _rise),
        significant(damage.kl, 3),
        percent(damage.top1_agreement),
        Sign("recommended", "good") if is_best else "",
    ]


def cut_line(cell: DepthCell) -> str:
    """What a cut drops, gains and costs."""
    least, rise = cell.least, "cost not measured"
    if least is not None:
        rise = f"perplexity {_rise(least)}{' healed' if least is cell.healed else ''}"
    return f"{dropped_words(cell)}{_faster(cell)}, {rise}"


def _int8_row(dropped: str, row: DepthInt8, *, healed: bool = False) -> list[Cell]:
    rise = _rise(row.damage)
    return [
        f"{dropped}, in int8",
        f"-{percent(row.bytes_removed)}",
        or_dash(
            row.speedup,
            lambda speedup: "{:.2f}x [{:.2f}, {:.2f}]".format(speedup.ratio, *speedup.ci95),
        ),
        *(["", rise] if healed else [rise, ""]),
        significant(row.damage.kl, 3),
        percent(row.damage.top1_agreement),
        "",
    ]


def answer_words(report: DepthsReport) -> str:
    """What is recommended, and why."""
    limit, best = percent(report.most_increase), report.recommended
    if best is not None:
        text, damage, reported = report.reported_text, report.reported, ""
        if text is not None and damage is not None:
            reported = (
                f" On {text.tokens:,} other tokens of {_short(text.source)}, which chose nothing, "
                f"the perplexity rises by {_rise(damage)}."
            )
        return (
            f"Recommended: drop {dropped_words(best)}{_faster(best)}. Of the cuts that keep the "
            f"perplexity on {_short(report.text.source)} within {limit} after healing, with all of "
            f"an interval corrected for {report.looks} figures, it is the fastest."
            f"{reported}"
        )
    costs = [(cell, cost) for cell in report.cells if (cost := cell.least) is not None]
    if not costs:
        return "Nothing could be dropped at these numbers."
    least, cost = min(costs, key=lambda item: item[1].perplexity_ratio)
    most, ends, corrected = 1 + report.most_increase, cost.perplexity_ratio_ci95, ""
    if cost.perplexity_ratio_most is not None:
        highest = _change(cost.perplexity_ratio_most)
        corrected = f"; corrected for {report.looks} figures, the interval ends at {highest}"
    if cost.perplexity_ratio_most is not None and cost.perplexity_ratio_most <= most:
        return (
            f"Nothing is worth cutting: no cut that keeps the perplexity within {limit}, such as "
            f"{dropped_words(least)}, is more than 1 % faster."
        )
    if ends is None or ends[0] <= most:
        return (
            f"It is not certain that a cut keeps the perplexity within {limit}: without "
            f"{dropped_words(least)} it rises by {_rise(cost)}{corrected}. depthcut export MODEL "
            "-o out trains the cut and measures on more text; --eval-tokens does the latter here."
        )
    return (
        f"Nothing is worth cutting within {limit} more perplexity. All of these cuts cost more: "
        f"without {dropped_words(least)}{_faster(least)}, the perplexity rises by {_rise(cost)}. "
        "A training may lower that (depthcut export MODEL -o out --time 10m), or --at-most allows "
        "more."
    )


def dropped_words(cell: DepthCell) -> str:
    """``4 attentions``; of both kinds ``4 attentions and MLPs``."""
    if cell.way in KINDS:
        return counted_kind(cell.way, cell.number)
    return f"{cell.number} attentions and MLPs"


def _faster(cell: DepthCell) -> str:
    return "" if cell.speedup is None else f", {cell.speedup:.2f} times as fast"


def _rise(damage: DepthDamage) -> str:
    """``+1.1 % [-0.3 %, +2.5 %]``."""
    ends = ", ".join(map(_change, damage.perplexity_ratio_ci95 or ()))
    return _change(damage.perplexity_ratio) + (f" [{ends}]" if ends else "")


def _change(ratio: float) -> str:
    change = 100 * (ratio - 1)
    return f"{change:+.1f} %" if change < 1000 else f"x {ratio:,.0f}"


def _about(report: DepthsReport) -> str:
    """On what the figures rest."""
    runtime = {"onnxruntime": "ONNX Runtime", "pytorch": "PyTorch"}
    healed, timed = "", "No speed could be measured here."
    if report.fitted_on is not None:
        healed = (
            "healed: kept weights are fitted anew by least squares (--heal fold), on "
            f"{report.fitted_on.tokens:,} tokens; nothing is trained. "
        )
    if report.request:
        timed = (
            "Speeds are foretold by costs that "
            f"{runtime.get(report.backend, report.backend)} had with {report.threads} threads "
            f"({report.request}); other runtimes differ."
        )
    int8 = f" Nothing was measured in int8: {report.no_int8}." if report.no_int8 else ""
    if report.int8:
        text = report.reported_text
        on = "" if text is None else f", accuracy on {text.tokens:,} tokens that chose nothing"
        int8 = (
            f" In int8 (weights of 8 bits), size is that of the file{on}, and speed was measured "
            "beside the whole model in float, both on ONNX Runtime."
        )
    return (
        f"By how much the perplexity rises on {report.text.tokens:,} tokens of "
        f"{report.text.source}, in brackets 95 % intervals. Sublayers with the lowest scores are "
        f"dropped ({report.metric}, on {report.calibration.source}). {healed}{timed}{int8}"
    )


def _short(source: str) -> str:
    """``pydoc`` for ``pydoc (evaluation half, ...)``; of a path the file's name."""
    return source.partition(" (")[0].rpartition("/")[2]


def _tasks(report: DepthsReport) -> list[Section]:
    """Each cut's scores beside the whole model's; nothing without tasks."""
    cells = [cell for cell in report.cells if cell.tasks]
    if not cells:
        return []
    first = cells[0].tasks
    header = ["dropped", *(f"{task.task}, {task.metric} ({task.items})" for task in first)]
    whole: list[Cell] = ["nothing", *(f"{task.baseline:.3f}" for task in first)]
    cuts: list[list[Cell]] = [[dropped_words(cell), *map(_score, cell.tasks)] for cell in cells]
    grid = Grid("On so many items", header, [whole, *cuts], right=range(1, len(header)))
    note = Note(
        "In brackets the 95 % interval of the difference to the whole model, from a paired "
        "bootstrap over items."
    )
    return [Section("tasks", "Tasks", [grid, note])]


def _score(task: TaskResult) -> str:
    low, high = task.difference.ci95
    return f"{task.candidate:.3f} [{low:+.3f}, {high:+.3f}]"
