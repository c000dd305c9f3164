"""The stages of `depthcut export` that write the pruned Hugging Face checkpoint and its card.

It stands in the candidate's folder, which the prune stage makes anew as a whole: whatever is added
there is added to a copy of it in the workplace, so that one folder is published.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from exporter.artifacts import ComparisonReport, PruningPlan
from exporter.checkpoint.facts import CheckpointFacts
from exporter.checkpoint.model_card import CardSources, model_card
from exporter.checkpoint.pruned_model import load_pruned, refuse_tokenless
from exporter.checkpoint.streamed import layers_of
from exporter.checkpoint.write import CARD, write_checkpoint
from exporter.files import sha256_file, write_text
from exporter.models.loading.meta_model import load_meta
from exporter.pipeline.keys import Key
from exporter.pipeline.run import CHECKPOINT, Run, files_below
from exporter.report.files import REPORTS
from graph_passes.files.placing import remove_tree

_CANDIDATE = "candidate"
CARD_STAGE = "card"


def refuse_early(run: Run) -> None:
    """Refuses a model that has no such checkpoint before it is scored and exported.

    Raises:
        UnknownArchitectureError: It takes no tokens; or its layers are not known, where they come
            one after the other.
    """
    if run.request.checkpoint and not run.ledger.has(CHECKPOINT):
        refuse_tokenless(run.choosing.model)
        if run.request.stream:
            layers_of(run.choosing.model)


def checkpoint_key(run: Run) -> Key:
    """The model, the plan, and the graph that the checkpoint is held against."""
    return {
        "model": run.source_sha256,
        "load": vars(run.request.load),
        "candidate": run.ledger.files_hash("prune"),
        "plan": run.plan.sha256,
        "versions": run.versions,
    }


def card_key(run: Run) -> Key:
    """The checkpoint, and what was measured."""
    return {
        "checkpoint": run.ledger.files_hash(CHECKPOINT),
        "measured": run.ledger.files_hash("measure") if run.request.compared else None,
        "reports": REPORTS,
    }


def write(run: Run) -> tuple[list[Path], dict[str, Any]]:
    """Writes the checkpoint, reads it back, and holds it against the candidate's graph."""
    loaded, plan = run.healed_model(), run.plan
    run.free_model()  # It is pruned in place: whoever wants the whole model loads it again.
    folder = _candidate_in_work(run) / CHECKPOINT
    remove_tree(folder)
    facts = write_checkpoint(
        loaded, plan.plan, folder, replacements=plan.replacements, progress=run.progress
    )
    del loaded
    _check(run, folder, facts)
    return files_below(folder), facts.model_dump(mode="json")


def _check(run: Run, folder: Path, facts: CheckpointFacts) -> None:
    from exporter.export.parity import check_export
    from exporter.pipeline.stages import judge, parity_provider

    dtype = run.request.load.dtype
    checks = check_export(
        load_meta(str(folder), dtype=dtype, pruned=True)
        if run.request.stream
        else load_pruned(folder, dtype=dtype),
        folder.parent / "model.onnx",
        layers=facts.kept,
        provider=parity_provider(run),
        progress=run.progress,
    )
    judge(run, "candidate against the checkpoint", checks)


def write_card(run: Run) -> tuple[list[Path], None]:
    """Writes the model card, with what was measured."""
    facts = CheckpointFacts.model_validate(run.ledger.notes(CHECKPOINT))
    plan = run.plan.plan
    sources = CardSources(
        plan=plan,
        importance=run.importance if _rests_on_scores(run, plan) else None,
        healing=run.healing,
        report=_report(run),
    )
    path = _candidate_in_work(run) / CHECKPOINT / CARD
    write_text(path, model_card(facts, sources))
    return [path], None


def _rests_on_scores(run: Run, plan: PruningPlan) -> bool:
    """A plan that was given may rest on other scores than this run's, or on none."""
    scored = run.request.scored
    return scored and plan.importance_sha256 == sha256_file(run.ledger.path("importance.json"))


def _report(run: Run) -> ComparisonReport | None:
    if not run.request.compared:
        return None
    return ComparisonReport.read(run.ledger.path("report.json"))


def keep_with_candidate(run: Run) -> None:
    """Takes a checkpoint that is still valid along, where the candidate was made anew."""
    if (run.ledger.work / _CANDIDATE).is_dir():
        _candidate_in_work(run)


def _candidate_in_work(run: Run) -> Path:
    """The candidate's folder in the workplace, whole; what is not new in it is linked."""
    for stage in ("prune", CHECKPOINT, CARD_STAGE):
        run.ledger.take_along(stage, _CANDIDATE)
    return run.ledger.work / _CANDIDATE
