"""Several texts as one, alike much of each wherever it is cut."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from exporter.artifacts import CalibrationRef
from exporter.errors import CalibrationError, DepthcutError
from exporter.files import sha256_bytes
from exporter.models.texts.calibration import CalibrationText


def joined(texts: Sequence[CalibrationText]) -> CalibrationText:
    """Several texts as one; sample by sample in turn, so that every part of it is a mixture.

    Each round begins with another text, so that no text stands at every second or fifth place.
    """
    if len(texts) == 1:
        return texts[0]
    rounds = np.concatenate([np.arange(len(text.input_ids)) for text in texts])
    owners = np.repeat(np.arange(len(texts)), [len(text.input_ids) for text in texts])
    places = rounds / np.array([len(text.input_ids) for text in texts])[owners]
    order = np.lexsort(((owners + rounds) % len(texts), places))
    refs = tuple(text.ref for text in texts)
    ref = CalibrationRef(
        source=" + ".join(each.source for each in refs),
        samples=sum(each.samples for each in refs),
        sequence_length=refs[0].sequence_length,
        tokens=sum(each.tokens for each in refs),
        sha256=refs[0].sha256 if len({r.sha256 for r in refs}) == 1 else _digest(refs),
    )
    return CalibrationText(
        ref,
        np.concatenate([text.input_ids for text in texts])[order],
        np.concatenate([text.mask for text in texts])[order],
        sources=refs,
        owners=owners[order],
    )


def refuse_same(
    texts: Sequence[CalibrationText], error: type[DepthcutError] = CalibrationError
) -> None:
    """Refuses a mixture that has a text twice.

    Args:
        texts: What is to be mixed.
        error: The error of the stage that asks.
    """
    named: dict[str, str] = {}
    for text in texts:
        if text.ref.sha256 in named:
            raise error(
                f"{named[text.ref.sha256]} and {text.ref.source} are the same text.",
                "Name each text once.",
                code="named-twice",
            )
        named[text.ref.sha256] = text.ref.source


def _digest(refs: Sequence[CalibrationRef]) -> str:
    return sha256_bytes("\n".join(ref.sha256 for ref in refs).encode())
