"""What a model reads, in words: texts, images or recordings, and what these are made of."""

from __future__ import annotations

from typing import Literal, NamedTuple

Parts = Literal["tokens", "patches", "frames"]
"""What the length of what a model reads counts."""


class Nouns(NamedTuple):
    """What users call a model's samples.

    Attributes:
        one: A sample.
        several: Samples.
        parts: What a sample's length counts.
    """

    one: str
    several: str
    parts: Parts

    @property
    def much(self) -> str:
        """What much of it is called: text, images, recordings."""
        return self.one if self.parts == "tokens" else self.several


OF_IMAGES = "ForImageClassification"
"""How the names of classes end that give each image a class."""
TEXTS = Nouns("text", "texts", "tokens")
IMAGES = Nouns("image", "images", "patches")
RECORDINGS = Nouns("recording", "recordings", "frames")
_OF_SOUND = ("Whisper", "Speech2Text")


def nouns_of(architecture: str) -> Nouns:
    """What a model reads, by the name of its class, such as ``ViTForImageClassification``."""
    if OF_IMAGES in architecture:
        return IMAGES
    return RECORDINGS if architecture.startswith(_OF_SOUND) else TEXTS
