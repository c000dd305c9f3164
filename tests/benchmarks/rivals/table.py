"""The page of rivals: finished rows as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from exporter.artifacts.accuracy import Interval
from exporter.compare.intervals import difference_interval, mean_interval
from tests.benchmarks.rivals.methods import NUMBERS, PUBLISHED, Row, Unit, of_size

DOMAINS = {"test": "the test text", "docs": "CPython's documentation"}
_DAMAGES = "perplexity", "excess", "KL"
Finished = Mapping[str, Any]
"""A row as it is kept."""

_INTRODUCTION = """\
# Rivals

depthcut beside ShortGPT, SLEB, BlockPruner, Prune&Comp, LinearPatch, ReplaceMe, NBL and the cosine
of LLM-Drop. Each is made anew from its paper (`tests/benchmarks/rivals`, where each says what
differs), given the same model, the same calibration file ({calibration}) and the same number of
sublayers to drop, and measured on text that none of them has seen.

**They don't read equally much**: see the column *samples read*. ReplaceMe is its variant by least
squares; the one by cosine, its paper's best, is missing.

{setting}

```sh
{command}
```

writes this page; don't edit it.

Rows of blocks drop as many attentions and as many MLPs as so many blocks have. BlockPruner, *ours*
and *ours, distilled* choose them apart; all others, *ours, folded* too, take whole blocks. *Ours*
chooses greedily by KL divergence; *maps* puts linear maps in the dropped branches' places, *folded*
puts them into weights that are there, *distilled* trains adapters on the whole model's answers and
merges them.

| column | meaning |
| --- | --- |
| samples read | of the calibration file: to choose, to fit, to stop |
| perplexity | of the cut model |
| excess | by how much the log-perplexity rises, in nats, with its 95 % interval over documents |
| KL | of the cut model's next-token distribution from the whole one's, in nats |
| speed | of a prompt of 512 tokens in PyTorch, whole and cut in turns in one process, with its \
95 % interval; rows that drop as much of each kind, and add as much, share one measurement |
| made in | whatever else the machine did; a search that rows share counts for the first |
| log p | rise of the right answers' mean log-probability against the others, in nats, paired |
| right | items answered right |

**Bold**: the best of its column, and those that are not worse than it beyond chance: the 95 %
interval of the difference, over the same documents or items, has 0 in it. Tasks have few items, so
much of what is bold there differs by chance.
"""


@dataclass(frozen=True)
class Setting:
    """What all rows hang on, as the page tells it."""

    calibration: str
    command: str
    lines: Sequence[str]


@dataclass(frozen=True)
class Cell:
    """One figure."""

    text: str
    value: float
    losses: Any
    counts: Any = None
    clusters: Any = None

    def is_as_good_as(self, best: Cell) -> bool:
        """Whether it is the best, or only worse by chance."""
        if self.counts is None:
            interval: Interval | None = difference_interval(best.losses, self.losses)
        else:
            gap = self.losses - best.losses
            interval = mean_interval(gap, self.counts, clusters=self.clusters)
        return self.value <= best.value or (interval is not None and interval.ci95[0] <= 0)


def render(
    rows: Sequence[Row], found: Mapping[str, Finished], whole: Finished, setting: Setting
) -> str:
    """The page, of the rows that are finished."""
    text = "\n".join(f"- {line}" for line in setting.lines)
    introduction = _INTRODUCTION.format(
        calibration=setting.calibration, setting=text, command=setting.command
    )
    parts = [introduction]
    for unit, numbers in NUMBERS.items():
        for dropped in numbers:
            there = [row for row in of_size(rows, unit, dropped) if row.name in found]
            if there:
                parts += _section(unit, dropped, there, found, whole)
    missing = [row.name for row in rows if row.name not in found]
    if missing:
        parts.append(f"Not measured yet: {'; '.join(missing)}.\n")
    return "\n".join([*parts, *_published()])


def _section(
    unit: Unit,
    dropped: int,
    rows: Sequence[Row],
    finished: Mapping[str, Finished],
    whole: Finished,
) -> Iterator[str]:
    results = [finished[row.name] for row in rows]
    names = [_title(row) for row in rows]
    yield f"## {dropped} {unit} of {whole['layers']}\n"
    domains = [*_domain_columns(results)]
    yield _table(
        ["method", "samples read", *_domain_titles(), "speed", "made in"],
        [["whole", "", *_whole_domains(results[0]), "1", ""]],
        names,
        [
            [" + ".join(map(str, r["read"])) for r in results],
            *domains,
            [_speed(r) for r in results],
            [f"{r['made_s']:.0f} s" for r in results],
        ],
    )
    tasks = sorted(whole["answers"])
    titles = [f"{task}: {what}" for task in tasks for what in ("log p", "right")]
    columns = [*_task_columns(results, whole, tasks)]
    if tasks:
        yield _table(["method", *titles], [["whole", *_whole_tasks(whole, tasks)]], names, columns)
    places = [f"{name}: {what}" for name in DOMAINS.values() for what in _DAMAGES]
    figures = zip([*places, *titles], [*domains, *columns], strict=True)
    yield _told_of_ours(names, {title: column for title, column in figures if _is_judged(column)})


def _told_of_ours(names: Sequence[str], columns: Mapping[str, Sequence[Cell | str]]) -> str:
    """In which columns none of our rows is as good as the best."""
    ours = [name.startswith("ours") for name in names]
    without = [
        title
        for title, column in columns.items()
        if not any(bold for bold, own in zip(_bold(column), ours, strict=True) if own)
    ]
    return f"Columns in which no row of *ours* is bold: {', '.join(without) or 'none'}.\n"


def _title(row: Row) -> str:
    tokens = "" if row.distill_tokens is None else f" on {row.distill_tokens // 1000}k tokens"
    return f"{row.method}{tokens}"


def _domain_titles() -> Iterator[str]:
    first, *others = _DAMAGES
    for name in DOMAINS.values():
        yield from (f"{name}: {first}", *others)


def _whole_domains(result: Finished) -> Iterator[str]:
    for name in DOMAINS:
        sums = result["domains"][name]
        yield f"{_perplexity(sums['baseline_nll_sums'], sums['positions']):.2f}"
        yield from ("0", "0")


def _domain_columns(results: Sequence[Finished]) -> Iterator[list[Cell | str]]:
    for name in DOMAINS:
        sums = [
            {key: np.array(values) for key, values in result["domains"][name].items()}
            for result in results
        ]
        yield [f"{_perplexity(item['nll_sums'], item['positions']):.2f}" for item in sums]
        yield [_rise(item["nll_sums"] - item["baseline_nll_sums"], item) for item in sums]
        yield [_rise(item["kl_sums"], item, ends=False) for item in sums]


def _perplexity(nll_sums: Any, positions: Any) -> float:
    return float(np.exp(np.sum(nll_sums) / np.sum(positions)))


def _rise(sums: Any, sample: Mapping[str, Any], *, ends: bool = True) -> Cell:
    counts, clusters = sample["positions"], sample["clusters"]
    interval = mean_interval(sums, counts, clusters=clusters)
    value, words = float(sums.sum() / counts.sum()), ""
    if interval is not None and ends:
        words = " [{:.3f}, {:.3f}]".format(*interval.ci95)
    return Cell(f"{value:.3f}{words}", value, sums, counts, clusters)


def _speed(result: Finished) -> str:
    low, high = result["speed"]["ci95"]
    return f"{result['speed']['ratio']:.2f} [{low:.2f}, {high:.2f}]"


def _whole_tasks(whole: Finished, tasks: Sequence[str]) -> Iterator[str]:
    for task in tasks:
        yield "0"
        yield f"{100 * np.mean(whole['answers'][task]['right']):.1f} %"


def _task_columns(
    results: Sequence[Finished], whole: Finished, tasks: Sequence[str]
) -> Iterator[list[Cell | str]]:
    for task in tasks:
        for key, item in (("log_p", _nats), ("right", _percent)):
            base = np.array(whole["answers"][task][key])
            arms = [np.array(result["answers"][task][key]) for result in results]
            yield [item(difference_interval(base, arm), float(base.mean()), arm) for arm in arms]


def _nats(change: Interval, _base: float, arm: Any) -> Cell:
    low, high = change.ci95
    return Cell(f"{change.value:+.3f} [{low:+.3f}, {high:+.3f}]", -change.value, -arm)


def _percent(change: Interval, base: float, arm: Any) -> Cell:
    return Cell(f"{100 * (base + change.value):.1f} %", -change.value, -arm)


def _table(
    titles: Sequence[str],
    first: Sequence[Sequence[str]],
    names: Sequence[str],
    columns: Sequence[Sequence[Cell | str]],
) -> str:
    marked = [_marked(column) for column in columns]
    rows = [*first, *([name, *texts] for name, *texts in zip(names, *marked, strict=True))]
    lines = [titles, ["---"] * len(titles), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _marked(column: Sequence[Cell | str]) -> list[str]:
    return [
        cell if isinstance(cell, str) else f"**{cell.text}**" if bold else cell.text
        for cell, bold in zip(column, _bold(column), strict=True)
    ]


def _is_judged(column: Sequence[Cell | str]) -> bool:
    return any(isinstance(cell, Cell) for cell in column)


def _bold(column: Sequence[Cell | str]) -> list[bool]:
    figures = [cell for cell in column if isinstance(cell, Cell)]
    best = min(figures, key=lambda cell: cell.value, default=None)
    return [best is not None and isinstance(c, Cell) and c.is_as_good_as(best) for c in column]


def _published() -> Iterator[str]:
    yield "## What the papers say of themselves\n"
    yield "On models that are too large for this table; shares are of the whole model's score.\n"
    titles = ["method", "arXiv", "model", "cut", "figure", "where"]
    yield _table(titles, [list(item) for item in PUBLISHED], [], [[]])
