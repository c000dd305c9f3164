"""Which text chose, fitted, stopped and judged, and what to say where two of them are the same."""

from __future__ import annotations

from exporter.artifacts import CalibrationRef, FiguresFrom
from exporter.heal.options import HealOptions
from exporter.heal.texts import HealingTexts
from exporter.models.texts.calibration import CalibrationText


def figures_from(options: HealOptions, texts: HealingTexts) -> FiguresFrom:
    """What the text that judges had decided before."""
    if texts.chose:
        return "searched"
    return "checked" if _short(options, texts) else "unseen"


def judged_on(own: CalibrationText, other: CalibrationText | None) -> list[CalibrationRef]:
    """The samples that judge, of both domains."""
    return [*own.parts, *([] if other is None else other.parts)]


def _short(options: HealOptions, texts: HealingTexts) -> list[str]:
    """The texts of which one sample serves to choose kinds and to judge them."""
    short = [text.ref.source for text in texts.held if len(text.input_ids) < 2]
    return short if options.kind in ("best", "fold", "distill") else []


def choice_warnings(options: HealOptions, texts: HealingTexts) -> list[str]:
    """What a reader must know where one text serves for two parts."""
    found, much = [], texts.fitting.read.much
    if short := _short(options, texts):
        found.append(
            f"Of {', '.join(short)} only one sample was held out, so healing is chosen and "
            f"measured on the same one: the gain looks better than it is. Give more {much}."
        )
    if chose := texts.chose:
        found.append(
            f"Some held-out samples of {', '.join(chose)} also decided what to drop, so the healed "
            f"model looks better than it is. Give more {much}, or heal on other {much}."
        )
    if again := [source for source in texts.again if source not in chose]:
        found.append(
            f"{', '.join(again)}: too short for four parts, so healing is fitted on samples that "
            "also decided what to drop. Those that judge it are others."
        )
    return found
