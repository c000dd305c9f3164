"""The text that the arms are judged on, which is never the one that the plan rests on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from exporter.artifacts import CalibrationRef
from exporter.compare.options import CompareOptions
from exporter.errors import ComparisonError

if TYPE_CHECKING:
    from exporter.models.texts import TextSource


def evaluation_text(options: CompareOptions, calibration: CalibrationRef | None) -> TextSource:
    """Reads the evaluation text.

    Raises:
        ComparisonError: When it is the text that importance was measured on.
        TextSourceError: When it can't be read.
    """
    from exporter.models.texts import read_texts

    texts = read_texts(options.eval_text, part="evaluation")
    if calibration is not None and (
        texts.sha256 == calibration.sha256 or texts.source == calibration.source
    ):
        raise ComparisonError(
            f"The evaluation text {texts.source} is the calibration text: "
            "what was dropped was chosen to do well on it.",
            "Name another text with --eval-text.",
        )
    return texts
