"""All methods of the table: what each cuts, in which rows it stands, what its paper says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from exporter.artifacts import HealKind, PlannedDeletion, PruningPlan
from exporter.choose.budgets.options import Group
from exporter.heal.healed import heal
from exporter.heal.options import HealOptions
from tests.benchmarks.rivals.choosing import cosine, greedily, shortgpt
from tests.benchmarks.rivals.patching import linear_patch, nbl, prune_and_comp, replace_me
from tests.benchmarks.rivals.work import Candidate, Workplace, new_values

Unit = Literal["blocks", "attentions"]
Method = Callable[[Workplace, int], Candidate]


def healed(work: Workplace, dropped: int, kinds: tuple[Group, ...], kind: HealKind) -> Candidate:
    """The choice by KL divergence, healed on the text that all have, as ``depthcut heal`` does."""
    chosen = greedily(work, dropped, kinds)
    plan = PruningPlan(
        deletions=[PlannedDeletion(layer=layer, kind=part) for layer, part in sorted(chosen.cut)]
    )
    about: dict[str, Any] = {"samples": len(work.text.input_ids)}
    if kind == "distill":
        about = {"tokens": work.distill_tokens}
    length = work.text.ref.sequence_length
    options = HealOptions(kind=kind, calibration=(work.source,), sequence_length=length, **about)
    made = heal(work.loaded, plan, options, work=work.keep / "healing", progress=work.progress)
    texts = (made.plan.fitted_on, made.plan.stopped_on)
    read = (*chosen.read, *(sum(text.samples for text in some) for some in texts if some))
    weights = new_values(work.model, made.weights)
    return Candidate(made.branch_replacements, weights=weights, read=read)


_ATTENTIONS: tuple[Group, ...] = ("attention",)
_APART: tuple[Group, ...] = ("attention", "mlp")
_BLOCKS: tuple[Group, ...] = ("block",)

METHODS: dict[tuple[Unit, str], Method] = {
    ("blocks", "ShortGPT"): shortgpt,
    ("blocks", "cosine"): partial(cosine, kinds=_APART),
    ("blocks", "Prune&Comp"): prune_and_comp,
    ("blocks", "LinearPatch"): linear_patch,
    ("blocks", "ReplaceMe"): replace_me,
    ("attentions", "cosine"): partial(cosine, kinds=_ATTENTIONS),
    ("attentions", "NBL"): nbl,
    ("blocks", "SLEB"): partial(greedily, kinds=_BLOCKS, objective="perplexity"),
    ("blocks", "BlockPruner"): partial(greedily, kinds=_APART, objective="perplexity"),
    ("attentions", "BlockPruner"): partial(greedily, kinds=_ATTENTIONS, objective="perplexity"),
    ("blocks", "ours"): partial(greedily, kinds=_APART),
    ("attentions", "ours"): partial(greedily, kinds=_ATTENTIONS),
    ("attentions", "ours, maps"): partial(healed, kinds=_ATTENTIONS, kind="linear"),
    ("blocks", "ours, folded"): partial(healed, kinds=_BLOCKS, kind="fold"),
    ("attentions", "ours, folded"): partial(healed, kinds=_ATTENTIONS, kind="fold"),
    ("blocks", "ours, distilled"): partial(healed, kinds=_APART, kind="distill"),
    ("attentions", "ours, distilled"): partial(healed, kinds=_ATTENTIONS, kind="distill"),
}
"""In the order in which rows are made: what takes least time first."""

NUMBERS: dict[Unit, tuple[int, ...]] = {"blocks": (4, 7), "attentions": (8, 15)}
TRAINED = "ours, distilled"


@dataclass(frozen=True)
class Row:
    """One cut model of the table."""

    unit: Unit
    dropped: int
    method: str
    distill_tokens: int | None = None

    @property
    def name(self) -> str:
        """What it is called on the command line, and kept under."""
        tokens = "" if self.distill_tokens is None else f", {self.distill_tokens} tokens"
        return f"{self.dropped} {self.unit}, {self.method}{tokens}"

    @property
    def title(self) -> str:
        """What the table calls it."""
        tokens = "" if self.distill_tokens is None else f" on {self.distill_tokens // 1000}k tokens"
        return f"{self.method}{tokens}"

    @property
    def make(self) -> Callable[[Workplace], Candidate]:
        """Makes the cut model."""
        method = METHODS[self.unit, self.method]
        return lambda work: method(work, self.dropped)


def rows(distill_tokens: int) -> Iterator[Row]:
    """All rows, in the order in which they are made."""
    for unit, method in METHODS:
        for dropped in NUMBERS[unit]:
            yield Row(unit, dropped, method, distill_tokens if method == TRAINED else None)


PUBLISHED: tuple[tuple[str, ...], ...] = (
    (
        "cosine", "2406.15786", "Llama-2-70B", "half of the attentions",
        "48.4 % faster; 2.4 points of 73.9 lost on questions", "v6, table of Llama-2-70B",
    ),
    (
        "ShortGPT", "2403.03853", "Llama-2-13B", "10 of 40 blocks",
        "55.0 to 52.2 % right of MMLU", "v3, introduction",
    ),
    (
        "SLEB", "2402.09025", "Llama-2-70B", "a fifth of the blocks",
        "C4 perplexity 5.71 to 7.31; 1.27 times the tokens a second", "v5, table 1",
    ),
    (
        "BlockPruner", "2406.10594", "Llama-2-7B", "22 % of the weights",
        "69.0 to 60.2 % right on five tasks; perplexity 11.5", "table of main results",
    ),
    (
        "Prune&Comp", "2507.18212", "Llama-3-8B", "5 of 32 blocks, by block influence",
        "93.19 % kept on questions, 4.01 % above the same without compensation", "v1, abstract",
    ),
    (
        "LinearPatch", "2505.24680", "Llama-3-8B", "5 of 32 blocks",
        "94.15 % kept on questions; 95.16 % with the matrix distilled", "abstract",
    ),
    (
        "ReplaceMe", "2505.02819", "Llama-2-7B", "a quarter of the blocks",
        "91.9 % kept by least squares, 93.1 % by the cosine", "table of the authors' repository",
    ),
    (
        "NBL", "2505.21077", "DeepSeek-R1-Distill-Llama-8B", "12 of 32 attentions",
        "32 % faster, less than 1 % of the accuracy lost", "abstract",
    ),
)  # fmt: skip
"""Figures of papers: method, arXiv, model, cut, figure, where."""
