"""From a plan to a healed one: fits, folds or a training, and what they gained in two domains."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from exporter.artifacts import (
    CalibrationRef,
    HealedBranch,
    HealedFigure,
    HealedText,
    Healing,
    HealingReport,
    PlannedDeletion,
    PruningPlan,
)
from exporter.artifacts.base import TEXTS, Nouns
from exporter.artifacts.healing import Role
from exporter.artifacts.loaded_plan import ChangedWeight
from exporter.artifacts.plan_figures import PlanFigure
from exporter.artifacts.plans import hold_against_model, validate_for
from exporter.artifacts.servers import is_plain, places_of, refuse_unheld
from exporter.artifacts.stacks import Stacks
from exporter.artifacts.store import Store
from exporter.compare.intervals import mean_interval, share_interval
from exporter.errors import CalibrationError, HealingError, MissingDependencyError, ScoringError
from exporter.heal.automatic import in_turn, telling_memory, training_device
from exporter.heal.distill.student import Student, adapter_library
from exporter.heal.fit import Fit, Fitting, Made
from exporter.heal.folded import folded_values
from exporter.heal.options import HealOptions
from exporter.heal.plan_file import FOLDER_PLAN, FOLDER_REPORT, kind_of, write_healed_plan
from exporter.heal.texts import HealingTexts, choice_warnings, figures_from, healing_texts
from exporter.models.ablation.branch_replacements import (
    NOTHING,
    BranchReplacement,
    BranchReplacements,
)
from exporter.models.ablation.damage import (
    BySample,
    Damage,
    degrees_of_freedom,
    ratio,
    ratio_std_error,
)
from exporter.models.ablation.damage import joined as joined_damages
from exporter.models.ablation.meter import CutMeter, Within
from exporter.models.changed_weights import (
    OwnValue,
    bfloat16_where_fast,
    refuse_quantized,
    weights_changed,
)
from exporter.models.loading.model_source import LoadedModel
from exporter.models.tasks import Task, task_of
from exporter.models.texts.calibration import DEFAULT_TOKENS, CalibrationText, joined
from exporter.progress import QUIET, Progress
from graph_passes.types import SublayerRef

_LEAST_SHARE = 0.05
"""Of what dropping costs; what gives back less has gained nothing worth its cost."""
_STD_ERRORS = 2.0
_ALIKE = 1 / 3
"""Where one domain's share of the gain is below this part of the other's, they disagree."""
Lost = Callable[[HealedText], bool]
"""Whether what was measured shows that a cut is not worth measuring on."""


def measured_text(
    model: Any,
    role: Role,
    text: CalibrationText,
    dropped: BranchReplacements,
    healed: BranchReplacements,
    *,
    batch_size: int = 4,
    within: Within | None = None,  # None: they are the same
    lost: Lost | None = None,
    progress: Progress = QUIET,
) -> HealedText:
    """Measures both cuts on one text, against the whole model."""
    befores: list[Any] = []
    afters: list[Any] = []
    judging: Task[Any] = task_of(model)
    batch_size = judging.batch_size(batch_size)
    starts = range(0, len(text.input_ids), batch_size)
    with progress.task("measure the healed cut", total=len(starts), unit="batches") as task:
        for start in starts:
            part = text.rows(slice(start, start + batch_size))
            meter = judging.meter(
                part.input_ids,
                part.mask,
                batch_size=batch_size,
                sources=part.sources,
                types=part.types,
            )
            before, after = _both(meter, dropped, healed, within)
            befores.append(before)
            afters.append(after)
            task.advance()
            measured = _told(role, text.rows(slice(0, start + batch_size)), befores, afters)
            if lost is not None and lost(measured):
                break
    return measured


def _both(
    meter: CutMeter[Any],
    dropped: BranchReplacements,
    healed: BranchReplacements,
    within: Within | None,
) -> tuple[BySample, BySample]:
    """The damage of both cuts; the whole model runs once."""
    if within is None:
        before, after = meter.measure_many(dropped, [healed])
        return before, after
    return meter.measure(dropped), meter.inside(within).measure(healed)


def _told(
    role: Role, text: CalibrationText, befores: Sequence[Any], afters: Sequence[Any]
) -> HealedText:
    before, after = (
        joined_damages(parts).by_document(text.clusters) for parts in (befores, afters)
    )
    figures = {}
    for figure in before.kind.figures:
        key = figure.key
        old, new = before.value(key), after.value(key)
        if figure.is_minor and math.isnan(old + new):
            continue  # of pairs, of which there are none
        errors = None if figure.is_share else (before.std_error(key), after.std_error(key))
        figures[key] = HealedFigure(
            dropped=old,
            healed=new,
            ci95=None if figure.limit is None else ends_95(after, figure),
            std_errors=errors or (None, None),
        )
    first = before.kind.figures[0]
    (lost, counts), (left, _) = (damage.sums()[first.key] for damage in (before, after))
    gains = (left - lost) if first.higher_is_better else (lost - left)
    perplexities = None
    if isinstance(before, Damage):
        perplexities = before.baseline_perplexity, before.perplexity, after.perplexity
    return HealedText(
        role=role,
        text=text.ref,
        figures=figures,
        gain=ratio(gains, counts),
        gain_std_error=ratio_std_error(gains, counts),
        degrees=degrees_of_freedom(counts) if np.count_nonzero(counts) > 1 else None,
        perplexities=perplexities,
    )


def ends_95(damage: BySample, figure: PlanFigure) -> tuple[float, float] | None:
    """The 95 % interval of a figure; None of too few samples."""
    interval = (share_interval if figure.is_share else mean_interval)(*damage.sums()[figure.key])
    return None if interval is None else interval.ci95


def warnings_of(texts: Sequence[HealedText], read: Nouns = TEXTS) -> list[str]:
    """What a reader must know before trusting the gain: it is nothing somewhere, or elsewhere."""
    best = max((text.gained_share or 0.0 for text in texts), default=0.0)
    weak = [text.text.source for text in texts if not _is_sure(text, _ALIKE * best)]
    warnings = []
    if weak:
        words = ", ".join(
            f"on {text.text.source} {text.gain_words}{_further(text)}" for text in texts
        )
        warnings.append(
            f"Healing gained little, or nothing sure, on {' and '.join(weak)}; of what dropping "
            f"costs it gives back {words}. Measure on more {read.much} (--samples), or "
            f"calibrate on {read.much} as in the intended use, or on a mixture."
        )
    if "other" not in {text.role for text in texts}:
        alone = "The gain was measured in the calibration's domain only"
        warnings.append(f"{alone}; others may gain nothing.")
    return warnings


def _is_sure(text: HealedText, least: float) -> bool:
    """Whether a gain is beyond its noise; the answers may not be further from the whole model's."""
    share, error = text.gained_share, text.gain_std_error or 0.0
    is_enough = share is None or share >= max(_LEAST_SHARE, least)
    return is_enough and text.gain > _STD_ERRORS * error and not _further(text)


def _further(text: HealedText) -> str:
    """That the answers are further from the whole model's than unhealed; empty where not."""
    kl = text.figures.get("kl")
    if kl is None or kl.healed <= kl.dropped:
        return ""
    return f", while the KL divergence rises from {kl.dropped:.3g} to {kl.healed:.3g} nats"


def refuse_early(options: HealOptions, loaded: LoadedModel, plan: PruningPlan) -> None:
    """Refuses what can't be done, and a plan, or its healing, that its runtime can't hold."""
    if options.changes_weights:
        refuse_quantized(loaded.model)
    if options.trains and options.train == "adapters":
        adapter_library()
    server = options.server
    if server is None or is_plain(plan.deletions):
        return
    refs = [ref for deletion in plan.deletions for ref in deletion.sublayers]
    refuse_unheld([server], plan.deletions, healed=True)
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

    Args:
        loaded: The whole model; it is unchanged afterwards.
        plan: What is dropped.
        options: In which way, and on which texts; None: linear maps in the branches' places.
        made_from: Hashes by name of what the plan was made from, which the result names too.
        allow_all: Also takes a plan that leaves neither attention nor MLP.
        work: Where an interrupted training is kept, and goes on.
        texts: The texts, already read; None reads what the options name.
        lost: What the bare cut loses, if that was measured before.
        progress: Hears of each step.

    Returns:
        The plan with its replacements or changed weights, and the loss on held-out text of whole,
        bare and healed model, in nats a token (encoders: mean cosine). ``write(folder)`` keeps it.

    Raises:
        CalibrationError: The text is too short.
        HealingError: Nothing was gained, or the kind can't heal such a cut.
        PlanError: The plan names what the model doesn't have. Of one for another model the
            progress hears a warning.
    """
    heal_options, ref = options or HealOptions(), loaded.ref
    validate_for(plan, ref, allow_all=allow_all)
    hold_against_model(plan, ref.sha256, model=ref.source, refits=True, progress=progress)
    if ref.encoder_layers is not None and texts is None:
        raise HealingError(
            f"{ref.source} is an encoder-decoder, which is healed where it is exported.",
            "depthcut export MODEL --plan PLAN --heal best --calibration PAIRS.",
            code="two-stacks",
        )
    stacks = Stacks.numbered(ref.num_layers, ref.encoder_layers)
    parents = {**(made_from or {}), "model": ref.sha256}

    def attempt(options: HealOptions) -> Healed:
        return _healed(loaded, plan, stacks, options, parents, work, texts, lost, progress)

    *others, last = in_turn(heal_options, loaded, progress)
    for way in others:
        try:
            return attempt(way)
        except (CalibrationError, HealingError, MissingDependencyError) as error:
            progress.say(f"heal: {error.message} Another way is taken instead.")
    return attempt(last)


def _healed(
    loaded: LoadedModel,
    plan: PruningPlan,
    stacks: Stacks,
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
    names = stacks.every(plan.deletions)
    with _made(Fitting(loaded, texts, names, options, work, progress)) as made:
        healing = measured_healing(
            loaded,
            made.branch_replacements,
            (made.held_out, texts.other),
            options,
            texts.sources,
            choice_warnings(options, texts),
            made=made,
            lost=lost,
            progress=progress,
        )
    own = healing.texts[0]
    sources = {f"calibration_{i}": text.sha256 for i, text in enumerate(texts.sources)}
    parents = {**parents, **sources}
    healed = PruningPlan(
        deletions=[
            PlannedDeletion(
                layer=name.layer,
                kind=name.kind,
                replacement=kind_of(made.branch_replacements.get(name, NOTHING)),
            )
            for deletion in plan.deletions  # in the order in which they were chosen
            for name in stacks.every([deletion])
        ],
        encoder_layers=plan.encoder_layers,
        budget=plan.budget,
        importance_sha256=plan.importance_sha256,
        chosen_on=plan.chosen_on,
        predicted={key: one.healed for key, one in own.figures.items()},
        predicted_on=figures_from(options, texts),
        fitted_on=texts.fitting.parts,
        stopped_on=[] if made.deciding is None else made.deciding.parts,
        judged_on=[*made.held_out.parts, *(() if texts.other is None else texts.other.parts)],
        made_from={**plan.made_from, **parents},
    )
    report = HealingReport(model=loaded.ref, healing=healing, made_from=parents)
    return Healed(healed, made.branch_replacements, report, made.weights)


@contextlib.contextmanager
def _made(fitting: Fitting) -> Iterator[Made]:
    """What makes up for the branches, while the block runs."""
    kind = fitting.options.decided
    if kind == "distill":
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
    result = list(warnings)
    if not is_lost:
        result += warnings_of(measured, own.read)
    for warning in result:
        progress.say(f"heal: warning: {warning}")
    branches = [
        HealedBranch(
            layer=name.layer,
            kind=name.kind,
            replacement=kind_of(replaced[name]),
            parameters=sum(tensor.numel() for tensor in replaced[name].numbers),
        )
        for name in sorted(replaced)
    ]
    return Healing(
        asked=options.decided,
        rank=options.used_rank,
        calibration=list(sources),
        branches=branches,
        parameters=sum(branch.parameters for branch in branches),
        changed_weights=0 if made is None else len(made.weights),
        training=None if made is None else made.training,
        texts=measured,
        warnings=result,
    )


KINDS = ("bias", "linear", "best")
"""The ways of healing that there are; they put something in a branch's place."""


def refuse_other_ways(options: HealOptions) -> None:
    """Refuses what changes kept weights."""
    if options.kind not in KINDS:
        raise HealingError(
            f"--heal {options.kind} changes weights that are kept; an encoder-decoder is healed by "
            "what takes the branches' places alone.",
            f"Take {', '.join(KINDS)}, or none.",
            code="no-weights-changed",
        )


@contextlib.contextmanager
def distilled(fitting: Fitting) -> Iterator[Made]:
    """Trains the cut model to answer as the whole one does; the model is as before afterwards.

    One half of the held-out samples decides when to stop and which state is kept; the other is for
    those who judge.
    """
    import torch

    from exporter.heal.distill.training import Trainer

    loaded, options = fitting.loaded, fitting.options
    stopping, judging = fitting.texts.halves
    cut, fits = _replaced(fitting)
    begun = _fold(fitting) if options.begins_folded else []
    model: Any = loaded.model
    own = model.device
    with contextlib.ExitStack() as stack:
        stack.callback(model.to, own)
        with telling_memory(options):
            model.to(training_device(model))
            for value in begun:
                value.other = value.other.to(model.device)
        with torch.random.fork_rng(devices=[]), telling_memory(options):
            torch.manual_seed(options.seed)
            student = Student(model, cut, options.train, options.used_rank, begun)
        stack.callback(student.close)
        trained = sum(tensor.numel() for tensor in student.trained.values()) / 1e6
        fitting.progress.say(f"heal: {trained:.1f} million numbers are trained ({options.train})")
        made_from = _made_from(fitting, stopping.ids_sha256)
        store = None if fitting.work is None else Store(fitting.work / "distill.jsonl", made_from)
        # Nothing holds the trainer: what it keeps is gone before the healed cut is measured.
        training = Trainer(
            student, fitting.texts.fitting, stopping, options, store, fitting.progress
        ).run()
        changes = student.changes()
        student.close()  # what is judged is what is written: merged, in the model's own type
        yield Made(
            judging,
            student.branch_replacements(),
            fits,
            weights=changes,
            deciding=stopping,
            training=training,
            within=partial(weights_changed, model, changes),
        )


def _replaced(fitting: Fitting) -> tuple[BranchReplacements, Mapping[SublayerRef, Fit]]:
    """What takes the branches' places, and is trained too; nothing, unless it is asked for."""
    if fitting.options.replacements == "none":
        return dict.fromkeys(fitting.names, NOTHING), {}
    texts = replace(fitting.texts, fitting=_few(fitting, _TOKENS_OF_MAPS))
    return replace(fitting, texts=texts).alike(fitting.options.replacements)


def _few(fitting: Fitting, tokens: int) -> CalibrationText:
    """Text to fit on before the training: about so many tokens, or twice as many.

    Each text of a mixture is thinned by itself: its samples stand at regular places in the mixture.
    """
    text = fitting.texts.fitting
    every = slice(None, None, max(1, text.ref.tokens // tokens))
    return joined([calibration_text.rows(every) for calibration_text in text.apart])


def _fold(fitting: Fitting) -> list[OwnValue]:
    """The weights, folded on about as much text as a fold alone reads; none if they can't be."""
    fast = bfloat16_where_fast(fitting.loaded.model)
    try:
        with telling_memory(fitting.options), fast:
            return folded_values(fitting, _few(fitting, DEFAULT_TOKENS))
    except (HealingError, ScoringError) as error:
        fitting.progress.say(
            f"heal: {error.message} The training begins with the model's own weights; "
            "replacements: linear may begin nearer."
        )
        return []


_TOKENS_OF_MAPS = 30_000
"""A map of the stream has as many inputs as the stream is wide; a fold blends what is there."""
_FREE = ("check_text", "time_s")
"""Options that may differ where a training goes on."""


def _made_from(fitting: Fitting, stopping_sha256: str) -> Mapping[str, object]:
    """All that a state of the training hangs on."""
    result = vars(fitting.options)
    return {
        **fitting.loaded.identity(),
        "branches": [str(name) for name in fitting.names],
        "begins": f"folded on {DEFAULT_TOKENS}, replaced on {_TOKENS_OF_MAPS} tokens or more",
        "text": fitting.texts.fitting.ids_sha256,
        "stopping": stopping_sha256,
        "options": {name: result[name] for name in sorted(result) if name not in _FREE},
    }
