"""`depthcut export`."""

from __future__ import annotations

from exporter.artifacts import PruningPlan
from exporter.cli.command import command
from exporter.cli.console import ConsoleProgress
from exporter.cli.required_speedup import RequiredSpeedup, exit_code
from exporter.cli.results import print_comparison, print_models
from exporter.options import Options, dataclass, only_with, part
from exporter.pipeline.request import ExportRequest


@dataclass(frozen=True, kw_only=True)
class ExportCall(Options):
    """What `depthcut export` is asked to do."""

    request: ExportRequest = part()
    required: RequiredSpeedup = part(RequiredSpeedup(), rare=("require_speedup",))
    rules = (only_with("required.require_speedup", "request.drops.budget.target_speedup"),)


def _check(call: ExportCall) -> None:
    from exporter.pipeline.refusals import refuse_contradictions

    refuse_contradictions(call.request)


@command(ExportCall, check=_check)
def export(call: ExportCall, progress: ConsoleProgress) -> int:
    """Score MODEL, drop its most redundant sublayers, export both to ONNX and compare them.

    MODEL is a Hugging Face folder, a hub id or a GGUF file. The output folder then holds
    importance.json, plan.json, baseline/, candidate/, prune.json and the report; what options add
    to it stands in the README, under Export. What is still valid from an earlier run is reused.
    """
    from exporter.pipeline.road import export_model, write_models

    request = call.request
    if request.compared:
        print_comparison(export_model(request, progress), request.out, progress.as_json)
    else:
        print_models(write_models(request, progress), request.out, progress.as_json)
    if not call.required.require_speedup:
        return 0
    return exit_code(PruningPlan.read(request.out / "plan.json"))
