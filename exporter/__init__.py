"""Cut the layers of a Transformer that don't matter, and prove what that bought.

The functions, in the order in which they are used; each has its arguments, results and errors in
its own docstring, and ``exporter/docs/python.md`` walks from a model to a verdict.

- :func:`load_model` reads weights, :func:`score_model` scores every attention, MLP and block,
- :func:`measure_depths` tells how much may go,
  :func:`plan_cut` takes the lowest scores, :func:`make_plan` also searches, for any budget,
- :func:`heal_model` makes up for what a plan drops,
  :func:`write_checkpoint` writes the cut model for PyTorch,
- :func:`write_onnx` exports a model, :func:`inspect_file` lists what a graph's cut could take out,
  :func:`prune_file` cuts it, :func:`quantize_file` rounds its weights, :func:`cut_gguf` cuts a
  GGUF file,
- :func:`build_engines` makes TensorRT engines of a graph,
- :func:`compare_models` times and judges two models, :func:`write_reports` writes that down, and
  :func:`check_report` holds it against limits.
- :func:`export_model` does all of it in one folder, and goes on where it was interrupted;
  :func:`write_models` is the same for models that this machine can't run.

What fails raises a :class:`DepthcutError`: a sentence, a ``hint`` and a ``code``. Nothing is
imported before it is used: PyTorch only by what has a model in its hands.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exporter.artifacts import CheckReport as CheckReport
    from exporter.artifacts import ComparisonReport as ComparisonReport
    from exporter.artifacts import ImportanceReport as ImportanceReport
    from exporter.artifacts import PruneReport as PruneReport
    from exporter.artifacts import PruningPlan as PruningPlan
    from exporter.artifacts.loaded_plan import LoadedPlan as LoadedPlan
    from exporter.artifacts.plans import plan_cut as plan_cut
    from exporter.checkpoint.write import write_checkpoint as write_checkpoint
    from exporter.choose.budgets.planner import make_plan as make_plan
    from exporter.choose.budgets.settings import PlanRequest as PlanRequest
    from exporter.choose.depths import DepthOptions as DepthOptions
    from exporter.choose.depths import measure_depths as measure_depths
    from exporter.compare import session as _session
    from exporter.compare.options import CompareOptions as CompareOptions
    from exporter.cut.gguf_surgery import cut_gguf as cut_gguf
    from exporter.cut.options import CutOptions as CutOptions
    from exporter.cut.surgery import inspect_file as inspect_file
    from exporter.cut.surgery import prune_file as prune_file
    from exporter.engines.build.build import build_engines as build_engines
    from exporter.engines.build.profiles import Ranges as Ranges
    from exporter.engines.build.settings import BuildSettings as BuildSettings
    from exporter.engines.build.settings import Profile as Profile
    from exporter.errors import DepthcutError as DepthcutError
    from exporter.export.forms.targets import write_onnx as write_onnx
    from exporter.gate import gate as _gate
    from exporter.gate.gate import BaselineMatch as BaselineMatch
    from exporter.gate.gate import History as History
    from exporter.gate.limits import Limits as Limits
    from exporter.heal import healed as _healed
    from exporter.heal.healed import Healed as Healed
    from exporter.heal.options import HealOptions as HealOptions
    from exporter.models.loading.model_source import LoadedModel as LoadedModel
    from exporter.models.loading.model_source import load_model as load_model
    from exporter.pipeline.request import ExportRequest as ExportRequest
    from exporter.pipeline.road import export_model as export_model
    from exporter.pipeline.road import write_models as write_models
    from exporter.quantize.quantize import quantize_file as quantize_file
    from exporter.quantize.settings import QuantizeSettings as QuantizeSettings
    from exporter.report.files import write_reports as write_reports
    from exporter.score import scoring as _scoring
    from exporter.score.options import ScoreOptions as ScoreOptions

    check_report, compare_models = _gate.check, _session.compare
    heal_model, score_model = _healed.heal, _scoring.score

__version__ = "0.1.0"

_PLACES = {
    "artifacts": "CheckReport ComparisonReport ImportanceReport PruneReport PruningPlan",
    "artifacts.loaded_plan": "LoadedPlan",
    "artifacts.plans": "plan_cut",
    "checkpoint.write": "write_checkpoint",
    "choose.budgets.planner": "make_plan",
    "choose.budgets.settings": "PlanRequest",
    "choose.depths": "DepthOptions measure_depths",
    "compare.options": "CompareOptions",
    "compare.session:compare": "compare_models",
    "cut.gguf_surgery": "cut_gguf",
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
    "pipeline.road": "export_model write_models",
    "quantize.quantize": "quantize_file",
    "quantize.settings": "QuantizeSettings",
    "report.files": "write_reports",
    "score.options": "ScoreOptions",
    "score.scoring:score": "score_model",
}
"""By module what it holds; behind a colon, what it calls that."""
_HOMES = {name: home for home, names in _PLACES.items() for name in names.split()}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    home, _, other = _HOMES.get(name, "").partition(":")
    if not home:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"exporter.{home}"), other or name)


def __dir__() -> list[str]:
    return __all__
