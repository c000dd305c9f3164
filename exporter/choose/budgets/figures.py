"""What a planner hands over: the plan, its figures, and what healing gains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from exporter.artifacts import HealingReport, JudgedText, PruningPlan, Speedup
from exporter.artifacts.loaded_plan import ChangedWeight
from exporter.artifacts.plan_figures import kind_of
from exporter.choose.budgets.inputs import PlanInputs
from exporter.choose.budgets.limits import damage_figures
from exporter.choose.budgets.options import PlanCandidate
from exporter.heal.healed import measured_healing
from exporter.heal.options import HealOptions
from exporter.heal.texts import other_domain
from exporter.models.ablation.branch_replacements import BranchReplacement
from exporter.models.ablation.damage import AnyDamage
from exporter.models.texts.calibration import CalibrationText
from exporter.report.sections.healing import healing_words
from graph_passes.types import SublayerRef

OTHER = "other_"
"""Stands before what a figure is in the other domain."""
_TEXTS = {"checked": "the text that decided", "searched": "the text of the search"}


@dataclass(frozen=True, eq=False)
class Outcome:
    """A plan that holds its budget."""

    plan: PruningPlan
    branch_replacements: Mapping[SublayerRef, BranchReplacement] = field(default_factory=dict)
    damage: AnyDamage | None = None  # None where none was measured
    speedup: Speedup | None = None  # None where none was timed
    healing: HealingReport | None = None  # what healing gained, in two domains; None without any
    weights: Mapping[str, ChangedWeight] = field(default_factory=dict)

    def words(self) -> str:
        """Its figures in a line; empty where nothing was measured."""
        figures = self.plan.predicted
        if self.damage is None:
            made = self.healing
            return "" if made is None else healing_words(made.healing, made.reads)
        text = self.damage.words
        if self.speedup is not None:
            low, high = self.speedup.ci95
            text = f"speedup {self.speedup.ratio:.3f} [{low:.3f}, {high:.3f}] measured; {text}"
        elif "speedup" in figures:
            text = (
                f"speedup {figures['speedup']:.3f} predicted from the costs, not measured; {text}"
            )
        for figure in kind_of(figures, OTHER).figures:
            if figure.elsewhere and (key := f"{OTHER}{figure.key}") in figures:
                text += figure.elsewhere.format(figure.written(figures[key]))
        for judged_text in self.plan.judged_apart:
            first = kind_of(judged_text.figures).limited[0]  # by what a limit is held first
            change = first.short.format(first.written(judged_text.figures[first.key]))
            text += f"; on {judged_text.text.source} {change}"
        if self.plan.predicted_on != "unseen":
            text += f" (on {_TEXTS[self.plan.predicted_on or 'searched']}: probably too optimistic)"
        if "parameters" in figures:
            left, whole = figures["parameters"], figures["parameters_before"]
            change = f"{whole / 1e6:,.2f} -> {left / 1e6:,.2f} million ({left / whole - 1:+.1%})"
            text += f"; parameters {change}"
        return text


def judged_apart(damage: AnyDamage, text: CalibrationText) -> list[JudgedText]:
    """Its figures on each text of a mixture; none for a single text."""
    if text.owners is None:
        return []
    owners, judged_texts = text.owners, []
    for number, one in enumerate(text.apart):
        if len(one.mask):
            figures = damage_figures(damage.of(owners == number), one.clusters)
            judged_texts.append(JudgedText(text=one.part, figures=figures))
    return judged_texts


def size_figures(
    inputs: PlanInputs, candidate: PlanCandidate, speedup: Speedup | None
) -> dict[str, float]:
    """A plan's sizes and times."""
    room, sizes, costs = inputs.budget.fits, inputs.sizes, inputs.costs
    context, batch = (room.context, room.batch) if room else (0, 1)
    choices = candidate.choices
    values = {
        "parameters": float(sizes.total_parameters(choices)),
        "parameters_before": float(sizes.parameters),
        "bytes": float(sizes.total_bytes(choices, context=context, batch=batch)),
        "speedup": None if costs is None else costs.speedup(choices),
    }
    if speedup is not None:
        low, high = speedup.ci95
        values |= {
            "measured_speedup": speedup.ratio,
            "measured_speedup_low": low,
            "measured_speedup_high": high,
        }
    return {name: float(value) for name, value in values.items() if value is not None}


def healing_of(
    inputs: PlanInputs, candidate: PlanCandidate, heal: HealOptions
) -> HealingReport | None:
    """Measures what replacements gain; None where nothing was put in any branch's place."""
    if not any(replacement.numbers for replacement in candidate.cut.values()):
        return None
    loaded, fitted, reported = inputs.loaded, inputs.fitted_text.ref, inputs.texts.reported
    options = replace(heal, sequence_length=fitted.sequence_length)
    samples = len(reported.input_ids)
    other = other_domain(loaded, fitted.texts, samples, options, inputs.progress)
    healing = measured_healing(
        loaded,
        candidate.cut,
        (reported, other),
        replace(heal, batch_size=inputs.settings.batch_size),
        fitted.texts,
        progress=inputs.progress,
    )
    parents = {"model": loaded.ref.sha256, "calibration": fitted.sha256}
    return HealingReport(model=loaded.ref, healing=healing, made_from=parents)


def elsewhere(report: HealingReport | None) -> dict[str, float]:
    """A healed plan's figures in the other domain, as the plan notes them; none without any."""
    measured = None if report is None else report.healing.of_role("other")
    if measured is None:
        return {}
    main = measured.kind.main_figures
    return {f"{OTHER}{figure.key}": measured.figures[figure.key].healed for figure in main}
