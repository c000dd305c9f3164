"""The text that a search measures on: by default the one that the importance report rests on."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

from exporter.artifacts import CalibrationRef
from exporter.errors import CalibrationError
from exporter.importance import CalibrationText
from exporter.importance.calibration import calibration_text
from exporter.loading.model_source import LoadedModel
from exporter.progress import QUIET, Progress

_USUAL_LENGTH = 512
_SEED = re.compile(r"seed (\d+)")


def text_of_report(
    loaded: LoadedModel,
    ref: CalibrationRef,
    *,
    calibration: str | None = None,
    cache_dir: Path | None = None,
    progress: Progress = QUIET,
) -> CalibrationText:
    """The samples that a report's scores rest on, or as many of another text.

    Where the scores rest on no text, that is the usual text for this kind of model.

    Args:
        loaded: The model.
        ref: What the report says of its text.
        calibration: Another text, as ``depthcut score --calibration`` takes it; None: the report's.
        cache_dir: Where text that the model sampled is kept.
        progress: Told what goes on.

    Raises:
        CalibrationError: When the report's text is no longer the same, or too short.
        TextSourceError: When it can't be read.
    """
    known = ref.samples > 0  # A metric that reads no text leaves the choice to the defaults.
    spec = _spec(ref) if calibration is None and known else calibration
    seed = _SEED.search(ref.source)
    text = calibration_text(
        loaded,
        spec,
        samples=ref.samples or None,
        sequence_length=ref.sequence_length or _USUAL_LENGTH,
        seed=int(seed[1]) if seed and ref.source.startswith("self") else 0,
        cache_dir=cache_dir,
        progress=progress,
    )
    if known and calibration is None and text.ref.sha256 != ref.sha256:
        raise CalibrationError(
            f"{ref.source} is no longer the text that the scores rest on.",
            "Score the model again, or name a text for the search: --calibration.",
        )
    return text


def first_tokens(text: CalibrationText, tokens: int) -> CalibrationText:
    """The first samples of a text, enough for a number of tokens."""
    samples = min(len(text.input_ids), math.ceil(tokens / text.input_ids.shape[1]))
    mask = text.mask[:samples]
    ref = text.ref.model_copy(update={"samples": samples, "tokens": int(mask.sum())})
    return replace(text, ref=ref, input_ids=text.input_ids[:samples], mask=mask)


def _spec(ref: CalibrationRef) -> str:
    """What to name so that the same text is read again."""
    for spec in ("self", "pydoc"):
        if ref.source.startswith(f"{spec} ("):
            return spec
    return ref.source
