from __future__ import annotations

from pathlib import Path
from typing import Any

from exporter.engine.settings import BuildSettings
from exporter.engine.sidecar import EngineRecord, sidecar_path
from exporter.files import sha256_bytes

CONTENT = b"not really an engine"


def record(**changes: Any) -> EngineRecord:
    """The record of an engine whose content is CONTENT."""
    facts: dict[str, Any] = {
        "engine": "m.engine", "engine_sha256": sha256_bytes(CONTENT), "engine_bytes": len(CONTENT),
        "backend": "tensorrt-rtx", "backend_version": "1.7.1.116", "built_on": {},
        "settings": BuildSettings(compute_capabilities=("sm89",)), "precision": "fp16", "plan": [],
        "profiles": [], "inputs": [], "outputs": [], "network_layers": 9, "layers": {"kgen": 2},
        "memory_bytes": {}, "reproducible": True, "parse_s": 0.1, "build_s": 1.0, "total_s": 1.2,
    }  # fmt: skip
    return EngineRecord.model_validate({**facts, **changes})


def written(folder: Path, **changes: Any) -> Path:
    """An engine file and its record."""
    engine = folder / "m.engine"
    engine.write_bytes(CONTENT)
    record(**changes).write(sidecar_path(engine))
    return engine
