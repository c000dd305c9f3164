"""The page of rivals: finished rows as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from exporter.compare.intervals import mean_interval
from tests.benchmarks.frame import rendered
from tests.benchmarks.rivals.methods import NUMBERS, PUBLISHED, Row

DOMAINS = {"test": "the test text", "docs": "CPython's documentation"}
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

**Bold**: the best of its column, and those that are not worse than it beyond chance: the 95 %
interval of the difference, over the same documents, has 0 in it.
"""


@dataclass(frozen=True)
class Cell:
    """One figure: a rise by sample, of which the least is best."""

    text: str
    value: float
    losses: Any
    counts: Any
    clusters: Any

    def is_as_good_as(self, best: Cell) -> bool:
        """Whether it is the best, or only worse by chance."""
        interval = mean_interval(self.losses - best.losses, self.counts, clusters=self.clusters)
        return self.value <= best.value or (interval is not None and interval.ci95[0] <= 0)


def render(rows: Sequence[Row], kept: Mapping[str, Finished], layers: int, **setting: str) -> str:
    """The page, of the rows that are finished; ``setting`` is what its introduction tells."""
    parts = [_INTRODUCTION.format(**setting)]
    for unit, numbers in NUMBERS.items():
        for dropped in numbers:
            alike = [row for row in rows if (row.unit, row.dropped) == (unit, dropped)]
            if there := [row for row in alike if row.name in kept]:
                parts.append(f"## {dropped} {unit} of {layers}\n")
                parts += _section([row.title for row in there], [kept[row.name] for row in there])
    if missing := [row.name for row in rows if row.name not in kept]:
        parts.append(f"Not measured yet: {'; '.join(missing)}.\n")
    parts.append("## What the papers say of themselves\n")
    parts.append(
        "On models that are too large for this table; shares are of the whole model's score.\n"
    )
    titles = ["method", "arXiv", "model", "cut", "figure", "where"]
    return "\n".join([*parts, rendered(titles, PUBLISHED)])


def _section(names: Sequence[str], results: Sequence[Finished]) -> Iterator[str]:
    """The table of rows that drop as much, and in which columns none of ours is as good."""
    titles, whole, columns = ["method", "samples read"], ["whole", ""], [names]
    columns.append([" + ".join(map(str, result["read"])) for result in results])
    without, ours = [], [name.startswith("ours") for name in names]
    for domain, domain_name in DOMAINS.items():
        sums = [
            {key: np.array(values) for key, values in result["domains"][domain].items()}
            for result in results
        ]
        rises: dict[str, list[Cell]] = {
            "excess": [_rise(item["nll_sums"] - item["baseline_nll_sums"], item) for item in sums],
            "KL": [_rise(item["kl_sums"], item, ends=False) for item in sums],
        }
        titles += [f"{domain_name}: perplexity", *rises]
        whole += [_perplexity(sums[0], "baseline_nll_sums"), "0", "0"]
        columns.append([_perplexity(item, "nll_sums") for item in sums])
        for title, cells in rises.items():
            best = min(cells, key=lambda cell: cell.value)
            bold = [cell.is_as_good_as(best) for cell in cells]
            columns.append([
                f"**{cell.text}**" if is_bold else cell.text
                for cell, is_bold in zip(cells, bold, strict=True)
            ])  # fmt: skip
            if not any(is_bold and own for is_bold, own in zip(bold, ours, strict=True)):
                without.append(f"{domain_name}: {title}")
    columns.append(
        [
            "{ratio:.2f} [{ci95[0]:.2f}, {ci95[1]:.2f}]".format(**result["speed"])
            for result in results
        ]
    )
    columns.append([f"{result['made_s']:.0f} s" for result in results])
    yield rendered([*titles, "speed", "made in"], [[*whole, "1", ""], *zip(*columns, strict=True)])
    yield f"Columns in which no row of *ours* is bold: {', '.join(without) or 'none'}.\n"


def _perplexity(sample: Mapping[str, Any], key: str) -> str:
    return f"{np.exp(sample[key].sum() / sample['positions'].sum()):.2f}"


def _rise(sums: Any, sample: Mapping[str, Any], *, ends: bool = True) -> Cell:
    counts, clusters = sample["positions"], sample["clusters"]
    interval = mean_interval(sums, counts, clusters=clusters)
    value, words = float(sums.sum() / counts.sum()), ""
    if interval is not None and ends:
        words = " [{:.3f}, {:.3f}]".format(*interval.ci95)
    return Cell(f"{value:.3f}{words}", value, sums, counts, clusters)
