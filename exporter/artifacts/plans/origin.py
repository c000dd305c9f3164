"""Which model a plan was made for, and what is said where it is to cut another."""

from __future__ import annotations

from pathlib import Path

from exporter.artifacts import ImportanceReport, PruningPlan
from exporter.errors import PlanError
from exporter.progress import QUIET, Progress

MODEL_KEY = "depthcut.model"
"""Where a graph's metadata has the SHA-256 of the model that it was exported from."""
_ROLE = "model"


def parents_of(report: ImportanceReport, importance_sha256: str | None) -> dict[str, str]:
    """What a plan by scores is made from: the model, and the scores' file where it is known."""
    scores = {} if importance_sha256 is None else {"importance": importance_sha256}
    return {**scores, _ROLE: report.model.sha256}


def hold_against_model(
    plan: PruningPlan,
    sha256: str | None,
    *,
    model: str,
    path: Path | None = None,
    refits: bool = False,
    progress: Progress = QUIET,
) -> None:
    """Warns of a plan for another model, and refuses replacements that were fitted to one.

    Nothing is said where one of the two doesn't tell: a plan by hand, a graph from elsewhere.

    Args:
        plan: The plan.
        sha256: Of the model, as :func:`exporter.models.loading.sources.source_sha256` gives
            it.
        model: What messages call it.
        path: The plan's file.
        refits: Whether the plan's replacements are not used.
        progress: Hears the warning.

    Raises:
        PlanError: The plan has replacements, for another model.
    """
    meant = plan.made_from.get(_ROLE)
    if meant is None or sha256 is None or meant == sha256:
        return
    told = (
        f"{path or 'the plan'} was made for another model (sha256 {meant[:12]}) than {model} "
        f"(sha256 {sha256[:12]})"
    )
    if plan.replacements is not None and not refits:
        raise PlanError(
            f"{told[:1].upper()}{told[1:]}, and its replacements were fitted to that one.",
            "Fit them to this model: depthcut heal.",
            code="another-model",
        )
    progress.say(f"plan: warning: {told}; what can be spared there may be needed here")
