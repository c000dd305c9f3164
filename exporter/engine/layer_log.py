"""The builder's account of its layers and memory, read from what it logs.

There is no inspector where there is no GPU, but with detailed profiling the builder logs a line for
each layer that it made. That is a log and no interface: a version that says it otherwise gives an
empty table here, never a wrong one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

_LAYER = re.compile(r"^Name: (?P<name>.*?), LayerType: (?P<kind>[\w ]+?),", re.MULTILINE)
_MEMORY = re.compile(r"^Total ([\w ]+) Memory: (\d+) bytes", re.MULTILINE)
_NO_WORK = frozenset({"signal", "wait", "shape_call", "ShapeHostToDevice"})
"""Synchronisation and shapes: how many there are says nothing of the model."""


@dataclass(frozen=True)
class LayerTable:
    """What the builder made.

    Attributes:
        layers: By type, how many layers do real work.
        memory_bytes: By kind (``activation``, ``weights``), the largest that was named.
    """

    layers: dict[str, int] = field(default_factory=dict)
    memory_bytes: dict[str, int] = field(default_factory=dict)


def read_layers(lines: Iterable[str]) -> LayerTable:
    """Collects the layers and the memory from the builder's log.

    Args:
        lines: Its messages; one may hold many layers.
    """
    kinds: Counter[str] = Counter()
    memory: dict[str, int] = {}
    for line in lines:
        kinds.update(match["kind"] for match in _LAYER.finditer(line))
        for kind, amount in _MEMORY.findall(line):
            key = kind.lower().replace(" ", "_")
            memory[key] = max(memory.get(key, 0), int(amount))
    real = {kind: count for kind, count in sorted(kinds.items()) if kind not in _NO_WORK}
    return LayerTable(real, memory)
