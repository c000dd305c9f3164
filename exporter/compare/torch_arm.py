"""An arm that PyTorch runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.compare.arms import ComparedArm
from exporter.errors import ComparisonError, ExportError
from exporter.models.graph_facts import GraphFacts
from exporter.models.loading.model_source import LoadedModel, load_model
from exporter.models.model_folder import ModelFolder
from exporter.optional import require

if TYPE_CHECKING:
    from exporter.engines.runners.pytorch import TorchRunner

_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def open_torch_arm(
    path: Path, *, compiled: bool, provider: str, threads: int, precision: str | None
) -> ComparedArm:
    """Loads a model of the Hugging Face kind."""
    require("torch", extra="torch")
    from exporter.engines.runners.pytorch import TorchRunner

    if not path.exists():
        raise ComparisonError(
            f"{path} does not exist.",
            "Give a Hugging Face folder or a GGUF file after torch:.",
            code="file-missing",
        )
    loaded = load_model(str(path), dtype=_DTYPES.get(precision or "", "float32"), pruned=True)
    try:
        runner = TorchRunner(loaded.model, compiled=compiled, provider=provider, threads=threads)
    except ExportError as error:
        raise ComparisonError(f"{path} can't be an arm: {error.message}") from error
    folder = ModelFolder.beside(path, path, _config(loaded))
    prefix = "torch-compile:" if compiled else "torch:"
    return ComparedArm((runner,), folder, _facts(loaded, runner), prefix=prefix)


def _config(loaded: LoadedModel) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(loaded.model.config.to_json_string())
    return {**config, "architectures": [loaded.ref.architecture]}


def _facts(loaded: LoadedModel, runner: TorchRunner) -> GraphFacts:
    model, interface = loaded.model, runner.interface
    per_token = sum(slot.heads * (slot.key_size + slot.value_size) for slot in interface.cache)
    table = (
        getattr(model.get_input_embeddings(), "weight", None) if interface.image is None else None
    )
    dtype = str(model.dtype).removeprefix("torch.")
    return GraphFacts(
        file_bytes=sum(path.stat().st_size for path in _weights(loaded.path)),
        sha256=loaded.ref.sha256,
        parameters=sum(weight.numel() for weight in model.parameters()),
        nodes=0,
        precision=next(short for short, name in _DTYPES.items() if name == dtype),
        kv_cache_bytes_per_token=per_token * model.dtype.itemsize,
        vocabulary=None if table is None else table.shape[0],
        metadata={},
    )


def _weights(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(path.glob("*.safetensors"))
