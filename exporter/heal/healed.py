"""From a plan to a healed one: fits, choices, and what they gained in two domains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from exporter.artifacts import (
    CalibrationRef,
    FiguresFrom,
    HealedBranch,
    HealedText,
    Healing,
    HealingReport,
    PruningPlan,
)
from exporter.artifacts.plans.by_score import validate_plan
from exporter.artifacts.plans.origin import hold_against_model
from exporter.errors import HealingError
from exporter.heal.domains import measured_text, warnings_of
from exporter.heal.fit import fit_branches
from exporter.heal.fits import Fit, FitStore
from exporter.heal.options import HealOptions
from exporter.heal.plan_file import healed_deletions, kind_of
from exporter.heal.sequential import fit_sequential
from exporter.heal.texts import HealingTexts, healing_texts
from exporter.models.ablation.branch_replacements import NOTHING, BranchReplacement
from exporter.models.ablation.meter import DamageMeter
from exporter.models.anatomy.architectures import named_sublayers
from exporter.models.loading.model_source import LoadedModel
from exporter.models.texts.calibration import CalibrationText
from exporter.progress import QUIET, Progress
from graph_passes.types import SublayerRef


@dataclass(frozen=True)
class Healed:
    """A healed plan, not yet written.

    Attributes:
        plan: The plan, each deletion with what takes its place; it names no file yet.
        branch_replacements: What that is, by layer and kind.
        report: What was done, and what it cost and gained.
    """

    plan: PruningPlan
    branch_replacements: dict[SublayerRef, BranchReplacement]
    report: HealingReport


def heal(
    loaded: LoadedModel,
    plan: PruningPlan,
    options: HealOptions | None = None,
    *,
    made_from: Mapping[str, str] | None = None,
    allow_all: bool = False,
    work: Path | None = None,
    progress: Progress = QUIET,
) -> Healed:
    """Fits what takes the place of everything that a plan drops, and measures what that gains.

    Nothing is trained: each replacement is the mean of the branch's output, or the ridge map from
    what it reads to it. What an earlier healing put into the plan is replaced.

    Args:
        loaded: The model.
        plan: What is dropped.
        options: How, and on which texts.
        made_from: Role to SHA-256 of further files, for the report and the plan.
        allow_all: Takes a plan that drops every attention and every MLP.
        work: A folder that keeps each fit once it is finished, so that an interrupted call goes on
            from there.
        progress: Told what goes on.

    Raises:
        PlanError: The plan is not for this model.
        CalibrationError: A text is too short.
        TextSourceError: A text can't be read.
        HealingError: Activations are not finite, or too few.
        UnknownArchitectureError: When it is not known where the model keeps its sublayers.
    """
    options = options or HealOptions()
    ref = loaded.ref
    validate_plan(plan, ref.num_layers, model=ref.source, allow_all=allow_all)
    hold_against_model(plan, ref.sha256, model=ref.source, refits=True, progress=progress)
    names = named_sublayers(plan.deletions, ref.num_layers)
    _refuse_rank(options.rank, loaded)
    texts = healing_texts(loaded, options, progress)
    fitting = _Fitting(loaded, texts, names, options, work, progress)
    if options.kind == "best":
        chooser, held_out = texts.halves
        fits, found = fitting.best(chooser)
    else:
        held_out = texts.held_out
        fits, found = fitting.alike()
    warnings = _choice_warnings(options, texts)
    healing = measured_healing(
        loaded, found, (held_out, texts.other), options, texts.sources, fits, warnings, progress
    )
    parents = {**(made_from or {}), "model": ref.sha256}
    parents |= {f"calibration_{i}": text.sha256 for i, text in enumerate(texts.sources)}
    report = HealingReport(model=ref, healing=healing, made_from=parents)
    figures_from: FiguresFrom = "checked" if _short(options, texts) else "unseen"
    return Healed(_healed_plan(plan, found, healing, figures_from, parents), found, report)


def _short(options: HealOptions, texts: HealingTexts) -> list[str]:
    """The texts of which one sample serves to choose kinds and to judge them."""
    short = [text.ref.source for text in texts.held if len(text.input_ids) < 2]
    return short if options.kind == "best" else []


def _choice_warnings(options: HealOptions, texts: HealingTexts) -> list[str]:
    short = _short(options, texts)
    if not short:
        return []
    return [
        f"Of {', '.join(short)} one sample was held out, on which kinds are chosen and judged too: "
        "the gain looks better than it is. Give more text."
    ]


def _refuse_rank(rank: int | None, loaded: LoadedModel) -> None:
    """Before minutes of work go into what it is of."""
    width = loaded.model.config.get_text_config().hidden_size
    if rank is not None and not 1 <= rank <= width:
        raise HealingError(
            f"There is no map of rank {rank} here.",
            f"Ask for a rank from 1 to {width}.",
            code="rank-out-of-range",
        )


def _healed_plan(
    plan: PruningPlan,
    found: Mapping[SublayerRef, BranchReplacement],
    healing: Healing,
    figures_from: FiguresFrom,
    parents: Mapping[str, str],
) -> PruningPlan:
    return PruningPlan(
        deletions=healed_deletions(plan.deletions, found),
        budget=plan.budget,
        importance_sha256=plan.importance_sha256,
        chosen_on=plan.chosen_on,
        predicted=_predicted(healing.texts),
        predicted_on=figures_from if healing.texts else None,
        made_from={**plan.made_from, **parents},
    )


def measured_healing(
    loaded: LoadedModel,
    found: Mapping[SublayerRef, BranchReplacement],
    texts: tuple[CalibrationText, CalibrationText | None],
    options: HealOptions,
    sources: Sequence[CalibrationRef],
    fits: Mapping[SublayerRef, Fit] | None = None,
    warnings: Sequence[str] = (),
    progress: Progress = QUIET,
) -> Healing:
    """Measures what replacements gain in both domains, and warns where the two disagree.

    Args:
        loaded: The model.
        found: What takes each branch's place.
        texts: Samples of the calibration's domain that nothing was fitted on, and of another
            domain; None where there is none.
        options: How they were fitted.
        sources: What was fitted on.
        fits: What is known of the single fits.
        warnings: What else a reader must know.
        progress: Told of every run.

    Raises:
        ScoringError: Logits are not finite.
    """
    measured = _measured(loaded, texts, found, options.batch_size, progress)
    warnings = [*warnings, *warnings_of(measured)]
    for warning in warnings:
        progress.say(f"heal: warning: {warning}")
    branches = [_branch(name, found[name], (fits or {}).get(name)) for name in sorted(found)]
    return Healing(
        asked=options.kind,
        rank=options.rank,
        sequential=options.sequential,
        calibration=list(sources),
        branches=branches,
        parameters=sum(branch.parameters for branch in branches),
        texts=measured,
        warnings=warnings,
    )


@dataclass(frozen=True)
class _Fitting:
    """What is fitted, on which texts, and how.

    Attributes:
        loaded: The model.
        texts: What is fitted on, and what is held out.
        names: The sublayers whose places are taken.
        options: How.
        work: Keeps each fit once it is finished; None keeps nothing.
        progress: Told what goes on.
    """

    loaded: LoadedModel
    texts: HealingTexts
    names: list[SublayerRef]
    options: HealOptions
    work: Path | None
    progress: Progress

    def best(
        self, chooser: CalibrationText
    ) -> tuple[dict[SublayerRef, Fit], dict[SublayerRef, BranchReplacement]]:
        """The kind that does best in each place, as a text tells that nothing was fitted on."""
        fits, model = self._alone(), self.loaded.model
        if predicts_tokens(model):
            size = self.options.batch_size
            meter = DamageMeter(model, chooser.input_ids, chooser.mask, batch_size=size)
            found = _by_damage(meter, fits, self.progress)
        else:
            found = _by_explained(fits)
        if self.options.sequential:
            return {}, self._in_turn({name: kind_of(what) for name, what in found.items()})
        return fits, found

    def alike(self) -> tuple[dict[SublayerRef, Fit], dict[SublayerRef, BranchReplacement]]:
        """The same kind everywhere."""
        kind = self.options.kind
        if self.options.sequential:
            return {}, self._in_turn(dict.fromkeys(self.names, kind))
        fits = self._alone()
        return fits, {
            name: fit.bias if kind == "bias" else fit.linear for name, fit in fits.items()
        }

    def _alone(self) -> dict[SublayerRef, Fit]:
        """Each fitted on the whole model."""
        return fit_branches(
            self.loaded,
            self.texts.fitting,
            self.names,
            rank=self.options.rank,
            ridge=self.options.ridge,
            batch_size=self.options.batch_size,
            store=self._store("alone"),
            progress=self.progress,
        )

    def _in_turn(self, choices: Mapping[SublayerRef, Any]) -> dict[SublayerRef, BranchReplacement]:
        """Each fitted with those before it in their places."""
        told = [[*name, choices[name]] for name in sorted(choices)]
        return fit_sequential(
            self.loaded,
            self.texts.fitting,
            choices,
            rank=self.options.rank,
            ridge=self.options.ridge,
            batch_size=self.options.batch_size,
            store=self._store("in-turn", choices=told),
            progress=self.progress,
        )

    def _store(self, name: str, **more: Any) -> FitStore | None:
        """Keeps fits by what they depend on, the tokens themselves among it."""
        if self.work is None:
            return None
        how = {"rank": self.options.rank, "ridge": self.options.ridge, **more}
        return FitStore(self.work / f"{name}.jsonl", self.loaded, self.texts.fitting, **how)


def _measured(
    loaded: LoadedModel,
    texts: tuple[CalibrationText, CalibrationText | None],
    found: Mapping[SublayerRef, BranchReplacement],
    batch_size: int,
    progress: Progress,
) -> list[HealedText]:
    """The damage in both domains; none for a model that predicts no next token."""
    if not predicts_tokens(loaded.model):
        progress.say("heal: this model predicts no next token, so the gain is not measured here")
        return []
    dropped = dict.fromkeys(found, NOTHING)
    roles: tuple[Literal["calibration", "other"], ...] = ("calibration", "other")
    return [
        measured_text(
            loaded.model, role, text, dropped, found, batch_size=batch_size, progress=progress
        )
        for role, text in zip(roles, texts, strict=True)
        if text is not None
    ]


def predicts_tokens(model: Any) -> bool:
    """Whether its answers can be compared: they are distributions of next tokens."""
    return bool(model.can_generate()) and model.get_output_embeddings() is not None


def _predicted(texts: list[HealedText]) -> dict[str, float]:
    """What the plan says of itself: the healed model in the calibration's domain."""
    own = next((text for text in texts if text.role == "calibration"), None)
    if own is None:
        return {}
    return {
        "kl": own.healed.kl,
        "log_perplexity_increase": own.healed.log_perplexity_increase,
        "top1_agreement": own.healed.top1_agreement,
    }


def _branch(
    name: SublayerRef, branch_replacement: BranchReplacement, fit: Fit | None
) -> HealedBranch:
    tensors = [
        *branch_replacement.maps,
        *([] if branch_replacement.bias is None else [branch_replacement.bias]),
    ]
    return HealedBranch(
        layer=name[0],
        kind=name[1],
        replacement=kind_of(branch_replacement),
        parameters=sum(tensor.numel() for tensor in tensors),
        ridge=None if fit is None else fit.ridge,
        bias_explained=None if fit is None else fit.bias_explained,
        linear_explained=None if fit is None else fit.linear_explained,
    )


def _by_explained(fits: Mapping[SublayerRef, Fit]) -> dict[SublayerRef, BranchReplacement]:
    """What explains most of each branch's output over held-out tokens; nothing where neither does.

    For models whose answers can't be compared, and as a first guess.
    """
    found = {}
    for name, fit in fits.items():
        options = [
            (0.0, NOTHING),
            (fit.bias_explained, fit.bias),
            (fit.linear_explained, fit.linear),
        ]
        found[name] = max(options, key=lambda option: option[0])[1]
    return found


def _by_damage(
    meter: DamageMeter, fits: Mapping[SublayerRef, Fit], progress: Progress = QUIET
) -> dict[SublayerRef, BranchReplacement]:
    """What leaves the least KL divergence, branch after branch, the others as they stand.

    Begins with what :func:`_by_explained` takes, and goes through the branches once, from the last
    layer down, so that each run begins as high as it can.

    Args:
        meter: Of the model, on samples that nothing was fitted on.
        fits: What may take each branch's place.
        progress: Told of every run.
    """
    current = _by_explained(fits)
    with progress.task("choose replacements", total=len(fits)) as task:
        for name in sorted(fits, reverse=True):
            taken = current[name]
            options = [NOTHING, fits[name].bias, fits[name].linear]
            others = [one for one in options if one is not taken]
            cuts = [{**current, name: one} for one in others]
            damages = meter.measure_many(current, cuts)
            found = zip([taken, *others], damages, strict=True)
            # Of two that are equal the simpler one.
            best = min(found, key=lambda pair: (pair[1].kl, options.index(pair[0])))
            current[name] = best[0]
            task.advance()
    return current
