"""The cosine of LLM-Drop: each sublayer is judged by how far it turns the stream."""

from __future__ import annotations

from functools import lru_cache

from exporter.models.ablation.branch_replacements import without_branches
from exporter.score.scoring import score_on
from tests.benchmarks.rivals.candidate import Candidate
from tests.benchmarks.rivals.streams import BATCH
from tests.benchmarks.rivals.workplace import Workplace


@lru_cache(maxsize=1)
def cosine_scores(work: Workplace) -> dict[tuple[int, str], float]:
    """Every attention's and MLP's score, by layer and kind; lower for what turns the stream less.

    Source: arXiv 2406.15786, equations 1 to 3; as ``depthcut score`` has it.
    """
    report = score_on(work.loaded, work.few, batch_size=BATCH)
    return {(s.layer, s.kind): s.score for s in report.scores if s.kind in ("attention", "mlp")}


def cosine(work: Workplace, dropped: int) -> Candidate:
    """Drops so many attentions and so many MLPs (joint layer drop)."""
    return _lowest(work, {"attention": dropped, "mlp": dropped})


def cosine_of_attentions(work: Workplace, dropped: int) -> Candidate:
    """Drops attentions (attention drop)."""
    return _lowest(work, {"attention": dropped})


def _lowest(work: Workplace, numbers: dict[str, int]) -> Candidate:
    scores = cosine_scores(work)
    names: list[tuple[int, str]] = []
    for kind, number in numbers.items():
        order = sorted((name for name in scores if name[1] == kind), key=lambda n: scores[n])
        names += order[:number]
    return Candidate(without_branches(names, work.model))
