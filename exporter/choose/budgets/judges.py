"""How many texts, pairs or images judge whether a classifier's cut keeps a limit, and which."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.artifacts import FiguresFrom
from exporter.artifacts.base import Nouns, nouns_of
from exporter.choose.budgets.budget import Floors
from exporter.choose.budgets.settings import PlanSettings
from exporter.compare.intervals import MOST_JUDGED, fewest_to_show, highest_to_show
from exporter.errors import PlanError
from exporter.heal.texts import text_beyond
from exporter.models.loading.model_source import LoadedModel
from exporter.models.residual_stream import together_in
from exporter.models.tasks import task_of
from exporter.models.texts.calibration import CalibrationText
from exporter.printable import are, counted

HELD_OUT = 0.25
"""Of a text: checked or reported on, and not searched on."""
_FEWEST_IMAGES = 32


@dataclass(frozen=True)
class TextParts:
    """A text's samples by what they are for."""

    searched: CalibrationText
    checked: CalibrationText
    reported: CalibrationText

    @property
    def figures_from(self) -> FiguresFrom:
        """On what the figures rest."""
        if self.reported is self.searched:
            return "searched"
        return "checked" if self.reported is self.checked else "unseen"

    @property
    def held_out(self) -> int:
        """Samples that aren't searched on, and that checks can use."""
        return 0 if self.checked is self.searched else len(self.checked.input_ids)


def parted(text: CalibrationText, held_out: float = HELD_OUT, together: int = 1) -> TextParts:
    """The first documents to search on; of the last ones, in turn, to check and to report on.

    Of a single document it is its samples.
    """
    samples = len(text.input_ids)
    if samples < 2 * together:
        return TextParts(text, text, text)
    first, rest = text.apart_at(_held_out(samples, held_out), together)
    return TextParts(first, *rest.in_turn(together=together))


def checked_of(samples: int, held_out: float = HELD_OUT) -> int:
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


@dataclass(frozen=True)
class Judges:
    """The texts, pairs or images with a class that a limit is held on; none for other models."""

    fewest: int = 0
    usual: int = 0
    together: int = 1
    labels: int = 1

    @classmethod
    def of(cls, floors: Floors, model: Any) -> Judges:
        """Those of a model's limits."""
        floor = floors.top1_agreement
        labels = task_of(model).answers_a_text
        if floor is None or not labels:
            return cls()
        together = together_in(model)
        needed = together * fewest_to_show(floor)
        if needed > MOST_JUDGED * labels:
            highest = cls(together=together, labels=labels).highest(MOST_JUDGED)
            raise PlanError(
                f"--min-top1-agreement {floor:g} can't be shown: {math.ceil(needed / labels):,} "
                f"{nouns_of(type(model).__name__).several} would have to keep their answers, "
                f"{MOST_JUDGED:,} judge at most.",
                f"Give --min-top1-agreement {highest:.3f} or less.",
                code="too-few-to-show",
            )
        return cls(math.ceil(needed / labels), min(MOST_JUDGED, 2 * needed), together, labels)

    def highest(self, number: int) -> float:
        """The highest limit that so many show, to a thousandth; 0 where they show none."""
        answers = number * self.labels // self.together
        return math.floor(1000 * highest_to_show(answers)) / 1000 if answers > 0 else 0.0

    def refuse_fewer(
        self,
        number: int,
        source: str,
        read: Nouns,
        *,
        healing_text: bool = False,
    ) -> None:
        """Refuses a source of which fewer can judge."""
        left = max(0, number)
        if left >= self.fewest:
            return
        missing = counted(self.fewest - left, read.one, read.several)
        flag = "--heal-calibration" if healing_text else "--calibration"
        highest = self.highest(left)
        lower = f", or --min-top1-agreement {highest:.3f} or less" if highest > 0 else ""
        raise PlanError(
            f"Of {source} {counted(left, read.one, read.several)} {are(left)} left to judge a cut "
            f"by, beside those that choose it; the limit of --min-top1-agreement takes "
            f"{self.fewest:,}, if all of them keep their class.",
            f"Give {missing} more ({flag}), or fewer --samples{lower}.",
            code="too-few-to-show",
        )

    def parted(self, text: CalibrationText) -> tuple[CalibrationText, CalibrationText]:
        """What limits are checked on, and what is reported on: the same where it is short."""
        parts = text.in_turn(together=self.together)
        return parts if min(len(part.input_ids) for part in parts) >= self.fewest else (text, text)


def judging_text(
    judges: Judges,
    loaded: LoadedModel,
    used: Sequence[CalibrationText],
    cache_dir: Path | None = None,
) -> CalibrationText:
    """Samples to check limits on and to report on, of documents that aren't used otherwise."""
    calibration_text = text_beyond(loaded, used, 2 * judges.usual, cache_dir)
    read = nouns_of(type(loaded.model).__name__)
    judges.refuse_fewer(len(calibration_text.input_ids), used[0].ref.source, read)
    return calibration_text


def leaves_judges(
    judges: Judges,
    settings: PlanSettings,
    loaded: LoadedModel,
    used: tuple[CalibrationText, CalibrationText | None],
    cache_dir: Path | None = None,
) -> bool:
    """Whether as many as show the limit are left where replacements are fitted on further text."""
    chosen_on, further = used
    held_out = checked_of(len(chosen_on.input_ids))
    if further is None or not settings.weighs_replacements or judges.fewest <= held_out:
        return True
    parts = (chosen_on, further)
    calibration_text = text_beyond(loaded, parts, judges.fewest, cache_dir)
    return len(calibration_text.input_ids) >= judges.fewest
