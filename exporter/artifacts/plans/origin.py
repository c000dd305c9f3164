"""Which model a plan was made for, and what is said where it is to cut another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from exporter.artifacts import CalibrationRef, ImportanceReport, PruningPlan
from exporter.errors import PlanError
from exporter.progress import QUIET, Progress
from graph_passes.plan_record import canonical_json

MODEL_KEY = "depthcut.model"
"""Where a graph's metadata has the SHA-256 of the model that it was exported from."""
CONTENT = "content:"
_TEXTS_KEY = "depthcut.texts"
_ROLE = "model"


def note_texts(
    metadata: MutableMapping[str, str], roles: Mapping[str, Iterable[CalibrationRef]]
) -> None:
    """Adds to a graph's metadata by what texts it was made, by their role.

    That is their SHA-256, and behind ``content:`` what copies are known by. Names are left out:
    they may be paths of this machine.
    """
    noted = noted_texts(metadata)
    for role, refs in roles.items():
        for ref in refs:
            known = {ref.sha256, *([f"{CONTENT}{ref.content}"] if ref.content else [])}
            noted[role] = sorted({*noted.get(role, ()), *known})
    if noted:
        metadata[_TEXTS_KEY] = canonical_json(noted)


def noted_texts(metadata: Mapping[str, str]) -> dict[str, list[str]]:
    """What :func:`note_texts` noted; an unreadable note counts as none."""
    try:
        return TypeAdapter(dict[str, list[str]]).validate_json(metadata.get(_TEXTS_KEY, "{}"))
    except ValidationError:
        return {}


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
    progress.say(f"plan: warning: {told}; sublayers that are redundant there may be needed here")
