"""From a plan to a healed one: fits, choices, and what they gained in two domains."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from exporter.artifacts import (
    CalibrationRef,
    HealedBranch,
    HealedClasses,
    HealedEmbeddings,
    HealedText,
    Healing,
    HealingReport,
    ModelRef,
    PlannedDeletion,
    PruningPlan,
)
from exporter.artifacts.loaded_plan import ChangedWeight
from exporter.artifacts.plans import hold_against_model, validate_for
from exporter.artifacts.servers import is_plain, places_of, refuse_needed
from exporter.errors import CalibrationError, HealingError, MissingDependencyError
from exporter.heal.automatic import in_turn
from exporter.heal.distill.student import adapter_library
from exporter.heal.distill.workers import is_alone
from exporter.heal.domains import (
    Lost,
    gain_warnings,
    measured_text,
    predicted_by,
    warnings_of,
)
from exporter.heal.fit import Fit, fit_branches, most_explained
from exporter.heal.fitting import Fitting, Made
from exporter.heal.memory import telling_memory
from exporter.heal.options import HealOptions
from exporter.heal.plan_file import (
    FOLDER_PLAN,
    FOLDER_REPORT,
    healed_deletions,
    kind_of,
    write_healed_plan,
)
from exporter.heal.texts import (
    HealingTexts,
    choice_warnings,
    figures_from,
    healing_texts,
    judged_on,
)
from exporter.models.ablation.branch_replacements import NOTHING, BranchReplacement
from exporter.models.architectures import named_in, named_sublayers
from exporter.models.changed_weights import refuse_quantized
from exporter.models.loading.model_source import LoadedModel
from exporter.models.texts.calibration import CalibrationText
from exporter.progress import QUIET, Progress
from graph_passes.types import Replacement, SublayerRef


def healed_sublayers(plan: PruningPlan, model: ModelRef) -> list[SublayerRef]:
    """The sublayers whose places are taken."""
    if model.encoder_layers is not None:
        raise HealingError(
            f"{model.source} is an encoder-decoder, which is healed where it is exported.",
            "depthcut export MODEL --plan PLAN --heal best --calibration PAIRS.",
            code="two-stacks",
        )
    return named_sublayers(plan.deletions, model.num_layers)


def refuse_early(options: HealOptions, loaded: LoadedModel, plan: PruningPlan) -> None:
    """Refuses what can't be done."""
    _refuse_server(options, plan)
    if options.changes_weights:
        refuse_quantized(loaded.model)
    if options.trains and options.train == "adapters":
        adapter_library()


def _refuse_server(options: HealOptions, plan: PruningPlan) -> None:
    """Refuses a plan that its runtime can't hold, and healing that finds no place there."""
    server = options.server
    if server is None or is_plain(plan.deletions):
        return
    refs = [ref for deletion in plan.deletions for ref in deletion.sublayers]
    refuse_needed(server, refs)
    wanted = {"bias", "linear"} if options.kind == "best" else {options.kind}
    held = {place for ref in refs for place in places_of(server, ref)}
    if not options.changes_weights and not wanted & held:
        raise HealingError(
            f"{server} has no place for what --heal {options.kind} fits: there the dropped "
            f"sublayers of this plan can have {' or '.join(sorted(held))}.",
            "Give --heal fold or distill, which change kept weights, or leave the plan as it is.",
            code="server-holds-none",
        )


@dataclass(frozen=True)
class Healed:
    """A healed plan, not yet written."""

    plan: PruningPlan
    branch_replacements: dict[SublayerRef, BranchReplacement]
    report: HealingReport
    weights: Mapping[str, ChangedWeight] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Writes the plan, its numbers and the report into a folder of their own."""
        write_healed_plan(
            folder / FOLDER_PLAN,
            self.plan,
            self.branch_replacements,
            weights=self.weights,
            report=self.report,
            report_path=folder / FOLDER_REPORT,
        )


def heal(
    loaded: LoadedModel,
    plan: PruningPlan,
    options: HealOptions | None = None,
    *,
    made_from: Mapping[str, str] | None = None,
    allow_all: bool = False,
    work: Path | None = None,
    texts: HealingTexts | None = None,  # None reads what the options name
    lost: Lost | None = None,
    progress: Progress = QUIET,
) -> Healed:
    """Makes up for what a plan drops, and measures what that gains.

    A replacement is the mean of a branch's output, or the ridge map from what it reads to it; or
    nothing takes the branches' places, and kept weights are fitted anew or trained. What an earlier
    healing put into the plan is replaced.
    """
    heal_options, ref = options or HealOptions(), loaded.ref
    validate_for(plan, ref, allow_all=allow_all)
    hold_against_model(plan, ref.sha256, model=ref.source, refits=True, progress=progress)
    names = healed_sublayers(plan, ref)
    parents = {**(made_from or {}), "model": ref.sha256}

    def attempt(options: HealOptions) -> Healed:
        return _healed(loaded, plan, names, options, parents, work, texts, lost, progress)

    *others, last = in_turn(heal_options, loaded, progress)
    for way in others:
        try:
            return attempt(way)
        except (CalibrationError, HealingError, MissingDependencyError) as error:
            if error.code == "out-of-memory" and not is_alone():
                raise  # the other processes would wait for this one
            progress.say(f"heal: {error.message} Another way is taken instead.")
    return attempt(last)


def _healed(
    loaded: LoadedModel,
    plan: PruningPlan,
    names: list[SublayerRef],
    options: HealOptions,
    parents: Mapping[str, str],
    work: Path | None,
    texts: HealingTexts | None,
    lost: Lost | None,
    progress: Progress,
) -> Healed:
    """Heals by one kind, and measures what that gains."""
    refuse_early(options, loaded, plan)
    decided = [*plan.chosen_on, *plan.stopped_on]
    texts = texts or healing_texts(loaded, options, progress, chosen_on=decided)
    with _made(Fitting(loaded, texts, names, options, work, progress)) as made:
        healing = measured_healing(
            loaded,
            made.branch_replacements,
            (made.held_out, texts.other),
            options,
            texts.sources,
            made.fits,
            choice_warnings(options, texts),
            made=made,
            lost=lost,
            progress=progress,
        )
    sources = {f"calibration_{i}": text.sha256 for i, text in enumerate(texts.sources)}
    parents = {**parents, **sources}
    measured = bool(healing.measured)
    healed = PruningPlan(
        deletions=healed_deletions(plan.deletions, made.branch_replacements),
        budget=plan.budget,
        importance_sha256=plan.importance_sha256,
        chosen_on=plan.chosen_on,
        predicted=predicted_by(healing),
        predicted_on=figures_from(options, texts) if measured else None,
        fitted_on=texts.fitting.parts,
        stopped_on=[] if made.deciding is None else made.deciding.parts,
        judged_on=judged_on(made.held_out, texts.other) if measured else [],
        made_from={**plan.made_from, **parents},
    )
    report = HealingReport(model=loaded.ref, healing=healing, made_from=parents)
    return Healed(healed, made.branch_replacements, report, made.weights)


@contextlib.contextmanager
def _made(fitting: Fitting) -> Iterator[Made]:
    """What makes up for the branches, while the block runs."""
    kind = fitting.options.decided
    if kind == "distill":
        from exporter.heal.distill.distilled import distilled

        with distilled(fitting) as made:
            yield made
    elif kind == "fold":
        from exporter.heal.folded import folded

        with telling_memory(fitting.options), folded(fitting) as made:
            yield made
    elif kind == "best":
        chooser, held_out = fitting.texts.halves
        yield Made(held_out, *fitting.best(chooser), deciding=chooser)
    else:
        yield Made(fitting.texts.held_out, *fitting.alike(kind))


def measured_healing(
    loaded: LoadedModel,
    replaced: Mapping[SublayerRef, BranchReplacement],
    texts: tuple[CalibrationText, CalibrationText | None],  # None where there is none
    options: HealOptions,
    sources: Sequence[CalibrationRef],
    fits: Mapping[SublayerRef, Fit] | None = None,
    warnings: Sequence[str] = (),
    made: Made | None = None,  # what training made; None where nothing was trained
    lost: Lost | None = None,
    progress: Progress = QUIET,
) -> Healing:
    """Measures what replacements gain in both domains, and warns where the two disagree.

    The second is left out where the first shows the cut to be lost.
    """
    own, other = texts
    measure = partial(
        measured_text,
        loaded.model,
        dropped=dict.fromkeys(replaced, NOTHING),
        healed=replaced,
        batch_size=options.batch_size,
        within=None if made is None else made.within,
        progress=progress,
    )
    measured = [measure("calibration", own, lost=lost)]
    is_lost = lost is not None and lost(measured[0])
    if other is not None and not is_lost:
        measured.append(measure("other", other))
    answers = [healed_text for healed_text in measured if isinstance(healed_text, HealedText)]
    embeddings = [item for item in measured if isinstance(item, HealedEmbeddings)]
    classes = [item for item in measured if isinstance(item, HealedClasses)]
    result = list(warnings)
    if not is_lost:
        result += [*warnings_of(answers, own.read), *gain_warnings([*embeddings, *classes])]
    for warning in result:
        progress.say(f"heal: warning: {warning}")
    branches = [_branch(name, replaced[name], (fits or {}).get(name)) for name in sorted(replaced)]
    return Healing(
        asked=options.decided,
        rank=options.used_rank,
        calibration=list(sources),
        branches=branches,
        parameters=sum(branch.parameters for branch in branches),
        changed_weights=0 if made is None else len(made.weights),
        training=None if made is None else made.training,
        texts=answers,
        embeddings=embeddings,
        classes=classes,
        warnings=result,
    )


def _branch(name: SublayerRef, replacement: BranchReplacement, fit: Fit | None) -> HealedBranch:
    bias = 0 if replacement.bias is None else replacement.bias.numel()
    return HealedBranch(
        layer=name[0],
        kind=name[1],
        replacement=kind_of(replacement),
        parameters=bias + sum(tensor.numel() for tensor in replacement.maps),
        ridge=None if fit is None else fit.ridge,
        bias_explained=None if fit is None else fit.bias_explained,
        linear_explained=None if fit is None else fit.linear_explained,
    )


KINDS = ("bias", "linear", "best")
"""The ways of healing that there are; they put something in a branch's place."""


def heal_stacks(
    loaded: LoadedModel,
    plan: PruningPlan,
    text: CalibrationText,
    options: HealOptions,
    progress: Progress = QUIET,
) -> Healed:
    """Fits what takes the branches' places on the whole model, and measures the gain."""
    refuse_other_ways(options)
    fitted, held_out = _parts(text)
    names = named_in(loaded.model, plan.deletions)
    fits = fit_branches(
        loaded,
        fitted,
        names,
        ridge=options.ridge,
        batch_size=options.batch_size,
        uses_maps=options.kind != "bias",
        progress=progress,
    )
    kind: Replacement = "bias" if options.kind == "bias" else "linear"
    chosen = {
        name: most_explained(fit.choices) if options.kind == "best" else fit.choices[kind][1]
        for name, fit in fits.items()
    }
    healing = measured_healing(
        loaded, chosen, (held_out, None), options, [fitted.ref], fits, progress=progress
    )
    parents = {"model": loaded.ref.sha256, "calibration_0": text.ref.sha256}
    result = {
        "deletions": [
            PlannedDeletion(layer=n.layer, kind=n.kind, replacement=kind_of(chosen[n]))
            for n in names
        ],
        "fitted_on": fitted.parts,
        "judged_on": held_out.parts,
        "made_from": {**plan.made_from, **parents},
    }
    report = HealingReport(model=loaded.ref, healing=healing, made_from=parents)
    return Healed(plan.model_copy(update=result), chosen, report)


def _parts(text: CalibrationText) -> tuple[CalibrationText, CalibrationText]:
    """What is fitted on, and what is held out."""
    number = len(text.input_ids)
    if number < 2:
        raise HealingError(
            f"{text.ref.source} holds one pair; healing fits on some and measures on others.",
            "Give more pairs with --calibration.",
            code="too-few-pairs",
        )
    first = number - max(1, number // 5)
    return text.rows(slice(0, first)), text.rows(slice(first, None))


def refuse_other_ways(options: HealOptions) -> None:
    """Refuses what changes kept weights."""
    if options.kind not in KINDS:
        raise HealingError(
            f"--heal {options.kind} changes weights that are kept; an encoder-decoder is healed by "
            "what takes the branches' places alone.",
            f"Take {', '.join(KINDS)}, or none.",
            code="no-weights-changed",
        )
