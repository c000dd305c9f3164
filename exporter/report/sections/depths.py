"""Ways of dropping at several numbers: an overview, everything measured, what was dropped."""

from __future__ import annotations

from collections.abc import Iterator

from exporter.artifacts import (
    DepthCell,
    DepthDamage,
    DepthsInt8,
    DepthsReport,
    DropAnswer,
    TaskResult,
    Way,
)
from exporter.printable import counted, percent, significant
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
from exporter.report.words import (
    KINDS,
    counted_kind,
    dropped_briefly,
    interval_words,
    listed,
    or_dash,
)


def answer_section(report: DepthsReport, answer: DropAnswer) -> Section:
    """The table, the recommendation with its reason, and how far the figures go."""
    here, there = _short(report.text.source), _short(answer.other_text.source)
    header = [
        "dropped", "size", "prompt", "token", here, "healed", there, "healed", "",
    ]  # fmt: skip
    best = report.recommended
    rows: list[list[Cell]] = [["nothing", "", "", "", *_whole(report, answer), ""]]
    rows += [
        _drop_answer_row(cell, is_best=cell is best)
        for cell in report.cells
        if cell.damage is not None
    ]
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
            f"{dropped_words(least)} it rises by {_ends(cost)}. depthcut export MODEL -o out "
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
        f"perplexity rises by {_ends(damage)}."
    )


def dropped_words(cell: DepthCell) -> str:
    """``4 attentions``; of both kinds ``4 attentions and MLPs``."""
    if cell.way in KINDS:
        return counted_kind(cell.way, cell.number)
    return f"{cell.number} attentions and MLPs"


def _faster(cell: DepthCell) -> str:
    speedup = cell.speedups.get("request")
    return "" if speedup is None else f", {speedup:.2f} times as fast"


def _drop_answer_row(cell: DepthCell, *, is_best: bool) -> list[Cell]:
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
    damages = [damage for damage in (cell.damage, cell.healed) if damage is not None]
    return min(damages, key=lambda damage: damage.perplexity_ratio)


def _ends(damage: DepthDamage) -> str:
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


_WAYS: dict[Way, str] = {
    "attention": "Attention Drop",
    "mlp": "MLP Drop",
    "block": "Block Drop",
    "joint": "Joint Layer Drop",
}
"""As the paper calls them."""


def depths_document(report: DepthsReport) -> Document:
    """The answer, where asked for; all figures, tasks, and what was dropped."""
    tasks = [Section("tasks", "Tasks", [*_task_blocks(report)])] if _tasks(report) else []
    answer = [] if report.answer is None else [answer_section(report, report.answer)]
    return Document(
        command="depths",
        version=report.versions.get("depthcut", ""),
        title="Pruning at several depths",
        subject=report.model.source,
        lead=_lead(report),
        sections=[*answer, _all_figures(report), *tasks, _dropped(report)],
    )


def _lead(report: DepthsReport) -> str:
    """What is recommended; else which way changes the answers least at each number."""
    if report.answer is not None:
        return answer_words(report, report.answer)
    names = []
    for number in report.numbers:
        first, *others = [_cost_words(cell) for cell in least_kl(report, number)] or [""]
        if others:
            names.append(f"n = {number}: can't tell {first} from {listed(others)}")
        elif first:
            names.append(f"n = {number}: {first}")
    if not names:
        return "Nothing could be dropped at these numbers."
    return f"The least KL divergence at each number. {'; '.join(names)}."


def least_kl(report: DepthsReport, number: int) -> list[DepthCell]:
    """The ways of dropping so many whose KL divergence may be the least, by the 95 % intervals."""
    result = [
        (cell.damage.kl, [*_WAYS].index(cell.way), cell.damage.kl_ci95, cell)
        for cell in report.cells
        if cell.number == number and cell.damage is not None
    ]
    result.sort(key=lambda item: item[:2])
    if not result:
        return []
    least = result[0][2]
    return [
        cell
        for place, (_, _, ci95, cell) in enumerate(result)
        if place == 0 or least is None or ci95 is None or ci95[0] <= least[1]
    ]


def _cost_words(cell: DepthCell) -> str:
    damage = cell.damage
    assert damage is not None
    rise = f"{significant(damage.perplexity_ratio, 3)}x"
    return f"{_WAYS[cell.way]} ({significant(damage.kl, 2)} nats, perplexity {rise})"


def _all_figures(report: DepthsReport) -> Section:
    """A row a cell, narrow enough for a terminal, and the cost of each over its size."""
    measured = [(cell, cell.damage) for cell in report.cells if cell.damage is not None]
    rows = [
        [
            cell.way,
            str(cell.number),
            significant(damage.perplexity),
            _estimate(damage.perplexity_ratio, damage.perplexity_ratio_ci95, "x"),
            _estimate(damage.kl, damage.kl_ci95),
            percent(damage.top1_agreement),
        ]
        for cell, damage in measured
    ]
    text, samples = report.text, counted(report.text.samples, "sample")
    note = Note(
        f"On {text.source}, {samples} of {text.sequence_length} tokens, where the whole model's "
        f"perplexity is {significant(report.baseline_perplexity)}; in brackets 95 % intervals over "
        "samples. n counts what is dropped: attentions, MLPs, blocks (each an attention and an "
        "MLP), or attentions and MLPs ranked together (joint). The lowest scores go first "
        f"({report.metric}, on {report.calibration.source}), nothing is healed."
    )
    refused = [
        f"{cell.way} of {cell.number}: {cell.refused}" for cell in report.cells if cell.refused
    ]
    header = ["way", "n", "perplexity", "x whole", "KL, nats", "top-1"]
    grid = Grid("On held-out text", header, rows, right=range(1, len(header)))
    blocks: list[Block] = [grid, note, *([Bullets(refused)] if refused else [])]
    return Section("figures", "All figures", blocks)


def _estimate(value: float, ci95: tuple[float, float] | None, unit: str = "") -> str:
    text = f"{significant(value, 3)}{unit}"
    return text if ci95 is None else f"{text} {interval_words(ci95)}"


def _dropped(report: DepthsReport) -> Section:
    rows = [
        [
            cell.way,
            str(cell.number),
            or_dash(cell.parameters_removed, lambda removed: f"-{percent(removed)}"),
            dropped_briefly(cell.deletions),
        ]
        for cell in report.cells
        if cell.deletions
    ]
    header = ["way", "n", "parameters", "dropped"]
    grid = Grid("In the order of choice", header, rows, right=(1, 2))
    return Section("dropped", "What was dropped", [grid])


def _tasks(report: DepthsReport) -> list[tuple[str, str]]:
    """The tasks and their metrics, in their order."""
    pairs = ((task.task, task.metric) for cell in report.cells for task in cell.tasks)
    return list(dict.fromkeys(pairs))


def _task_blocks(report: DepthsReport) -> Iterator[Block]:
    for name, metric in _tasks(report):
        tasks = {
            (cell.way, cell.number): task
            for cell in report.cells
            for task in cell.tasks
            if (task.task, task.metric) == (name, metric)
        }
        first = next(iter(tasks.values()))
        rows = [
            [full, *(_task_cell(tasks.get((way, number))) for number in report.numbers)]
            for way, full in _WAYS.items()
            if report.of_way(way)
        ]
        caption = f"{name}, {metric}"
        header = ["way", *(f"n = {number}" for number in report.numbers)]
        yield Grid(caption, header, rows, right=range(1, len(header)))
        yield Note(f"{caption}: the whole model has {first.baseline:.3f} on {first.items} items.")
    yield Note(
        "In brackets the 95 % interval of the difference to the whole model, from a paired "
        "bootstrap over items."
    )


def _task_cell(task: TaskResult | None) -> str:
    if task is None:
        return "-"
    low, high = task.difference.ci95
    return f"{task.candidate:.3f} [{low:+.3f}, {high:+.3f}]"
