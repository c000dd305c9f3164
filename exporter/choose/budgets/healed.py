"""What a plan's replacements gain, in the calibration's domain and in another."""

from __future__ import annotations

from collections.abc import Mapping

from exporter.artifacts import HealingReport
from exporter.choose.budgets.budget import Heal
from exporter.models.ablation import BranchReplacement
from exporter.models.loading.model_source import LoadedModel
from exporter.progress import QUIET, Progress
from exporter.score import CalibrationText
from graph_passes.types import SublayerRef


def healing_of(
    loaded: LoadedModel,
    fitted: CalibrationText,
    reported: CalibrationText,
    branch_replacements: Mapping[SublayerRef, BranchReplacement],
    heal: Heal,
    rank: int | None = None,
    *,
    batch_size: int = 4,
    check_text: str | None = None,
    progress: Progress = QUIET,
) -> HealingReport | None:
    """Measures them; None where nothing was put in any branch's place.

    Args:
        loaded: The model.
        fitted: What was searched and fitted on.
        reported: What it is measured on.
        branch_replacements: What takes each branch's place.
        heal: What the planner could choose from.
        rank: Of linear maps.
        batch_size: Samples in one forward pass.
        check_text: The other domain; None: pydoc, or self where pydoc is calibrated on.
        progress: Told of every run, and warned where the two domains disagree.
    """
    from exporter.heal.healed import judged
    from exporter.heal.texts import other_domain

    replaced = any(each.bias is not None or each.maps for each in branch_replacements.values())
    if heal == "none" or not replaced:
        return None
    other = other_domain(
        loaded,
        [fitted.ref.source],
        len(reported.input_ids),
        sequence_length=fitted.ref.sequence_length,
        spec=check_text,
        progress=progress,
    )
    healing = judged(
        loaded,
        branch_replacements,
        reported,
        other,
        asked=heal,
        sources=[fitted.ref],
        rank=rank,
        sequential=True,
        batch_size=batch_size,
        progress=progress,
    )
    parents = {"model": loaded.ref.sha256, "calibration": fitted.ref.sha256}
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
