"""Which cost_runner measures a model: told by how it is written, as a comparison's arms are."""

from __future__ import annotations

from pathlib import Path

from exporter.choose.costs.cost_runners import CostRunner, OnnxCostRunner
from exporter.choose.costs.request_shape import RequestShape
from exporter.compare.kinds import ArmName
from exporter.engines.build.libraries import Backend
from exporter.engines.runners.registry import ONNX, RUNNERS
from exporter.errors import CostError, UsageError
from exporter.models.loading.model_source import load_model
from exporter.models.model_folder import find_onnx
from exporter.optional import require
from exporter.progress import QUIET, Progress


def open_cost_runner(
    model: Path | str,
    folder: Path,
    at: RequestShape,
    *,
    provider: str = "cpu",
    engine: Backend | None = None,
    rank: int | None = None,
    progress: Progress = QUIET,
) -> CostRunner:
    """Finds what runs a model.

    Args:
        model: An ONNX file, or a folder with one; or ``torch:DIR``, which PyTorch runs, or a
            backend and the path of its model, as in ``llama.cpp:FILE``.
        folder: Where variants are written for a while.
        at: The request, whose shapes an engine is built for.
        provider: Where ONNX Runtime or PyTorch runs: ``cpu`` or ``cuda``.
        engine: The library that builds engines of an ONNX file and runs them instead.
        rank: Of linear maps; None for full ones.
        progress: Hears what a builder says.

    Raises:
        CostError: An engine is given, of which nothing can be cut, or there is no GPU to run one.
        UsageError: What is asked for does not go together.
        OnnxFileError: There is no ONNX file.
        ModelSourceError: The PyTorch model can't be loaded.
        MissingDependencyError: What runs it is not installed.
    """
    name = ArmName.of(model)
    if name.is_torch and engine is None:
        return _torch(name, provider, rank)
    runs_on = RUNNERS.get(name.kind)
    if runs_on is None or (engine is not None and name.kind != ONNX):
        raise CostError(
            f"No variants of {name} can be made.",
            "Name the ONNX file, and for engines of it the library: --engine.",
        )
    if runs_on.gguf:
        from exporter.choose.costs.gguf_cost_runner import GgufCostRunner

        return GgufCostRunner(name.path, folder, provider, rank=rank)
    onnx = find_onnx(name.path)
    if engine is None:
        return OnnxCostRunner(onnx, folder, provider, rank=rank, runs_on=name.kind)
    from exporter.choose.costs.engine_cost_runner import EngineCostRunner

    return EngineCostRunner(onnx, folder, at, engine, rank=rank, progress=progress)


def _torch(name: ArmName, provider: str, rank: int | None) -> CostRunner:
    if name.kind == "torch-compile":
        raise UsageError(
            f"{name} would be compiled again for each variant.", f"Measure torch:{name.path}."
        )
    require("torch", extra="torch")
    from exporter.choose.costs.torch_cost_runner import TorchCostRunner

    if not name.path.exists():
        raise CostError(f"{name.path} does not exist.", "Give a Hugging Face folder after torch:.")
    return TorchCostRunner(load_model(str(name.path)), provider, rank=rank)
