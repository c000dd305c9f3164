"""Writes a pruned checkpoint, in the form that the most programs load."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.artifacts import PruningPlan
from exporter.artifacts.servers import CHECKPOINT_SERVERS, Server
from exporter.checkpoint.decilm import save_decilm
from exporter.checkpoint.facts import (
    CheckpointFacts,
    CheckpointForm,
    Weights,
    license_of_base,
    name_of_base,
    weights_of,
)
from exporter.checkpoint.pruned_model import (
    LICENSE_FILES,
    answer_to,
    prune_model,
    refuse_checkpoint_folder,
    refuse_tokenless,
    save_pruned_into,
)
from exporter.checkpoint.streamed import write_streamed
from exporter.cut.branch_replacements import branch_replacements_of
from exporter.errors import PlanError, UnknownArchitectureError
from exporter.files import staged_directory, telling_full_disk, write_text
from exporter.models.ablation.branch_replacements import BranchReplacements, branches_replaced
from exporter.models.loading.meta_model import MetaModel
from exporter.models.loading.model_source import LoadedModel
from exporter.models.residual_stream import probe_inputs
from exporter.models.sentence_folder import MODULES, copy_processor_files, copy_sentence_files
from exporter.models.texts.images import reads_images
from exporter.progress import QUIET, Progress
from graph_passes.files.reading import copy_file

if TYPE_CHECKING:
    import torch

    from exporter.artifacts.loaded_plan import Replacements

CARD = "README.md"
"""The Hub's name for a model's card."""


def write_checkpoint(
    loaded: LoadedModel,
    plan: PruningPlan,
    folder: Path,
    *,
    replacements: Replacements | None = None,
    cut: BranchReplacements | None = None,
    card: Callable[[CheckpointFacts], str] | None = None,  # None writes none
    form: CheckpointForm = "own",
    server: Server | None = None,  # the one that a DeciLM is for; None: all of them
    progress: Progress = QUIET,
) -> CheckpointFacts:
    """Prunes a model and writes it as a Hugging Face folder, which is there whole or not.

    Args:
        loaded: The whole model, which is changed.
        plan: What is dropped.
        folder: The new folder, or an earlier checkpoint, which is replaced.
        replacements: The numbers of a healed plan.
        cut: The same, already made.
        card: Makes the model card's text.
        form: ``own``, which :func:`exporter.load_model` reads with ``pruned=True``, or
            ``decilm``, which servers read.
        server: The runtime that the checkpoint is for.
        progress: Hears of each step.

    Raises:
        UnknownArchitectureError: The pruned model's answers differ from those with the branches
            skipped.
        UsageError: The folder holds something else.
    """
    refuse_checkpoint_folder(folder, [loaded.path] if folder.exists() else [])
    before = weights_of(loaded.model)
    with staged_directory(folder) as stage:
        after: Weights | None = None
        if isinstance(loaded, MetaModel):
            pruned, kept = write_streamed(
                loaded, plan, stage, replacements=replacements, progress=progress
            )
        else:
            if cut is None:
                cut = branch_replacements_of(plan.deletions, replacements, loaded.model)
            with progress.task(f"write {folder}"):
                if form == "decilm":
                    pruned, kept = loaded, None
                    after = save_decilm(loaded, plan.deletions, cut, server, stage)
                elif form == "early-exit":
                    pruned, kept = _exiting(loaded, plan, replacements)
                else:
                    pruned, kept = _pruned(loaded, plan, cut, progress)
                if after is None:
                    save_pruned_into(pruned, stage)
        with telling_full_disk(stage):
            for pattern in LICENSE_FILES if loaded.path.is_dir() else ():
                for path in loaded.path.glob(pattern):
                    if not path.is_dir():
                        copy_file(path, stage / path.name)
            copy_sentence_files(loaded.path, stage)
            if reads_images(loaded.model):
                copy_processor_files(loaded.path, stage)
        facts = _facts(loaded, plan, before, pruned, kept, stage)
        if after is not None:
            servers = [server] if server else list(CHECKPOINT_SERVERS)
            result = {"after": after, "servers": servers, "plain": False}
            facts = facts.model_copy(update=result)
        if card is not None:
            with telling_full_disk(stage):
                write_text(stage / CARD, card(facts))
    _say(facts, progress)
    return facts


def _pruned(
    loaded: LoadedModel, plan: PruningPlan, cut: BranchReplacements, progress: Progress
) -> tuple[LoadedModel, list[int] | None]:
    """The pruned model, and which layers it kept where it has fewer."""
    from exporter.checkpoint.pruned_model import kept_layers, shallow_model

    kept = kept_layers(plan.deletions, loaded.ref.num_layers)
    if kept:
        try:
            return shallow_model(loaded, plan.deletions, _wanted(loaded.model, cut)), kept
        except UnknownArchitectureError as error:
            progress.say(f"checkpoint: not with fewer layers. {error}")
    prune_model(loaded, plan.deletions, cut)
    return loaded, None


def _exiting(
    loaded: LoadedModel, plan: PruningPlan, replacements: Replacements | None
) -> tuple[LoadedModel, list[int]]:
    """The first layers alone, and which they are."""
    from exporter.checkpoint.pruned_model import exit_answer, kept_layers, shallow_model

    kept = kept_layers(plan.deletions, loaded.ref.num_layers)
    if not kept or kept != list(range(len(kept))):
        raise PlanError(
            "The plan does not drop all layers behind the first ones, and nothing else.",
            "Make it with depthcut plan --keep-first N.",
            code="no-early-exit",
        )
    if replacements is not None:
        raise PlanError(
            "The plan was healed with the norms of the dropped layers in place.",
            "Give the plan as it was before healing.",
            code="healed-elsewhere",
        )
    refuse_tokenless(loaded.model)
    wanted = exit_answer(loaded.model, len(kept))
    return shallow_model(loaded, plan.deletions, wanted, exits=True), kept


def _wanted(model: Any, cut: BranchReplacements) -> torch.Tensor:
    import torch

    refuse_tokenless(model)
    with branches_replaced(model, cut), torch.inference_mode():
        return answer_to(model, probe_inputs(model))


def _facts(
    base: LoadedModel,
    plan: PruningPlan,
    before: Weights,
    pruned: LoadedModel,
    kept: list[int] | None,
    stage: Path,
) -> CheckpointFacts:
    """What is told of a checkpoint; ``before`` are the weights that the base had."""
    name, on_hub = name_of_base(base)
    return CheckpointFacts(
        base=name,
        on_hub=on_hub,
        base_sha256=base.ref.sha256,
        architecture=base.ref.architecture,
        layers=base.ref.num_layers,
        deletions=plan.deletions,
        kept=kept,
        plain=kept is not None,
        transformers=version("transformers"),
        dtype=str(pruned.model.dtype).removeprefix("torch."),
        before=before,
        after=weights_of(pruned.model),
        license=license_of_base(base.path),
        has_tokenizer=base.tokenizer is not None,
        has_modules=(stage / MODULES).is_file(),
    )


def _say(facts: CheckpointFacts, progress: Progress) -> None:
    before, after = facts.before.bytes / 1e6, facts.after.bytes / 1e6
    form = "" if facts.kept is None else f"{len(facts.kept)} of {facts.layers} layers, "
    progress.say(
        f"checkpoint: {form}{before:.1f} -> {after:.1f} MB of weights; {facts.loader_words}"
    )
