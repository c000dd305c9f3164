"""What a plan was made by: chosen, fitted, stopped and judged on which texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from exporter.artifacts import CalibrationRef, JudgedText, PlanParts
from exporter.artifacts.nouns import TEXTS, Nouns
from exporter.artifacts.stages import document_of
from exporter.report.sections.blocks import Block, Bullets, Grid, Note
from exporter.report.words import listed, percent, significant

_ROLES = {
    "chosen": "{What} by which the dropped sublayers were chosen:",
    "fitted": "{What} to which replacements or weights were fitted:",
    "stopped": "Validation {what}, which decided when to stop and what to keep:",
    "judged": "Test {what}, on which the plan's own figures were measured:",
}

_RISE = "log_perplexity_increase"


def parts_blocks(
    parts: PlanParts, shown: Callable[[str], str] = str, read: Nouns = TEXTS
) -> Iterator[Block]:
    """A sentence for each part that there was, and what the plan costs on each text of a mixture.

    Args:
        parts: Of a plan.
        shown: A text's name as it may be told.
        read: What the model reads.
    """
    what = read.much
    told = [
        f"{_ROLES[role].format(what=what, What=what.capitalize())} {_listed(refs, shown, read)}."
        for role, refs in parts.roles.items()
    ]
    if told:
        yield Bullets(told)
    if parts.judged_apart:
        header = ["text", "perplexity", "KL, nats", "same top-1"]
        if any("cosine" in each.figures for each in parts.judged_apart):
            header = ["text", "mean cosine of embeddings"]
        elif not any(_RISE in each.figures for each in parts.judged_apart):
            header = [what, "KL of classes, nats", "same likeliest class"]
        rows = [_row(each, shown) for each in parts.judged_apart]
        right = tuple(range(1, len(header)))
        caption = f"What the plan costs on each {'text' if read == TEXTS else 'source'}, in PyTorch"
        yield Grid(caption, header, rows, right=right)


def other_part(parts: PlanParts, judged: str) -> Iterator[Block]:
    """That the plan was made by other parts of the document that a comparison is judged on.

    Args:
        parts: Of the plan.
        judged: The source of the text that is judged on.
    """
    known = [
        role
        for role, refs in parts.decided.items()
        if document_of(judged) in {document_of(ref.source) for ref in refs}
    ]
    if known:
        yield Note(
            f"{judged} is another part of a text that the plan was {listed(known)} on: on "
            "texts of other kinds the accuracy is likely to be lower (--eval-text).",
            lead="In the domain:",
        )


def _listed(refs: Sequence[CalibrationRef], shown: Callable[[str], str], read: Nouns) -> str:
    named = [ref.model_copy(update={"source": shown(ref.source)}) for ref in refs]
    return listed([ref.describe(read) for ref in named])


def _row(judged: JudgedText, shown: Callable[[str], str]) -> list[str]:
    figures = judged.figures
    if "cosine" in figures:
        return [shown(judged.text.source), f"{figures['cosine']:.4f}"]
    both = [significant(figures["kl"], 3), percent(figures["top1_agreement"])]
    if _RISE not in figures:
        return [shown(judged.text.source), *both]
    rise = math.expm1(min(figures[_RISE], 50.0))
    return [shown(judged.text.source), f"{100 * rise:+.1f} %", *both]
