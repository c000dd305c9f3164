"""Heals cuts one after the other and holds each against limits on quality, on held-out text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

from scipy import stats

from exporter.artifacts import CalibrationRef, HealingReport, PruningPlan, TriedCut
from exporter.artifacts.healing import AnswerDamage, Healing
from exporter.artifacts.plans.loaded import LoadedPlan
from exporter.artifacts.replacement_file import ChangedWeight
from exporter.artifacts.store import Store
from exporter.choose.budgets.budget import Floors
from exporter.choose.budgets.ladder import Rung
from exporter.cut.branch_replacements import branch_replacements_of
from exporter.errors import HealingError
from exporter.heal.automatic import USUAL_TIME_S, settled, without_training
from exporter.heal.healed import Healed, heal
from exporter.heal.options import HealOptions
from exporter.heal.plan_file import FOLDER_PLAN, FOLDER_REPORT
from exporter.heal.texts import HealingTexts, healing_texts, on_text_of
from exporter.models.ablation.branch_replacements import BranchReplacements
from exporter.models.loading.model_source import LoadedModel
from exporter.models.texts.mixtures import specs_of
from exporter.models.texts.self_text import SELF
from exporter.models.texts.sources import PYDOC
from exporter.progress import QUIET, Progress
from graph_passes.files.placing import remove_tree
from graph_passes.replacements import array_of

JUDGED = 16
"""Samples of each text that judge, beside those that a healing holds out anyway."""
HIGH, LOW = "log_perplexity_increase_high", "cosine_low"
_GAINED_NOTHING = ("folding-gained-nothing", "distillation-gained-nothing")
_USUAL_TEXTS = ((SELF,), (PYDOC,))


@dataclass(frozen=True)
class HealedCut:
    """A cut that was healed.

    Attributes:
        tried: What it is and what it costs.
        plan: The healed plan; its file of numbers is beside it.
        report: How it was healed.
    """

    tried: TriedCut
    plan: LoadedPlan
    report: HealingReport

    def weights(self) -> Mapping[str, ChangedWeight]:
        """The changed weights, as PyTorch's tensors."""
        return {
            name: ChangedWeight(tuple(map(_tensor, change.numbers)))  # type: ignore[arg-type]
            for name, change in self.plan.changed_weights.items()
        }

    def branch_replacements(self, loaded: LoadedModel) -> BranchReplacements:
        """What takes the branches' places."""
        plan = self.plan
        return branch_replacements_of(plan.plan.deletions, plan.replacements, loaded.model)


def trial_options(
    options: HealOptions, ref: CalibrationRef, calibration: Sequence[str]
) -> HealOptions:
    """How cuts are healed: on the text that was named, else on the usual mixture.

    What the model samples for it is sampled anew, not what the scores rest on.

    Args:
        options: What was asked for.
        ref: The text of the scores.
        calibration: The text of the search, where one was named.
    """
    if calibration or specs_of(ref) not in _USUAL_TEXTS:
        return on_text_of(options, ref, calibration)
    return replace(options, seed=options.seed + 1)


class TrialRuns:
    """The healing of several cuts of one model, in one time, on one text.

    Args:
        loaded: The model.
        options: How to heal; its time is that of all trainings together.
        floors: The limits on quality.
        work: Keeps each healed cut for a later call.
        skipped: Samples at the beginning of each text that have chosen the cuts.
        progress: Told what goes on.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        options: HealOptions,
        floors: Floors,
        work: Path,
        skipped: int = 0,
        progress: Progress = QUIET,
    ) -> None:
        self._loaded, self._options, self._floors = loaded, options, floors
        self._work, self._skipped, self._progress = work, skipped, progress
        self._seconds = 0.0
        self.cuts: list[HealedCut] = []

    @cached_property
    def first(self) -> HealOptions:
        """How the first cut is healed: by a training of half of the time, where that is enough."""
        return settled(replace(self._options, time_s=self._time_s()), self._loaded, self._progress)

    @cached_property
    def texts(self) -> HealingTexts:
        """What is fitted on, stopped by and judged on: the same for all cuts."""
        asked = self.first
        if asked.samples is not None:
            asked = replace(asked, samples=max(asked.samples, self._skipped))
        return healing_texts(self._loaded, asked, self._progress, judged=JUDGED)

    def run(self, number: int, plan: PruningPlan) -> Rung:
        """Heals a cut and measures it, or takes what an earlier call has left.

        Args:
            number: Its place among the cuts.
            plan: What is dropped.

        Returns:
            What it costs, relative to the limits.

        Raises:
            DepthcutError: It can't be healed.
        """
        cut = self._found(plan) or self._healed(plan)
        self.cuts.append(cut)
        self._seconds += cut.tried.training_seconds
        return rung_of(number, cut.tried.healed, self._floors)

    def noted(self, cut: HealedCut, figures: Mapping[str, float]) -> PruningPlan:
        """The plan of a cut, with what was tried and on what it was held against the limits.

        Args:
            cut: One of those that were healed.
            figures: What else the plan says of itself.
        """
        plan = cut.plan.plan
        return plan.model_copy(
            update={
                "predicted": {**plan.predicted, **figures},
                "predicted_on": "checked",
                "stopped_on": [*plan.stopped_on, *self.texts.halves[1].parts],
                "tried": [each.tried for each in self.cuts],
            }
        )

    def _time_s(self) -> float | None:
        """For the next training: half of the time, then what is left."""
        whole = self._options.time_s or USUAL_TIME_S
        if not self._options.trains:
            return None
        return max(1.0, whole - self._seconds) if self.cuts else whole / 2

    def _healed(self, plan: PruningPlan) -> HealedCut:
        """Heals and keeps a cut."""
        options = replace(self._options, time_s=self._time_s())
        if self.first.trains:
            options = replace(options, tokens=self.first.tokens)
        try:
            healed = self._heal(plan, options)
        except HealingError as error:
            if error.code not in _GAINED_NOTHING:
                raise
            self._progress.say(f"heal: {error.message} Replacements are fitted to this cut.")
            healed = self._heal(plan, replace(without_training(options), kind="best"))
        folder = self._folder(plan)
        folder.mkdir(parents=True, exist_ok=True)
        healed.write(folder)
        files = [path for path in folder.iterdir() if path.is_file()]
        self._store.keep(self._name(plan), folder.name, files=files)
        remove_tree(self._work / "healing")
        return self._read(folder)

    def _heal(self, plan: PruningPlan, options: HealOptions) -> Healed:
        return heal(
            self._loaded,
            plan,
            options,
            made_from=plan.made_from,
            work=self._work / "healing",
            texts=self.texts,
            progress=self._progress,
        )

    def _found(self, plan: PruningPlan) -> HealedCut | None:
        folder = self._folder(plan)
        if self._store.find(self._name(plan)) != folder.name:
            return None
        self._progress.say(f"heal: {plan.describe()}: as an earlier call left it")
        return self._read(folder)

    def _read(self, folder: Path) -> HealedCut:
        loaded = LoadedPlan.read(folder / FOLDER_PLAN)
        report = HealingReport.read(folder / FOLDER_REPORT)
        bare, healed = figures_of(report.healing)
        training = report.healing.training
        tried = TriedCut(
            deletions=loaded.plan.deletions,
            healed_by=report.healing.asked,
            training_seconds=0.0 if training is None else training.seconds,
            bare=bare,
            healed=healed,
            holds=rung_of(0, healed, self._floors).holds,
        )
        return HealedCut(tried, loaded, report)

    @cached_property
    def _store(self) -> Store:
        made_from = {
            **self._loaded.identity(),
            "options": asdict(self._options),
            "fitting": self.texts.fitting.ids_sha256,
            "held_out": self.texts.held_out.ids_sha256,
        }
        return Store(self._work / "trials.jsonl", made_from)

    def _folder(self, plan: PruningPlan) -> Path:
        return self._work / f"trial-{len(self.cuts)}"

    def _name(self, plan: PruningPlan) -> str:
        return plan.describe()


def rung_of(number: int, healed: Mapping[str, float], floors: Floors) -> Rung:
    """A healed cut by the share of the limits that it uses up.

    Args:
        number: Its place among the cuts.
        healed: Its figures, as :func:`figures_of` gives them.
        floors: The limits.
    """
    ends = {"log_perplexity_increase": HIGH, "cosine": LOW}
    worst = dict(healed) | {name: healed[end] for name, end in ends.items() if end in healed}
    return Rung(number, floors.used_up(healed), floors.used_up(worst))


def figures_of(healing: Healing) -> tuple[dict[str, float], dict[str, float]]:
    """What a cut costs on held-out text of the domains that were fitted on, bare and healed.

    Of the healed one also the end of the 95 % interval that is further from the whole model:
    ``log_perplexity_increase_high`` or ``cosine_low``.
    """
    for text in healing.texts:
        if text.role == "calibration":
            rise, error = (
                text.healed.log_perplexity_increase,
                text.healed.log_perplexity_increase_std_error,
            )
            high = rise + _reach(error, text.text.samples)
            return _figures(text.dropped), _figures(text.healed) | {HIGH: high}
    for embedded in healing.embeddings:
        if embedded.role == "calibration":
            low = embedded.healed - _reach(embedded.healed_std_error, embedded.text.samples)
            return {"cosine": embedded.dropped}, {"cosine": embedded.healed, LOW: low}
    raise HealingError(
        "There is no held-out text to measure a healed cut on.", "Give a longer --calibration."
    )


def _reach(error: float | None, samples: int) -> float:
    """Half of the 95 % interval of a mean over samples, by Student's t."""
    if error is None or not math.isfinite(error):
        return 0.0
    return error * float(stats.t.ppf(0.975, samples - 1))


def _figures(damage: AnswerDamage) -> dict[str, float]:
    names = ("kl", "log_perplexity_increase", "top1_agreement")
    return {name: float(getattr(damage, name)) for name in names}


def _tensor(numbers: object) -> object:
    import numpy as np
    import torch

    return torch.from_numpy(np.asarray(array_of(numbers), np.float32))  # type: ignore[arg-type]
