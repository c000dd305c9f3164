"""Which text chose, fitted, stopped and judged, and what to say where two of them are the same."""

from __future__ import annotations

from exporter.artifacts import CalibrationRef, FiguresFrom, PruningPlan
from exporter.heal.options import HealOptions
from exporter.heal.texts import HealingTexts
from exporter.models.texts.calibration import CalibrationText


def figures_from(options: HealOptions, texts: HealingTexts, plan: PruningPlan) -> FiguresFrom:
    """What the text that judges had decided before."""
    if _chose(texts, plan):
        return "searched"
    return "checked" if _short(options, texts) else "unseen"


def judged_on(own: CalibrationText, other: CalibrationText | None) -> list[CalibrationRef]:
    """The samples that judge, of both domains."""
    return [*own.parts, *([] if other is None else other.parts)]


def _short(options: HealOptions, texts: HealingTexts) -> list[str]:
    """The texts of which one sample serves to choose kinds and to judge them."""
    short = [text.ref.source for text in texts.held if len(text.input_ids) < 2]
    return short if options.kind in ("best", "fold", "distill") else []


def _chose(texts: HealingTexts, plan: PruningPlan) -> list[str]:
    """The texts of which held-out samples are among those that the plan was chosen on.

    Both take a short text from its start; what is held out stands behind what is fitted on.
    """
    return [
        fitted.source
        for fitted in texts.again
        if any(
            chosen.sha256 == fitted.sha256 and chosen.tokens > fitted.tokens
            for chosen in plan.chosen_on
        )
    ]


def choice_warnings(options: HealOptions, texts: HealingTexts, plan: PruningPlan) -> list[str]:
    """What a reader must know where one text serves for two parts."""
    found, much = [], texts.fitting.read.much
    if short := _short(options, texts):
        found.append(
            f"Of {', '.join(short)} only one sample was held out, so healing is chosen and "
            f"measured on the same one: the gain looks better than it is. Give more {much}."
        )
    chose = _chose(texts, plan)
    if chose:
        found.append(
            f"Some held-out samples of {', '.join(chose)} also decided what to drop, so the healed "
            f"model looks better than it is. Give more {much}, or heal on other {much}."
        )
    if again := [ref.source for ref in texts.again if ref.source not in chose]:
        found.append(
            f"{', '.join(again)}: too short for four parts, so healing is fitted on samples that "
            "also decided what to drop. Those that judge it are others."
        )
    return found
