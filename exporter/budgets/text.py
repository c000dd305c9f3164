"""Splits a calibration text: what is searched and fitted on, and what the result is judged on."""

from __future__ import annotations

from exporter.errors import CalibrationError
from exporter.importance import CalibrationText


def split(text: CalibrationText, held_out: float) -> tuple[CalibrationText, CalibrationText]:
    """The first samples and the last.

    Args:
        text: The samples.
        held_out: Share of them that is held out; at least one.

    Raises:
        CalibrationError: There is but one sample.
    """
    samples = len(text.input_ids)
    if samples < 2:
        raise CalibrationError(
            f"{text.ref.source} gives {samples} sample; one part of the text is searched on, and "
            "the result is judged on another.",
            "Give a longer text, or ask for a shorter --sequence-length when scoring.",
        )
    later = min(samples - 1, max(1, round(samples * held_out)))
    return text.rows(slice(0, samples - later)), text.rows(slice(samples - later, None))
