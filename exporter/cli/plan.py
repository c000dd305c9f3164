"""`depthcut plan`."""

from __future__ import annotations

from pathlib import Path

from exporter.artifacts import ImportanceReport, PruningPlan
from exporter.artifacts.servers import is_plain, serving_rows
from exporter.choose.budgets.settings import PlanRequest
from exporter.cli.command import command
from exporter.cli.console import ConsoleProgress
from exporter.cli.required_speedup import RequiredSpeedup, exit_code
from exporter.cli.results import print_artifact, print_serving
from exporter.models.llama_arithmetic import other_class
from exporter.options import Options, dataclass, only_with, part


@dataclass(frozen=True, kw_only=True)
class PlanCall(Options):
    """What `depthcut plan` is asked to do."""

    request: PlanRequest = part()
    required: RequiredSpeedup = part(RequiredSpeedup())
    rules = (
        only_with("required.require_speedup", "request.budget.target_speedup"),
        only_with(
            "required.require_speedup",
            "request.onnx",
            hint="Without {1} no speedup is measured.",
        ),
    )


def _print_servers(plan: PruningPlan, importance: Path) -> None:
    """Where the plan can be served; most runtimes hold gaps only in models that are Llamas."""
    if is_plain(plan.deletions):
        return  # everywhere
    architecture = ImportanceReport.read(importance).model.architecture
    print_serving(serving_rows(other_class(architecture), plan.deletions))


@command(PlanCall)
def plan(call: PlanCall, progress: ConsoleProgress) -> int:
    """Choose what to drop from an importance.json: by its scores, by a search, or for a budget.

    A number of sublayers drops the lowest scores, or what --search finds; --heal adds replacements.
    For any other budget the damage of cuts and replacements is measured. Budgets can be combined.
    After an interruption the same command resumes.
    """
    from exporter.choose.budgets.making import make_plan

    made = make_plan(call.request, progress)
    if not progress.as_json:
        _print_servers(made, call.request.importance)
    print_artifact(made, call.request.output, progress.as_json, "Drop " + made.describe())
    return exit_code(made) if call.required.require_speedup else 0
