"""Runs inside the building process: what an engine says of itself, where a GPU can load it.

Source: the API of EngineInspector and ICudaEngine; no GPU has run it in this project's CI.
"""

from __future__ import annotations

import json
from collections import Counter
from types import ModuleType

from exporter.engines.build.logs import LayerTable, Listener, layer_kind, real_layers


def inspected(
    module: ModuleType, listener: Listener, content: memoryview, told: LayerTable
) -> LayerTable:
    """A new engine's layers and memory.

    Args:
        module: The library.
        listener: Hears why it doesn't load.
        content: The engine.
        told: What the builder's log had; it stays where the engine does not load.
    """
    runtime = module.Runtime(listener.log)
    runtime.engine_host_code_allowed = True  # it was made here
    engine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        return told
    inspector = engine.create_engine_inspector()
    layers = inspector.get_engine_information(module.LayerInformationFormat.JSON)
    own = {
        "activation": int(engine.device_memory_size_v2),
        "weights": int(engine.get_engine_stat(module.EngineStat.TOTAL_WEIGHTS_SIZE)),
    }
    return LayerTable(read_inspected(layers) or told.layers, {**told.memory_bytes, **own})


def read_inspected(text: str) -> dict[str, int]:
    """Counts layers by type; none where the text has none, or their names alone.

    Args:
        text: JSON as an inspector writes it, with DETAILED profiling: ``{"Layers": [{"Name": ...,
            "LayerType": ...}, ...]}``.
    """
    try:
        layers = json.loads(text)["Layers"]
        kinds = Counter(layer_kind(each["Name"], each["LayerType"]) for each in layers)
    except (ValueError, KeyError, TypeError):  # another version's
        return {}
    return real_layers(kinds)
