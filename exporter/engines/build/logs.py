"""What a library logs and tells while it works: errors, what a parser can't take, and layers."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

from exporter.errors import OUT_OF_MEMORY, EngineError

_ERRORS = frozenset({"ERROR", "INTERNAL_ERROR"})
_PLACE = re.compile(r"^\[[^\]]*\] *")  # such as [checkMacros.cpp::catchCudaError::250]
_LAYER = re.compile(r"^Name: (.*?), LayerType: ([\w ]+?),", re.MULTILINE)
_MEMORY = re.compile(r"^Total ([\w ]+) Memory: (\d+) bytes", re.MULTILINE)
_FUSED_ATTENTION = "_mha_"  # in the names of the kernels that do an attention as a whole
_NO_WORK = frozenset({"signal", "wait", "shape_call", "ShapeHostToDevice"})
"""Synchronisation and shapes: how many there are says nothing of the model."""
_NO_MEMORY = re.compile(r"out ?of ?memory", re.IGNORECASE)


class Listener:
    """Collects what the library logs, in order, and its errors without their places in source."""

    def __init__(self, module: ModuleType, *, errors_only: bool = False) -> None:
        self.messages: list[str] = []
        self.errors: list[str] = []
        messages, errors = self.messages, self.errors

        class Log(module.ILogger):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                module.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity.name in _ERRORS:
                    errors.append(_PLACE.sub("", message))
                if not errors_only:
                    messages.append(message)

        self.log = Log()

    def last_error(self) -> str:
        """The last of them."""
        return (self.errors or ["it gives no reason"])[-1]

    def code(self, other: str) -> str:
        """The code of the error that the last message is: out of memory, or the other."""
        return OUT_OF_MEMORY if _NO_MEMORY.search(self.last_error()) else other


@dataclass(frozen=True)
class Obstacle:
    """What the parser can't take."""

    node: str
    operator: str
    reason: str

    def __str__(self) -> str:
        where = f"node {self.node!r} ({self.operator}): " if self.node else ""
        return f"{where}{self.reason.rstrip('.')}"


class LayerTable(NamedTuple):
    """What the builder made: layers that do work, by kind, and bytes."""

    layers: dict[str, int]
    memory_bytes: dict[str, int]


def read_layers(lines: Iterable[str]) -> LayerTable:
    """Collects the layers and the memory from the builder's log."""
    layers: list[tuple[str, str]] = []
    memory: dict[str, int] = {}
    for line in lines:
        layers += _LAYER.findall(line)
        for kind, amount in _MEMORY.findall(line):
            key = kind.lower().replace(" ", "_")
            memory[key] = max(memory.get(key, 0), int(amount))
    return LayerTable(_counted(layers), memory)


def _counted(layers: Iterable[tuple[str, str]]) -> dict[str, int]:
    """How many there are of a kind, of names and kinds; a fused attention is a kind of its own."""
    kinds = Counter("attention" if _FUSED_ATTENTION in name else kind for name, kind in layers)
    return {kind: count for kind, count in sorted(kinds.items()) if kind not in _NO_WORK}


def no_engine(errors: Sequence[str]) -> EngineError:
    """The error for a build that gave no engine."""
    return EngineError(
        f"The builder made no engine: {errors[0] if errors else 'it gives no reason'}",
        "Narrower ranges, a lower --optimization-level, another workspace (of build), or another "
        "precision may help; -v shows all that it said.",
        code=OUT_OF_MEMORY if any(map(_NO_MEMORY.search, errors)) else "no-engine-made",
    )


def inspected(
    module: ModuleType, listener: Listener, content: memoryview, logged: LayerTable
) -> LayerTable:
    """A new engine's layers and memory; what was logged, where it doesn't load."""
    runtime = module.Runtime(listener.log)
    engine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        return logged
    inspector = engine.create_engine_inspector()
    layers = inspector.get_engine_information(module.LayerInformationFormat.JSON)
    own = {
        "activation": int(engine.device_memory_size_v2),
        "weights": int(engine.get_engine_stat(module.EngineStat.TOTAL_WEIGHTS_SIZE)),
    }
    return LayerTable(read_inspected(layers) or logged.layers, {**logged.memory_bytes, **own})


def read_inspected(text: str) -> dict[str, int]:
    """Counts layers by type; none where the text has none, or their names alone."""
    try:
        layers = json.loads(text)["Layers"]
        return _counted([(layer["Name"], layer["LayerType"]) for layer in layers])
    except (ValueError, KeyError, TypeError):  # another version's
        return {}
