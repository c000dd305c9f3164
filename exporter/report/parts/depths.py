"""Ways of dropping at several numbers: an overview, everything measured, what was dropped."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from exporter.artifacts import DepthCell, DepthDamage, DepthsReport, Way
from exporter.printable import counted
from exporter.report.parts.part import Block, Bullets, Grid, Note, Part
from exporter.report.words import significant

WAYS: dict[Way, str] = {
    "attention": "Attention Drop",
    "mlp": "MLP Drop",
    "block": "Block Drop",
    "joint": "Joint Layer Drop",
}
"""As the paper calls them."""
_LABELS = {"attention": "attention", "mlp": "MLP", "block": "block"}


def depths_lead(report: DepthsReport) -> str:
    """Which way changes the answers least at each number."""
    told = []
    for number in report.numbers:
        found = [
            (cell.damage.kl, [*WAYS].index(cell.way), cell.damage.perplexity_ratio)
            for cell in report.cells
            if cell.number == number and cell.damage is not None
        ]
        if found:
            kl, way, ratio = min(found)
            cost = f"{significant(kl, 2)} nats, perplexity {_ratio(ratio)}"
            told.append(f"n = {number}: {[*WAYS.values()][way]} ({cost})")
    if not told:
        return "Nothing could be dropped at these numbers."
    return f"The least KL divergence at each number. {'; '.join(told)}."


def depths_parts(report: DepthsReport) -> list[Part]:
    """Overview, all figures, tasks where there are some, and what was dropped."""
    tasks = [Part("tasks", "Tasks", [*_task_blocks(report)])] if _tasks(report) else []
    return [_overview(report), _figures(report), *tasks, _dropped(report)]


def _overview(report: DepthsReport) -> Part:
    numbers = report.numbers
    rows = [
        [name, *map(_perplexity, report.of_way(way)), *map(_kl, report.of_way(way))]
        for way, name in WAYS.items()
        if report.of_way(way)
    ]
    perplexities, divergences = ([f"{what}{n}" for n in numbers] for what in ("n = ", "KL, "))
    grid = Grid(
        "Perplexity on held-out text, and KL divergence in nats",
        ["way", *perplexities, *divergences],
        rows,
        right=range(1, 2 * len(numbers) + 1),
    )
    note = Note(
        f"The whole model's perplexity is {significant(report.baseline_perplexity)}. "
        "n counts what is dropped: attentions, MLPs, blocks (each an attention and an MLP), or "
        "attentions and MLPs ranked together. The lowest scores go first, nothing is healed."
    )
    refused = [
        f"{WAYS[cell.way]} of {cell.number}: {cell.refused}"
        for cell in report.cells
        if cell.refused
    ]
    blocks: list[Block] = [grid, note]
    return Part("overview", "Overview", [*blocks, *([Bullets(refused)] if refused else [])])


def _perplexity(cell: DepthCell) -> str:
    return "-" if cell.damage is None else significant(cell.damage.perplexity)


def _kl(cell: DepthCell) -> str:
    return "-" if cell.damage is None else significant(cell.damage.kl, 3)


def _figures(report: DepthsReport) -> Part:
    header = [
        "way", "n", "parameters", "perplexity", "times the whole model's", "KL, nats",
        "same top-1",
    ]  # fmt: skip
    rows = [
        [name, *cells]
        for way, full in WAYS.items()
        for name, cells in zip(
            itertools.chain([full], itertools.repeat("")),
            (_row(cell) for cell in report.of_way(way) if cell.damage is not None),
            strict=False,
        )
    ]
    text, samples = report.text, counted(report.text.samples, "sample")
    grid = Grid("On held-out text", header, rows, right=range(1, len(header)))
    note = Note(
        f"On {text.source}, {samples} of {text.sequence_length} tokens, both models "
        "on the same; in brackets 95 % intervals over samples. Parameters are those of the "
        f"dropped modules. Chosen by {report.metric} on {report.calibration.source}."
    )
    return Part("figures", "All figures", [grid, note])


def _row(cell: DepthCell) -> list[str]:
    damage = cell.damage
    if damage is None:
        return []
    removed = cell.parameters_removed
    return [
        str(cell.number),
        "-" if removed is None else f"-{100 * removed:.1f} %",
        significant(damage.perplexity),
        f"{_ratio(damage.perplexity_ratio)}{_interval(damage.perplexity_ratio_ci95)}",
        f"{significant(damage.kl, 3)}{_interval(damage.kl_ci95)}",
        f"{100 * damage.top1_agreement:.1f} %",
    ]


def damage_words(damage: DepthDamage) -> str:
    """For a drawing's tip."""
    return (
        f"perplexity {significant(damage.perplexity)} ({_ratio(damage.perplexity_ratio)}"
        f"{_interval(damage.perplexity_ratio_ci95)}), KL {significant(damage.kl, 3)} nats"
    )


def _tasks(report: DepthsReport) -> list[tuple[str, str]]:
    """The tasks and their metrics, in their order."""
    pairs = ((task.task, task.metric) for cell in report.cells for task in cell.tasks)
    return list(dict.fromkeys(pairs))


def _task_blocks(report: DepthsReport) -> Iterator[Block]:
    for name, metric in _tasks(report):
        found = {
            (cell.way, cell.number): task
            for cell in report.cells
            for task in cell.tasks
            if (task.task, task.metric) == (name, metric)
        }
        first = next(iter(found.values()))
        rows = []
        for way, full in WAYS.items():
            tasks = [found.get((way, number)) for number in report.numbers]
            cells = (
                "-" if task is None else _task_cell(task.candidate, task.difference.ci95)
                for task in tasks
            )
            if report.of_way(way):
                rows.append([full, *cells])
        caption = f"{name}, {metric}"
        header = ["way", *(f"n = {number}" for number in report.numbers)]
        yield Grid(caption, header, rows, right=range(1, len(header)))
        yield Note(f"{caption}: the whole model has {first.baseline:.3f} on {first.items} items.")
    yield Note(
        "In brackets the 95 % interval of the difference to the whole model, from a paired "
        "bootstrap over items."
    )


def _task_cell(value: float, change: tuple[float, float]) -> str:
    return f"{value:.3f} [{change[0]:+.3f}, {change[1]:+.3f}]"


def _dropped(report: DepthsReport) -> Part:
    rows = [
        [WAYS[cell.way], str(cell.number), _deletions(cell)]
        for cell in report.cells
        if cell.deletions
    ]
    grid = Grid("In the order of choice", ["way", "n", "dropped"], rows, right=(1,))
    return Part("dropped", "What was dropped", [grid])


def _deletions(cell: DepthCell) -> str:
    kinds: dict[str, list[str]] = {}
    for deletion in cell.deletions:
        kinds.setdefault(deletion.kind, []).append(str(deletion.layer))
    return "; ".join(f"{_LABELS.get(kind, kind)} {', '.join(ls)}" for kind, ls in kinds.items())


def _ratio(value: float) -> str:
    return f"{significant(value, 3)}x"


def _interval(ci95: Sequence[float] | None) -> str:
    if ci95 is None:
        return ""
    low, high = (significant(value, 3) for value in ci95)
    return f" [{low}, {high}]"
