"""How the sublayers that go are searched for."""

from __future__ import annotations

from typing import Literal

from exporter.models.ablation.damage import Objective
from exporter.option_types import Several, Whole
from exporter.options import Options, dataclass, option

DROPPING = "What to drop"
Search = Literal["auto", "one-shot", "greedy"]
OF_SEARCHES = ("objective", "shortlist", "tokens")
"""The fields that only searches by damage heed."""
OF_EMBEDDINGS = ("cosine", "similarity")


@dataclass(frozen=True)
class SearchOptions(Options):
    """How the sublayers are chosen."""

    section = DROPPING
    search: Search | None = option(
        None,
        "How to choose. one-shot: drop the lowest scores. greedy: at each step drop what adds the "
        "least damage. auto: greedy if it takes minutes, otherwise one-shot without the first and "
        "last layer.",
        usual="plan: one-shot for numbers, otherwise greedy; export: auto",
    )
    objective: Objective | None = option(
        None,
        "For --search greedy: the damage to minimise: the KL divergence from "
        "the whole model's answers, the perplexity, 1 minus the cosine of the embeddings, or 1 "
        "minus the correlation of the similarities of pairs of texts (similarity). kl of a "
        "classifier is that of its classes.",
        usual="kl, for encoders cosine",
        rare=True,
    )
    protect: tuple[str, ...] = option(
        (),
        "What must not be dropped: first, last, or kind:layers such as attention:0,29; of an "
        "encoder-decoder also encoder or decoder. Repeatable.",
        metavar="WHAT",
    )
    shortlist: Whole = option(
        12, "For --search greedy: candidates to measure at each step; 0 for all.", config_only=True
    )
    tokens: Several = option(
        4096,
        "For --search greedy: tokens of the calibration text to measure candidates on.",
        "--search-tokens",
        config_only=True,
    )

    @property
    def kept_small(self) -> Objective:
        """The objective; that of next tokens where nothing is said."""
        return self.objective or "kl"

    @property
    def by_damage(self) -> bool:
        """Whether the damage decides, or may."""
        return self.search in ("auto", "greedy")
