"""What both arms are asked, for a reader to see what they say: built in, or the user's own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from exporter.models.texts.sources import read_prompts

_BUILT_IN = "built in"
_NEWS = (
    "The meeting was moved from Monday to Wednesday, because the train drivers are on strike and "
    "half of the team can't come to the office."
)
_QUESTIONS = (
    ("What is the capital of France?", "The capital of France is"),
    ("What is 2 + 3?", "Question: What is 2 + 3?\nAnswer:"),
    ("Name three colours.", "Three colours of the rainbow are"),
    (f"Summarise this in one short sentence: {_NEWS}", f"{_NEWS} In short,"),
)
"""For a chat, and for a model that only continues texts."""
_SENTENCES = (
    "A man is playing the guitar on a stage.",
    "The parliament passed the new tax law on Friday.",
    "Bake the bread for forty minutes in a hot oven.",
    "The spacecraft entered orbit around Mars.",
    "A musician performs a song in front of an audience.",
    "Members of parliament voted for higher taxes.",
    "Knead the dough and let it rise before baking.",
    "A probe was sent to study the red planet.",
    "The band tuned their instruments before the concert.",
    "The government wants to change how income is taxed.",
    "This recipe needs flour, yeast, water and salt.",
    "Astronomers observed a distant galaxy with the new telescope.",
)
"""Of four subjects in turns, so that the first four are one of each."""


@dataclass(frozen=True)
class Prompts:
    """What is asked, and where it is from.

    Attributes:
        texts: What the report shows: what a user of a chat says, or sentences to embed.
        openings: What a model continues that has no chat template, one for each text.
        source: A file, or ``built in``.
    """

    texts: tuple[str, ...]
    openings: tuple[str, ...]
    source: str = _BUILT_IN


def questions(path: Path | None) -> Prompts:
    """Prompts for a model that generates.

    Args:
        path: The user's own; None for the built-in ones.

    Raises:
        TextSourceError: The file can't be read, or holds no prompt.
    """
    if path is None:
        asked, openings = zip(*_QUESTIONS, strict=True)
        return Prompts(asked, openings)
    return _own(path)


def sentences(path: Path | None) -> Prompts:
    """Sentences for an encoder; see :func:`questions`."""
    return Prompts(_SENTENCES, _SENTENCES) if path is None else _own(path)


def _own(path: Path) -> Prompts:
    found = read_prompts(path)
    return Prompts(found.documents, found.documents, found.source)
