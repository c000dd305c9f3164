"""What a plan costs on text of another domain than the one that it was chosen and fitted on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from exporter.ablation import NOTHING, Cut
from exporter.progress import QUIET, Progress

if TYPE_CHECKING:
    from exporter.importance import CalibrationText
    from exporter.model_source import LoadedModel


def judged_elsewhere(
    loaded: LoadedModel,
    cut: Cut,
    own: CalibrationText,
    other: CalibrationText,
    *,
    batch_size: int = 4,
    progress: Progress = QUIET,
) -> tuple[Mapping[str, float | None], list[str]]:
    """A plan's figures in another domain, and what a reader must know before trusting the first.

    Args:
        loaded: The model.
        cut: What stands in the place of which branch.
        own: Held-out text of the domain that the plan rests on.
        other: Text of another.
        batch_size: Samples in one forward pass.
        progress: Told of every run.

    Raises:
        ScoringError: Logits are not finite, or there is no position to compare at.
    """
    from exporter.healing.domains import measured_text, warnings_of

    dropped = dict.fromkeys(cut, NOTHING)
    model = loaded.model
    there = measured_text(
        model, "other", other, dropped, cut, batch_size=batch_size, progress=progress
    )
    figures = {
        "other_kl": there.healed.kl,
        "other_log_perplexity_increase": there.healed.log_perplexity_increase,
        "other_log_perplexity_increase_std_error": there.healed.log_perplexity_increase_std_error,
        "other_top1_agreement": there.healed.top1_agreement,
    }
    if all(what is NOTHING for what in cut.values()):
        return figures, []  # nothing was fitted
    here = measured_text(
        model, "calibration", own, dropped, cut, batch_size=batch_size, progress=progress
    )
    return figures, warnings_of([here, there])
