"""What a point of a series is called, and which number its name tells."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePath

from exporter.artifacts import CalibrationRef

_MULTIPLES = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
_NUMBER = r"(\d+(?:,\d{3})*(?:\.\d+)?(?:e\d\d?)?)([kmbt]?)(?![a-z\d])"


def _behind(words: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![a-z])(?:{words})s?[-_=.]?{_NUMBER}", re.IGNORECASE)


_NAMED = (
    _behind("checkpoint|ckpt|global_?step|step|iter(?:ation)?|it"),
    _behind("epoch|ep|token"),
)
_BARE = re.compile(rf"(?<![a-z\d.])(?:[a-z]*\.?){_NUMBER}(?!\.\d)", re.IGNORECASE)
_DATE = re.compile(
    r"(?<!\d)(?:19|20)\d\d([-_.]?)(?:0[1-9]|1[0-2])\1(?:0[1-9]|[12]\d|3[01])(?!\d)"
    r"(?:T[\d:.-]+|[-_]\d\d[-:]\d\d(?:[-:]\d\d)?(?!\d)|(?<=\d{8})[-_]\d{6}(?!\d))?",
    re.IGNORECASE,
)
# A version, a type, a seed; the size of a model, behind the version of its family or not. What
# stands before "tokens" is none.
_OTHER = re.compile(
    r"(?<![a-z])(?:v|version|bf|fp|u?int|float|q|seed|rank|lr|bs)[-_=.]?\d+(?:\.\d+)*(?![a-z\d])"
    r"|(?<![a-z\d.])(?:[a-z]*\d(?:\.\d+)?[-_])?\d{1,2}(?:\.\d+)?b(?![a-z\d]|[-_.]?tok)"
    r"|(?<![a-z\d.])\d{1,3}(?:\.\d+)?m(?![a-z\d]|[-_.]?tok)",
    re.IGNORECASE,
)


def step_of(source: str) -> float | None:
    """The training step (or tokens, or epoch) in the name of a checkpoint's folder.

    ``checkpoint-1000``, ``step_2000``, ``global_step300``, ``iter_0000400``, ``500B``, ``step3k``.
    Words for steps count before those for epochs and tokens, and these before the last bare number
    that is no version, type, seed, or size of a model. The folder's own name alone counts: a
    parent's would be the same for all.

    Returns:
        None where the name holds no number, or a date instead of one.
    """
    name = _DATE.sub("", PurePath(source).name)
    found = next(filter(None, (list(words.finditer(name)) for words in _NAMED)), None)
    if found is None:
        whole = re.fullmatch(_NUMBER, name, re.IGNORECASE)
        found = [whole] if whole else list(_BARE.finditer(_OTHER.sub("", name)))
    if not found:
        return None
    digits, suffix = found[-1].groups()
    return float(digits.replace(",", "")) * _MULTIPLES[suffix.lower()]


def checkpoint_labels(sources: Sequence[str]) -> list[str]:
    """Short names that differ: the folders', with their parents' where those are alike."""
    names = [PurePath(source).name or source for source in sources]
    if len(set(names)) < len(names):
        names = ["/".join(PurePath(source).parts[-2:]) for source in sources]
    return _told_apart(names)


def text_labels(texts: Sequence[CalibrationRef]) -> list[str]:
    """Short names of texts: what they are called, and how much of each where that differs."""
    names = ["+".join(_short(each.source) for each in text.mixture or [text]) for text in texts]
    amounts = {(text.samples, text.sequence_length) for text in texts}
    if len(amounts) > 1:
        sizes = [f"{text.samples} x {text.sequence_length}" for text in texts]
        alone = len(set(names)) == 1
        names = [s if alone else f"{n}, {s}" for n, s in zip(names, sizes, strict=True)]
    return _told_apart(names)


def _short(source: str) -> str:
    """``pydoc`` for ``pydoc (calibration half, Python 3.13)``; a file's name without its folder."""
    if source.startswith("self ("):
        seed = re.search(r"seed ([0-9]{1,18})", source)
        return f"self, seed {seed[1]}" if seed and seed[1] != "0" else "self"
    if source.startswith(("pydoc (", "none (")):
        return source.partition(" (")[0]
    return source if source.startswith("hf:") else PurePath(source).name or source


def _told_apart(names: Sequence[str]) -> list[str]:
    """The same names; those that several points have get a number."""
    several = {name for name, count in Counter(names).items() if count > 1}
    seen: Counter[str] = Counter()
    found = []
    for name in names:
        seen[name] += 1
        found.append(f"{name} ({seen[name]})" if name in several else name)
    return found
