"""How much may be dropped: what a cut gains in speed, what it costs in two domains, and healed.

Healing is by folded weights, which take seconds (:mod:`exporter.heal.fold`); a training takes
minutes for each cut, and comes after the choice. Speed is foretold from a few variants that are
timed, as :mod:`exporter.choose.costs` does; see :mod:`exporter.choose.studies.speeds`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from pydantic import TypeAdapter

from exporter.artifacts import (
    DepthCell,
    DepthDamage,
    DepthsReport,
    DropAnswer,
    Record,
)
from exporter.artifacts.store import Store
from exporter.choose.budgets.budget import Floors
from exporter.choose.budgets.ladder import is_hopeless, rung_of
from exporter.choose.selection.meters import RememberingMeter
from exporter.choose.studies.damages import depth_damage, limit_figures
from exporter.choose.studies.question import Judged, Place, Question
from exporter.choose.studies.speeds import measured_speeds, speedups
from exporter.errors import CalibrationError, HealingError
from exporter.heal.fitting import Fitting
from exporter.heal.fold.folded import folded_values
from exporter.heal.options import HealOptions
from exporter.heal.texts import HealingTexts
from exporter.models.ablation.branch_replacements import BranchReplacements
from exporter.models.ablation.meter import DamageMeter
from exporter.models.changed_weights import OwnValue, swapped
from exporter.models.texts.calibration import CalibrationText, calibration_text
from exporter.models.texts.mixtures import text_of_report
from exporter.models.texts.self_text import SAMPLED, SELF
from exporter.models.texts.sources import refuse_same_text

_FITTED_TOKENS = 2048
_SAMPLED_LENGTH, _SAMPLED_TOKENS = 128, 1024
_SEED = 1  # scores rest on what the model samples with another one
_TOO_FAR = "cuts that lose so much that no healing is expected to bring them within the limit."
_LEAST_SPEEDUP = 1.01
"""A cut that gains less isn't worth its loss."""


class _HealedCell(Record):
    """What healing gave in both domains, or why it gave nothing."""

    healed: DepthDamage | None = None
    other_healed: DepthDamage | None = None
    not_healed: str = ""


_HEALED = TypeAdapter(_HealedCell)


def answered(
    asked: Question, report: DepthsReport, cuts: Mapping[Place, BranchReplacements]
) -> DepthsReport:
    """Adds to a report what its cells gain and cost further, and which one is recommended.

    Args:
        asked: What is asked.
        report: The cells with their damage on the held-out text.
        cuts: The cells that can be measured.

    Raises:
        CalibrationError: The other text is too short, or is the held-out one or the scores'.
        TextSourceError: It can't be read.
        ScoringError: Logits are not finite.
    """
    text = _other_domain(asked, report)
    fitted = text_of_report(asked.loaded, report.calibration, progress=asked.progress)
    fitted = fitted.first_tokens(_FITTED_TOKENS)
    other, others = _in_other_domain(asked, text, cuts)
    hopeless = _hopeless(asked, report)
    promising = {place: cut for place, cut in cuts.items() if place not in hopeless}
    healed = dict.fromkeys(hopeless, _HealedCell(not_healed=_TOO_FAR))
    healed |= _healed(asked, other, fitted, promising)
    names = {name for cut in cuts.values() for name in cut}
    speeds = measured_speeds(asked, other, names)
    table = speeds.table
    cells = [
        cell.model_copy(
            update={
                "other": others[place],
                **dict(healed[place]),
                "speedups": {} if table is None else speedups(table, cuts[place]),
            }
        )
        if (place := (cell.way, cell.number)) in cuts
        else cell
        for cell in report.cells
    ]
    best = recommended(cells, asked.most_increase)
    reported = None if best is None else _reported(asked, best, cuts, fitted)
    answer = DropAnswer(
        other_text=text.ref,
        other_baseline_perplexity=other.whole.baseline_perplexity,
        fitted_on=fitted.ref,
        most_increase=asked.most_increase,
        request="" if table is None else str(table.at),
        backend="" if table is None else table.backend,
        threads=None if table is None else table.environment.threads,
        int8=speeds.int8,
        no_int8=speeds.no_int8,
        way=None if best is None else best.way,
        number=None if best is None else best.number,
        looks=asked.looks,
        reported_text=None if reported is None or asked.reported is None else asked.reported.ref,
        reported=reported,
    )
    return report.model_copy(update={"cells": cells, "answer": answer})


def _hopeless(asked: Question, report: DepthsReport) -> list[Place]:
    """The cuts that lose too much for any healing."""
    limit = Floors(asked.most_increase)
    return [
        (cell.way, cell.number)
        for cell in report.cells
        if asked.own_numbers and cell.damage is not None
        if is_hopeless(limit_figures(cell.damage), limit)
    ]


def recommended(cells: Sequence[DepthCell], most_increase: float) -> DepthCell | None:
    """The fastest cell that keeps the limit on held-out text, healed or not.

    By the rule of a budget's limits: all of the interval is within, which is as much wider as the
    number of cells takes. Where no speed was measured, the one that removes most parameters.
    """
    limit = Floors(most_increase)
    fitting = [cell for cell in cells if _holds(cell, limit) and _gain(cell) > _LEAST_SPEEDUP]
    return max(fitting, key=lambda cell: (_gain(cell), -least_ratio(cell)), default=None)


def _holds(cell: DepthCell, limit: Floors) -> bool:
    damages = [each for each in (cell.damage, cell.healed) if each is not None]
    return any(rung_of(0, limit_figures(each), limit).holds for each in damages)


def _reported(
    asked: Question,
    best: DepthCell,
    cuts: Mapping[Place, BranchReplacements],
    fitted: CalibrationText,
) -> DepthDamage | None:
    """What the recommended cut costs on text that chose nothing, healed where that was better."""
    if (text := asked.reported) is None:
        return None
    asked.progress.say("depths: the recommended cut, on text that has chosen nothing")
    cut = cuts[best.way, best.number]
    meter = DamageMeter(asked.loaded.model, text.input_ids, text.mask, batch_size=asked.batch_size)
    bare, healed = best.damage, best.healed
    if healed is None or (bare is not None and bare.perplexity_ratio <= healed.perplexity_ratio):
        return depth_damage(meter.measure(cut, asked.progress), text)
    return _Healer(asked, {meter: text}, fitted).damages(cut)[0]


def least_ratio(cell: DepthCell) -> float:
    """The cut model's perplexity over the whole one's, healed where that helps; else ``inf``."""
    found = [each.perplexity_ratio for each in (cell.damage, cell.healed) if each is not None]
    return min(found, default=math.inf)


def _gain(cell: DepthCell) -> float:
    if cell.speedups:
        return cell.speedups["request"]
    return 1 / (1 - (cell.parameters_removed or 0.0))


def _other_domain(asked: Question, report: DepthsReport) -> CalibrationText:
    spec = asked.other_text or SELF
    length = int(asked.judged.text.input_ids.shape[1])
    length = min(length, _SAMPLED_LENGTH) if spec in SAMPLED else length
    tokens = asked.judged.text.input_ids.size
    tokens = min(tokens, _SAMPLED_TOKENS) if spec in SAMPLED else tokens
    found = calibration_text(
        asked.loaded,
        spec,
        samples=math.ceil(tokens / length),
        sequence_length=length,
        seed=_SEED,
        part="evaluation",
        progress=asked.progress,
    )
    used = [asked.judged.text.ref, *report.calibration.texts]
    what = "the held-out text, or that of the scores, and no other domain"
    refuse_same_text(found.ref, used, what, "Give --other-text another text.", CalibrationError)
    return found


def _in_other_domain(
    asked: Question, text: CalibrationText, cuts: Mapping[Place, BranchReplacements]
) -> tuple[Judged, dict[Place, DepthDamage]]:
    """The text with what the whole model makes of it, and the damage of all cuts."""
    meter = DamageMeter(asked.loaded.model, text.input_ids, text.mask, batch_size=asked.batch_size)
    kept = RememberingMeter(meter, asked.place("other-damages.jsonl"), asked.about(text))
    asked.progress.say(f"depths: in another domain, {text.ref.source}")
    whole, *found = kept.measure_many({}, list(cuts.values()), asked.progress)
    damages = dict(zip(cuts, (depth_damage(each, text) for each in found), strict=True))
    return Judged(text, meter, whole), damages


def _healed(
    asked: Question,
    other: Judged,
    fitted: CalibrationText,
    cuts: Mapping[Place, BranchReplacements],
) -> dict[Place, _HealedCell]:
    """What folded weights leave of each cut's damage in both domains."""
    about = asked.about(asked.judged.text, other.text, fitted)
    store = Store(asked.place("healed.jsonl"), about)
    texts = {each.meter: each.text for each in (asked.judged, other)}
    healer = _Healer(asked, texts, fitted)
    found = {}
    for (way, number), cut in cuts.items():
        asked.progress.say(f"depths: {way} at {number}, healed by folded weights")
        name = f"{way} {number}: {', '.join(f'{kind} {layer}' for layer, kind in sorted(cut))}"
        try:
            found[way, number] = store.once(name, _HEALED, lambda cut=cut: healer.cell(cut))  # type: ignore[misc]
        except HealingError as error:  # memory is short now: the next call tries again
            found[way, number] = _HealedCell(not_healed=error.message)
    return found


class _Healer:
    """Folds for one cut after the other, and holds the healed models against the whole one.

    The whole model's answers are kept in between.
    """

    def __init__(
        self,
        asked: Question,
        texts: Mapping[DamageMeter, CalibrationText],
        fitted: CalibrationText,
    ) -> None:
        self._asked, self._fitted = asked, fitted
        self._values: list[OwnValue] = []
        self._texts = {each.inside(lambda: swapped(self._values)): texts[each] for each in texts}

    def cell(self, cut: BranchReplacements) -> _HealedCell:
        """What is left of a cut's damage, or why nothing could be healed.

        Raises:
            HealingError: Memory is short.
        """
        try:
            here, there = self.damages(cut)
        except HealingError as error:
            if error.code == "out-of-memory":
                raise
            return _HealedCell(not_healed=error.message)
        return _HealedCell(healed=here, other_healed=there)

    def damages(self, cut: BranchReplacements) -> list[DepthDamage]:
        """What is left of a cut's damage on each text.

        Raises:
            HealingError: No weight makes up for it, or memory is short.
        """
        asked = self._asked
        texts = HealingTexts(self._fitted, (self._fitted.ref,), (), None)
        options = HealOptions(kind="fold", batch_size=asked.batch_size)
        fitting = Fitting(asked.loaded, texts, sorted(cut), options, None, asked.progress)
        self._values = folded_values(fitting, self._fitted)
        if not self._values:
            raise HealingError("no weight that is kept could make up for it.")
        return [
            depth_damage(meter.measure(cut, asked.progress), text, asked.looks)
            for meter, text in self._texts.items()
        ]
