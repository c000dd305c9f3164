"""Parts a calibration text: what is searched on, checked on, and reported on."""

from __future__ import annotations

from dataclasses import dataclass

from exporter.artifacts import FiguresFrom
from exporter.errors import CalibrationError
from exporter.score import CalibrationText

_FEWEST_IMAGES = 32


@dataclass(frozen=True)
class TextParts:
    """A text's samples by what they are for.

    Attributes:
        searched: What is searched on.
        checked: What floors are held on, and refitted replacements.
        reported: What the finished plan's figures are measured on. Of a text of fewer than four
            samples it is the same as ``checked``, of a single one the same as both.
    """

    searched: CalibrationText
    checked: CalibrationText
    reported: CalibrationText

    @property
    def figures_from(self) -> FiguresFrom:
        """On what the figures rest."""
        if self.reported is self.searched:
            return "searched"
        return "checked" if self.reported is self.checked else "unseen"

    def refuse_short(self, what_for: str, samples: int = 1) -> None:
        """Refuses a text of which too little is held out."""
        found = 0 if self.checked is self.searched else len(self.checked.input_ids)
        if found < samples:
            raise CalibrationError(
                f"Of {self.searched.ref.source} {found} samples are held out for checks, too "
                f"few for {what_for}.",
                "Score on a longer text or with more --samples, or ask for a shorter "
                "--sequence-length when scoring.",
            )


def parted(text: CalibrationText, held_out: float) -> TextParts:
    """The first documents to search on; of the last ones, in turn, to check and to report on.

    Of a single document it is its samples.
    """
    samples = len(text.input_ids)
    if samples < 2:
        return TextParts(text, text, text)
    first, rest = text.apart_at(_held_out(samples, held_out))
    return TextParts(first, *rest.in_turn())


def checked_of(samples: int, held_out: float) -> int:
    """How many of a text's samples :func:`parted` checks on; of a single one that one."""
    return (_held_out(samples, held_out) + 1) // 2 if samples > 1 else samples


def _held_out(samples: int, held_out: float) -> int:
    """How many of two samples or more are not searched on."""
    return min(samples - 1, max(2 if samples >= 4 else 1, round(samples * held_out)))


def measured_on(text: CalibrationText, tokens: int) -> CalibrationText:
    """As much of a text as each candidate is measured on.

    Of images that are at least 32, if there are as many: each gets one class, however many
    positions it has.
    """
    if text.are_images:
        few = text.rows(slice(0, _FEWEST_IMAGES))
        tokens = max(tokens, few.ref.tokens)
    return text.first_tokens(tokens)
