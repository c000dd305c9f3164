"""What a plan's replacements gain, in the calibration's domain and in another."""

from __future__ import annotations

from collections.abc import Mapping

from exporter.artifacts import HealingReport
from exporter.choose.budgets.text import TextParts
from exporter.heal.options import HealOptions
from exporter.models.ablation import BranchReplacement
from exporter.models.loading.model_source import LoadedModel
from exporter.progress import QUIET, Progress
from graph_passes.types import SublayerRef


def healing_of(
    loaded: LoadedModel,
    texts: TextParts,
    branch_replacements: Mapping[SublayerRef, BranchReplacement],
    heal: HealOptions,
    *,
    batch_size: int = 4,
    progress: Progress = QUIET,
) -> HealingReport | None:
    """Measures them; None where nothing was put in any branch's place.

    Args:
        loaded: The model.
        texts: What was searched and fitted on, and what is reported on.
        branch_replacements: What takes each branch's place.
        heal: What the planner could choose from, and the other domain.
        batch_size: Samples in one forward pass.
        progress: Told of every run, and warned where the two domains disagree.
    """
    from exporter.heal.healed import judged
    from exporter.heal.texts import other_domain

    if not any(each.bias is not None or each.maps for each in branch_replacements.values()):
        return None
    fitted = texts.searched.ref
    other = other_domain(
        loaded,
        [fitted.source],
        len(texts.reported.input_ids),
        sequence_length=fitted.sequence_length,
        spec=heal.check_text,
        progress=progress,
    )
    healing = judged(
        loaded,
        branch_replacements,
        texts.reported,
        other,
        asked=heal.kind,
        sources=[fitted],
        rank=heal.rank,
        sequential=True,
        batch_size=batch_size,
        progress=progress,
    )
    parents = {"model": loaded.ref.sha256, "calibration": fitted.sha256}
    return HealingReport(model=loaded.ref, healing=healing, made_from=parents)


def elsewhere(report: HealingReport | None) -> dict[str, float]:
    """A healed plan's figures in the other domain, as the plan notes them; none without any."""
    texts = [] if report is None else report.healing.texts
    return {
        name: value
        for text in texts
        if text.role == "other"
        for name, value in (
            ("other_kl", text.healed.kl),
            ("other_log_perplexity_increase", text.healed.log_perplexity_increase),
            ("other_top1_agreement", text.healed.top1_agreement),
        )
    }
