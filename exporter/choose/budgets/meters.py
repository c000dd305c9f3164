"""What measures damage: on the text that is searched on, and on what is held out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from exporter.choose.budgets.settings import PlanSettings
from exporter.choose.selection import RememberingMeter
from exporter.models.ablation import DamageMeter

if TYPE_CHECKING:
    from exporter.models.loading.model_source import LoadedModel
    from exporter.score import CalibrationText

POSITIONS = 2
"""Answers are compared at every second position."""


def meter_of(loaded: LoadedModel, text: CalibrationText, settings: PlanSettings) -> DamageMeter:
    """Measures on all of a text."""
    return DamageMeter(
        loaded.model,
        text.input_ids,
        text.mask,
        batch_size=settings.batch_size,
        positions=POSITIONS,
    )


def searched_meter(
    loaded: LoadedModel, text: CalibrationText, settings: PlanSettings, journal: Path
) -> RememberingMeter:
    """Measures on the first tokens of a text, and nothing twice.

    Args:
        loaded: The model.
        text: What may be searched on.
        settings: How many tokens of it are taken.
        journal: Keeps what was measured of branches that are left out.
    """
    from exporter.files import sha256_bytes

    searched = text.first_tokens(settings.search.tokens)
    about = {
        "model": loaded.ref.sha256,
        "dtype": str(loaded.model.dtype),
        "ids": sha256_bytes(searched.input_ids.astype("<i8").tobytes()),
        "positions": POSITIONS,
    }
    return RememberingMeter(meter_of(loaded, searched, settings), journal, about)
