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
    "How do I reset my password?",
    "The bank raised its interest rates.",
    "The film was far too long and boring.",
    "A dog chased the ball across the park.",
    "I forgot my login and need a new one.",
    "Borrowing money has become more expensive.",
    "I nearly fell asleep during the movie.",
    "The puppy ran after its toy on the lawn.",
    "Where can I change my email address?",
    "We had a picnic on the bank of the river.",
    "The film won three awards for its music.",
    "He parked the car next to the ball court.",
)
"""Four to search with; of each in other words; of each something else in the same words."""


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
