"""What the tokenizer of a stranger's may take: time, and the memory of what a text grows to."""

from __future__ import annotations

import base64
import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from exporter.errors import ComparisonError, blaming, panics_as_errors
from exporter.processes import within
from graph_passes.files.reading import parse_json

_T = TypeVar("_T")
_MOST_GROWTH, _USUAL_GROWTH = 256, 4
_MOST_CHARACTERS = 1 << 25  # about a gigabyte while they are replaced
_SECONDS = 30.0
_GROWING = (b"Replace", b"Prepend", b"Template", b"Precompiled", b"\\u00")  # JSON may escape a name
_LARGE = 1 << 25
_USUAL_BYTES = 64  # the longest that Unicode makes of a character has 33
_CHARACTERS_A_SECOND = 5_000  # a hundredth of what a slow one does
_HINT = "Take the tokenizer that belongs to the model, or shorter texts."


@dataclass
class Budget:
    """What a stranger's tokenizer may take: its expressions can go back for ever."""

    where: str
    growth: float  # by how much its replacements can make a text longer, at most
    seconds: float = field(default_factory=lambda: _SECONDS)

    @classmethod
    def of(cls, where: str, tokenizer: Any) -> Budget:
        """That of the tokenizers library's object; another one replaces nothing."""
        part = getattr(tokenizer, "normalizer", None)
        return cls(where, 1 if part is None else _growth(json.loads(part.__getstate__())))

    def run(self, characters: int, work: Callable[[], _T]) -> _T:
        """What the tokenizer makes of a text of so many characters."""
        if self.growth > _USUAL_GROWTH and characters * self.growth > _MOST_CHARACTERS:
            raise self._failed(f"{characters:,} characters may become {self.growth:.0f} times more")
        self.seconds += characters / _CHARACTERS_A_SECOND
        began, left = time.monotonic(), f"{characters:,} characters in {self.seconds:.0f} s"
        try:
            with broken_tokenizer(f"The tokenizer of {self.where} fails on {left}"):
                return within(self.seconds, work)
        finally:
            self.seconds -= time.monotonic() - began

    def _failed(self, how: str) -> ComparisonError:
        text = f"The tokenizer of {self.where} fails: {how}."
        return ComparisonError(text, _HINT, code="broken-tokenizer")


@contextlib.contextmanager
def broken_tokenizer(what: str) -> Iterator[None]:
    """Names what fails: the tokenizers library has no class of error of its own, and panics."""
    with blaming(what, _HINT, ComparisonError, "broken-tokenizer"), panics_as_errors():
        yield


def refuse_growing(content: bytes, where: str) -> None:
    """Refuses a ``tokenizer.json`` that makes texts endless, before a library reads it."""
    if len(content) < _LARGE and not any(name in content for name in _GROWING):
        return
    try:
        result = parse_json(content, where)
        parts = [result.get(name) for name in ("normalizer", "decoder", "post_processor")]
        growth = max(map(_growth, parts))
    except (ValueError, RecursionError, AttributeError, TypeError, LookupError):
        return  # no tokenizer, as the library will say
    if growth > _MOST_GROWTH:
        raise Budget(where, growth)._failed(
            f"a text can become {growth:.3g} times as long; {_MOST_GROWTH} times are taken"
        )


def _growth(part: Any) -> float:
    """How much longer a part of a tokenizer can make a text, at most."""
    if not isinstance(part, dict):
        return 1
    steps = [item for value in part.values() if isinstance(value, list) for item in value]
    if part.get("type") == "TemplateProcessing":
        return len(steps)
    if part.get("type") == "Precompiled":
        return _growth_by(base64.b64decode(part["precompiled_charsmap"]))
    if part.get("type") != "Replace":
        return math.prod(map(_growth, steps)) * (1 + len(part.get("prepend") or ""))
    content, pattern = len(part["content"]), part["pattern"]
    literal = pattern.get("String") if isinstance(pattern, dict) else pattern
    # An expression may match the nothing beside each character.
    return max(1, content / len(literal)) if literal else 1 + content


def _growth_by(charsmap: bytes) -> int:
    """The longest that a map of SentencePiece's makes of a character; its texts follow a tree."""
    longest = max(map(len, charsmap[4 + int.from_bytes(charsmap[:4], "little") :].split(b"\0")))
    return longest if longest > _USUAL_BYTES else 1
