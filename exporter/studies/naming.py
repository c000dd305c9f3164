"""What a point of a series is called, and which number its name tells."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePath

from exporter.artifacts import CalibrationRef

_MULTIPLES = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
_NAMED = re.compile(
    r"(?:checkpoint|ckpt|global_?step|step|iter(?:ation)?|epoch|it)s?[-_=.]?(\d+(?:\.\d+)?)([kmbt]?)"
    r"(?![a-z\d])",
    re.IGNORECASE,
)
_ANY = re.compile(r"(?<![\d.])(\d+(?:\.\d+)?)([kmbt]?)(?![a-z\d])", re.IGNORECASE)


def step_of(source: str) -> float | None:
    """The training step (or tokens, or epoch) in the name of a checkpoint's folder.

    ``checkpoint-1000``, ``step_2000``, ``global_step300``, ``iter_0000400``, ``500B``, ``step3k``.
    Words such as these count before the last bare number of the name, and the folder's own name
    alone counts: a size such as ``7b`` in a parent's would be the same for all.

    Returns:
        None where the name holds no number.
    """
    name = PurePath(source).name
    found = list(_NAMED.finditer(name)) or list(_ANY.finditer(name))
    if not found:
        return None
    digits, suffix = found[-1].groups()
    return float(digits) * _MULTIPLES[suffix.lower()]


def checkpoint_labels(sources: Sequence[str]) -> list[str]:
    """Short names that differ: the folders', with their parents' where those are alike."""
    names = [PurePath(source).name or source for source in sources]
    if len(set(names)) < len(names):
        names = ["/".join(PurePath(source).parts[-2:]) for source in sources]
    return _told_apart(names)


def text_labels(texts: Sequence[CalibrationRef]) -> list[str]:
    """Short names of texts: what they are called, and how much of each where that differs."""
    names = [_short(text.source) for text in texts]
    amounts = {(text.samples, text.sequence_length) for text in texts}
    if len(amounts) > 1:
        sizes = [f"{text.samples} x {text.sequence_length}" for text in texts]
        alone = len(set(names)) == 1
        names = [s if alone else f"{n}, {s}" for n, s in zip(names, sizes, strict=True)]
    return _told_apart(names)


def _short(source: str) -> str:
    """``pydoc`` for ``pydoc (calibration half, Python 3.13)``; a file's name without its folder."""
    if source.startswith("self ("):
        seed = re.search(r"seed (\d+)", source)
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
