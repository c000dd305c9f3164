"""How much may be dropped: a row a cut, its speed, its loss in two domains; one recommended."""

from __future__ import annotations

from exporter.artifacts import DepthCell, DepthDamage, DepthsInt8, DepthsReport, DropAnswer
from exporter.report.sections.blocks import Cell, Grid, Note, Section, Sign
from exporter.report.words import KINDS, counted_kind, or_dash, percent, significant


def answer_section(report: DepthsReport, answer: DropAnswer) -> Section:
    """The table, the recommendation with its reason, and how far the figures go."""
    here, there = _short(report.text.source), _short(answer.other_text.source)
    header = [
        "dropped", "size", "prompt", "token", here, "healed", there, "healed", "",
    ]  # fmt: skip
    best = report.recommended
    rows: list[list[Cell]] = [["nothing", "", "", "", *_whole(report, answer), ""]]
    rows += [_row(cell, is_best=cell is best) for cell in report.cells if cell.damage is not None]
    rows += [] if answer.int8 is None else [_int8_row(answer.int8)]
    caption = "Speed, and the rise of the perplexity in two domains"
    grid = Grid(caption, header, rows, right=range(1, 8))
    notes = [Note(answer_words(report, answer)), Note(_about(report, answer))]
    notes.append(Note(_int8_words(answer)))
    reasons = dict.fromkeys(cell.not_healed for cell in report.cells if cell.not_healed)
    notes += [Note(reason, lead="Not healed:") for reason in reasons]
    return Section("answer", "How much may I drop?", [grid, *notes])


def answer_words(report: DepthsReport, answer: DropAnswer) -> str:
    """What is recommended, and why."""
    limit, best = percent(answer.most_increase), report.recommended
    if best is not None:
        return (
            f"Recommended: drop {dropped_words(best)}{_faster(best)}. Of the cuts that keep the "
            f"perplexity on {_short(report.text.source)} within {limit} after healing, with all of "
            f"an interval corrected for {answer.looks} figures, it is the fastest."
            f"{_reported(answer)}"
        )
    measured = [cell for cell in report.cells if cell.damage is not None]
    if not measured:
        return "Nothing could be dropped at these numbers."
    least = min(measured, key=lambda cell: _least(cell).perplexity_ratio)
    cost = _least(least)
    most, ends = 1 + answer.most_increase, cost.perplexity_ratio_ci95
    if cost.perplexity_ratio <= most and (ends is None or ends[1] <= most):
        return (
            f"Nothing is worth cutting: no cut that keeps the perplexity within {limit}, such as "
            f"{dropped_words(least)}, is more than 1 % faster."
        )
    if ends is None or ends[0] <= most:
        return (
            f"It is not certain that a cut keeps the perplexity within {limit}: without "
            f"{dropped_words(least)} it rises by {_interval(cost)}. depthcut export MODEL -o out "
            "trains the cut and measures on more text; --eval-tokens does the latter here."
        )
    return (
        f"Nothing is worth cutting within {limit} more perplexity. The smallest step costs more: "
        f"without {dropped_words(least)}{_faster(least)}, the perplexity rises by {_damage(cost)}. "
        "A training may lower that (depthcut export MODEL -o out --time 10m), or --at-most allows "
        "more."
    )


def _reported(answer: DropAnswer) -> str:
    """What it costs on the part of the text that has chosen nothing."""
    text, damage = answer.reported_text, answer.reported
    if text is None or damage is None:
        return ""
    return (
        f" On {text.tokens:,} other tokens of {_short(text.source)}, which chose nothing, the "
        f"perplexity rises by {_interval(damage)}."
    )


def dropped_words(cell: DepthCell) -> str:
    """``4 attentions``; of both kinds ``4 attentions and MLPs``."""
    if cell.way in KINDS:
        return counted_kind(cell.way, cell.number)
    return f"{cell.number} attentions and MLPs"


def _faster(cell: DepthCell) -> str:
    speedup = cell.speedups.get("request")
    return "" if speedup is None else f", {speedup:.2f} times as fast"


def _row(cell: DepthCell, *, is_best: bool) -> list[Cell]:
    figures = [cell.damage, cell.healed, cell.other, cell.other_healed]
    speeds = (cell.speedups.get(phase) for phase in ("prefill", "decode"))
    return [
        dropped_words(cell),
        or_dash(cell.parameters_removed, lambda removed: f"-{percent(removed)}"),
        *(or_dash(speed, "{:.2f}x".format) for speed in speeds),
        *(or_dash(damage, _damage) for damage in figures),
        Sign("recommended", "good") if is_best else "",
    ]


def _int8_row(int8: DepthsInt8) -> list[Cell]:
    speeds = (int8.speedups.get(phase) for phase in ("prefill", "decode"))
    return [
        "nothing, int8",
        f"-{percent(int8.bytes_removed)}",
        *(or_dash(speed, "{:.2f}x".format) for speed in speeds),
        *(_rise(int8.perplexity_ratio), "-", _rise(int8.other_perplexity_ratio), "-", ""),
    ]


def _int8_words(answer: DropAnswer) -> str:
    """What int8 means for a cut, or why it isn't in the table."""
    if answer.int8 is None:
        return f"The whole model in int8 is not in the table: {answer.no_int8}."
    return (
        "int8: the whole model, quantised as --quantize int8 does. The gain of a cut comes on top "
        "of it: depthcut export measures both with that option."
    )


def _whole(report: DepthsReport, answer: DropAnswer) -> list[Cell]:
    perplexities = (report.baseline_perplexity, answer.other_baseline_perplexity)
    return [cell for value in perplexities for cell in (significant(value), "")]


def _damage(damage: DepthDamage) -> str:
    return _rise(damage.perplexity_ratio)


def _rise(ratio: float) -> str:
    change = 100 * (ratio - 1)
    return f"{change:+.1f} %" if change < 1000 else f"x {ratio:,.0f}"


def _least(cell: DepthCell) -> DepthDamage:
    found = [each for each in (cell.damage, cell.healed) if each is not None]
    return min(found, key=lambda each: each.perplexity_ratio)


def _interval(damage: DepthDamage) -> str:
    """``+1.1 % [-0.3 %, +2.5 %]``."""
    ends = ", ".join(map(_rise, damage.perplexity_ratio_ci95 or ()))
    return f"{_damage(damage)}, 95 % interval [{ends}]" if ends else _damage(damage)


def _about(report: DepthsReport, answer: DropAnswer) -> str:
    """On what the figures rest."""
    runtime = {"onnxruntime": "ONNX Runtime", "pytorch": "PyTorch"}.get(
        answer.backend, answer.backend
    )
    timed = (
        f"Speeds are estimated from variants that {runtime} ran with {answer.threads} threads "
        f"({answer.request}); other runtimes differ."
        if answer.request
        else "No speed could be measured here."
    )
    return (
        f"The figures are approximate: {report.text.tokens:,} tokens of {report.text.source} "
        "that the recommendation rests on, "
        f"{answer.other_text.tokens:,} of {answer.other_text.source}. Sublayers with the lowest "
        f"scores are dropped ({report.metric}, on {report.calibration.source}). healed: kept "
        "weights are fitted anew by least squares (--heal fold), on "
        f"{answer.fitted_on.tokens:,} tokens; nothing is trained. {timed}"
    )


def _short(source: str) -> str:
    """``pydoc`` for ``pydoc (evaluation half, ...)``; of a path the file's name."""
    return source.partition(" (")[0].rpartition("/")[2]
