"""Cut the layers of a Transformer that don't matter, and prove what that bought.

The functions, in the order in which they are used; each has its arguments, results and errors in
its own docstring, and ``exporter/docs/python.md`` walks from a model to a verdict.

- :func:`load_model` reads weights, :func:`score_model` scores every attention, MLP and block,
- :func:`plan_cut` takes the lowest scores, :func:`make_plan` also searches, for any budget,
- :func:`heal_model` makes up for what a plan drops,
  :func:`write_checkpoint` writes the cut model for PyTorch,
- :func:`write_onnx` exports a model, :func:`inspect_file` lists what a graph's cut could take out,
  :func:`prune_file` cuts it, :func:`quantize_file` rounds its weights,
- :func:`build_engines` makes TensorRT engines of a graph,
- :func:`compare_models` times and judges two models, :func:`write_reports` writes that down, and
  :func:`check_report` holds it against limits.
- :func:`export_model` does all of it in one folder, and goes on where it was interrupted.

What fails raises a :class:`DepthcutError`: a sentence, a ``hint`` and a ``code``. Nothing is
imported before it is used: PyTorch only by what has a model in its hands.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exporter.artifacts import (
        CheckReport,
        ComparisonReport,
        ImportanceReport,
        PruneReport,
        PruningPlan,
    )
    from exporter.artifacts.loaded_plan import LoadedPlan
    from exporter.artifacts.plans import plan_cut
    from exporter.checkpoint.write import write_checkpoint
    from exporter.choose.budgets.planner import make_plan
    from exporter.choose.budgets.settings import PlanRequest
    from exporter.compare.options import CompareOptions
    from exporter.compare.session import compare as compare_models
    from exporter.cut.options import CutOptions
    from exporter.cut.surgery import inspect_file, prune_file
    from exporter.engines.build.build import build_engines
    from exporter.engines.build.profiles import Ranges
    from exporter.engines.build.settings import BuildSettings, Profile
    from exporter.errors import DepthcutError
    from exporter.export.forms.targets import write_onnx
    from exporter.gate.gate import BaselineMatch, History
    from exporter.gate.gate import check as check_report
    from exporter.gate.limits import Limits
    from exporter.heal.healed import Healed
    from exporter.heal.healed import heal as heal_model
    from exporter.heal.options import HealOptions
    from exporter.models.loading.model_source import LoadedModel, load_model
    from exporter.pipeline.request import ExportRequest
    from exporter.pipeline.road import export_model
    from exporter.quantize.quantize import quantize_file
    from exporter.quantize.settings import QuantizeSettings
    from exporter.report.files import write_reports
    from exporter.score.options import ScoreOptions
    from exporter.score.scoring import score as score_model

__version__ = "0.1.0"

_PLACES = {
    "artifacts": "CheckReport ComparisonReport ImportanceReport PruneReport PruningPlan",
    "artifacts.loaded_plan": "LoadedPlan",
    "artifacts.plans": "plan_cut",
    "checkpoint.write": "write_checkpoint",
    "choose.budgets.planner": "make_plan",
    "choose.budgets.settings": "PlanRequest",
    "compare.options": "CompareOptions",
    "compare.session:compare": "compare_models",
    "cut.options": "CutOptions",
    "cut.surgery": "inspect_file prune_file",
    "engines.build.build": "build_engines",
    "engines.build.profiles": "Ranges",
    "engines.build.settings": "BuildSettings Profile",
    "errors": "DepthcutError",
    "export.forms.targets": "write_onnx",
    "gate.gate": "BaselineMatch History",
    "gate.gate:check": "check_report",
    "gate.limits": "Limits",
    "heal.healed": "Healed",
    "heal.healed:heal": "heal_model",
    "heal.options": "HealOptions",
    "models.loading.model_source": "LoadedModel load_model",
    "pipeline.request": "ExportRequest",
    "pipeline.road": "export_model",
    "quantize.quantize": "quantize_file",
    "quantize.settings": "QuantizeSettings",
    "report.files": "write_reports",
    "score.options": "ScoreOptions",
    "score.scoring:score": "score_model",
}
"""By module what it holds; behind a colon, what it calls that."""
_HOMES = {name: home for home, names in _PLACES.items() for name in names.split()}

__all__ = [
    "BaselineMatch",
    "BuildSettings",
    "CheckReport",
    "CompareOptions",
    "ComparisonReport",
    "CutOptions",
    "DepthcutError",
    "ExportRequest",
    "HealOptions",
    "Healed",
    "History",
    "ImportanceReport",
    "Limits",
    "LoadedModel",
    "LoadedPlan",
    "PlanRequest",
    "Profile",
    "PruneReport",
    "PruningPlan",
    "QuantizeSettings",
    "Ranges",
    "ScoreOptions",
    "build_engines",
    "check_report",
    "compare_models",
    "export_model",
    "heal_model",
    "inspect_file",
    "load_model",
    "make_plan",
    "plan_cut",
    "prune_file",
    "quantize_file",
    "score_model",
    "write_checkpoint",
    "write_onnx",
    "write_reports",
]


def __getattr__(name: str) -> Any:
    home, _, other = _HOMES.get(name, "").partition(":")
    if not home:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"exporter.{home}"), other or name)


def __dir__() -> list[str]:
    return __all__
