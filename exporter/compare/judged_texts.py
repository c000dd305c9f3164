"""The texts that models are judged on, held apart from those that anything was decided by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from exporter.artifacts import CalibrationRef, PlanParts
from exporter.artifacts.plans.origin import CONTENT, noted_texts
from exporter.compare.options import CompareOptions
from exporter.errors import ComparisonError
from exporter.models.texts.documents import Content
from exporter.models.texts.images import read_images
from exporter.models.texts.sources import Part, TextSource, read_texts, refuse_same_text


def evaluation_texts(
    options: CompareOptions,
    decided: Mapping[str, Iterable[TextSource | CalibrationRef]],
    *,
    images: bool = False,
) -> list[TextSource]:
    """The texts that the arms are judged on, which are never such that anything was decided by.

    Returns:
        The text, and that of another domain if one was asked for.
    """
    if images and options.other_text is not None:
        raise ComparisonError(
            "There is no perplexity of images, which --other-text is for.",
            "Leave it out.",
            code="no-perplexity",
        )
    judged = [read_source(spec, part="evaluation", images=images) for spec in options.texts]
    for text, option in zip(judged, ("--eval-text", "--other-text"), strict=False):
        for what, others in decided.items():
            refuse_same_text(text, others, what, f"Name another text with {option}.")
    for other in judged[1:]:
        hint = "Name another text with --other-text."
        refuse_same_text(other, judged[:1], "what both models are judged on already", hint)
    return judged


def read_source(spec: str, *, part: Part, images: bool) -> TextSource:
    """Reads a text, or finds images."""
    return read_images(spec, part=part) if images else read_texts(spec, part=part)


def decided_on(parts: PlanParts) -> dict[str, list[CalibrationRef]]:
    """The texts that a plan was made by, for :func:`evaluation_texts`."""
    return {f"what the plan was {role} on": refs for role, refs in parts.decided.items()}


def refuse_noted(judged: TextSource, metadata: Mapping[str, str], arm: str = "candidate") -> None:
    """Refuses to judge on a text, or a copy, that an arm was made by, as its graph notes."""
    for role, known in noted_texts(metadata).items():
        contents = (each.removeprefix(CONTENT) for each in known if each.startswith(CONTENT))
        if judged.sha256 in known or any(
            judged.content.is_shared(Content.read(content)) for content in contents
        ):
            raise ComparisonError(
                f"{judged.source} is what the {arm} was {role} on, or shares much of it, as its "
                "file notes.",
                "Name another text with --eval-text.",
                code="same-text",
            )
