"""Probes: short tasks whose items are made from a seed, so that any decoder can be asked them.

Arithmetic and balanced brackets are what models lose with their layers and training doesn't give
back: Nepal et al., "On the Limits of Layer Pruning for Generative Reasoning in Large Language
Models", arXiv 2602.01997. Copying and looking up a key take attention to what stands before. The
texts are the same for every tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict

import numpy as np

from exporter.compare.tasks.items import Item, TaskItems
from exporter.files import sha256_bytes

_CHOICES = 4
_WORDS = (
    *("apple", "bird", "boat", "book", "bread", "bridge", "chair", "cloud", "coat", "corn"),
    *("door", "dream", "farm", "field", "fire", "fish", "floor", "flower", "forest", "garden"),
    *("glass", "gold", "grass", "hand", "hat", "hill", "horse", "house", "king", "lake"),
    *("lamp", "leaf", "milk", "moon", "mountain", "mouse", "night", "ocean", "paper", "park"),
    *("river", "road", "rock", "roof", "room", "rose", "salt", "sand", "ship", "shoe"),
    *("sky", "snow", "soap", "song", "star", "stone", "storm", "sugar", "sun", "table"),
    *("train", "tree", "wall", "water", "wheel", "wind", "window", "wood"),
)
_SUMS = "3 + 4 = 7\n12 + 5 = 17\n8 + 6 = 14\n47 + 2 = 49\n"
_CLOSING = {"(": ")", "[": "]", "{": "}", "<": ">"}
_NESTED = "( [ ] )\n{ ( < > ) }\n[ { } ( ) ]\n"
_COPIED = 8
_KEYS = 4

Draw = np.random.Generator


def make_probes(number: int, *, seed: int = 0) -> list[TaskItems]:
    """All probes.

    Args:
        number: Items of each.
        seed: The same one makes the same items.
    """
    return [_probe(name, make, number, seed) for name, make in PROBES.items()]


def _probe(name: str, make: Callable[[Draw], Item], number: int, seed: int) -> TaskItems:
    draw = np.random.default_rng(seed)
    items = tuple(make(draw) for _ in range(number))
    content = json.dumps([asdict(item) for item in items])
    digest = sha256_bytes(content.encode())
    return TaskItems(name, f"made from the seed {seed}", items, ("acc", "log_prob"), digest)


def _arithmetic(draw: Draw) -> Item:
    """A sum of two numbers of one or two digits; wrong answers differ in the last digit alone."""
    first = int(draw.integers(1, 10) if draw.random() < 0.5 else draw.integers(10, 100))
    second = int(draw.integers(1, 10))
    right = str(first + second)
    wrong = [right[:-1] + digit for digit in "0123456789" if digit != right[-1]]
    return _item(draw, f"{_SUMS}{first} + {second} =", right, wrong)


def _brackets(draw: Draw) -> Item:
    """Nested brackets; the right one closes the last that is open."""
    length = int(draw.integers(4, 9))
    text: list[str] = []
    unclosed: list[str] = []
    while len(text) < length or not unclosed:
        if unclosed and draw.random() < 0.4:
            text.append(unclosed.pop())
        else:
            text.append(str(draw.choice([*_CLOSING])))
            unclosed.append(_CLOSING[text[-1]])
    wrong = [closing for closing in _CLOSING.values() if closing != unclosed[-1]]
    return _item(draw, _NESTED + " ".join(text), unclosed[-1], wrong)


def _copy(draw: Draw) -> Item:
    """A list of words that begins anew; wrong answers stand elsewhere in it."""
    words = _words(draw, _COPIED)
    place = int(draw.integers(3, _COPIED - 1))
    wrong = [word for number, word in enumerate(words) if number not in (place - 1, place)]
    context = f"{' '.join(words)}.\n{' '.join(words[:place])}"
    return _item(draw, context, words[place], wrong)


def _lookup(draw: Draw) -> Item:
    """Keys with their values, then one of the keys; wrong answers are the other values."""
    words = _words(draw, 2 * _KEYS)
    table = dict(zip(words[:_KEYS], words[_KEYS:], strict=True))
    key = words[int(draw.integers(_KEYS))]
    lines = "".join(f"{each}: {value}\n" for each, value in table.items())
    wrong = [value for value in table.values() if value != table[key]]
    return _item(draw, f"{lines}{key}:", table[key], wrong)


def _words(draw: Draw, number: int) -> list[str]:
    return [str(word) for word in draw.choice(_WORDS, number, replace=False)]


def _item(draw: Draw, context: str, right: str, wrong: Sequence[str]) -> Item:
    """The right answer among wrong ones, anywhere."""
    chosen = [str(each) for each in draw.choice(wrong, _CHOICES - 1, replace=False)]
    gold = int(draw.integers(_CHOICES))
    choices = [*chosen[:gold], right, *chosen[gold:]]
    pairs = tuple((context, f" {choice}") for choice in choices)
    return Item(pairs, tuple(map(len, choices)), gold)


PROBES: dict[str, Callable[[Draw], Item]] = {
    "arithmetic": _arithmetic,
    "brackets": _brackets,
    "copy": _copy,
    "lookup": _lookup,
}
"""By name, what draws an item."""
