"""What `depthcut export --stream` does in its own way: weights never come into memory together."""

from __future__ import annotations

from exporter.artifacts import ImportanceReport
from exporter.errors import UsageError
from exporter.models.loading.meta_model import MetaModel
from exporter.models.loading.model_source import LoadedModel
from exporter.pipeline.request import ExportRequest
from exporter.pipeline.run import Run
from exporter.processes import available_bytes
from exporter.score import score as score_model

_SESSION_SPARE = 1.2  # what a session takes, by its weights
_LEAVE_OUT = "leave one of the two out."


def refuse_unstreamable(request: ExportRequest) -> None:
    """Refuses what needs the whole model in memory."""
    if not request.stream:
        return
    budget, search = request.drops.budget, request.search.search
    for option, item in (
        ("--heal", request.heal is not None),
        ("a budget", budget is not None and not budget.only_counts),
        (f"--search {search}", search not in (None, "one-shot")),
        ("--exporter optimum", request.exporter == "optimum"),
    ):
        if item:
            raise UsageError(
                f"{option} needs the whole model in memory, and --stream never has it there.",
                "Make the plan on a machine that holds the model and give it with --plan, or "
                + _LEAVE_OUT,
                code="needs-whole-model",
            )


def refuse_large_comparison(run: Run) -> None:
    """Refuses before hours of work what would fail after them: running both models at once."""
    if not (run.request.stream and run.request.compared):
        return
    needed = int(2 * _SESSION_SPARE * _hollow(run.loaded).weights.nbytes())
    free = available_bytes()
    if free is not None and needed > free:
        raise UsageError(
            f"Comparing both models would take about {needed / 1e9:.3g} GB of memory, and "
            f"{free / 1e9:.3g} GB are free.",
            "Leave it out with --no-measure, and compare where there is memory: depthcut compare.",
            code="too-little-memory",
        )


def refuse_wide_check(run: Run) -> None:
    """Refuses before hours of work bfloat16 that can't be checked after them."""
    if not (run.request.stream and run.request.load.dtype == "bfloat16"):
        return
    needed, free = 2 * _hollow(run.loaded).weights.nbytes(), available_bytes()
    if free is not None and needed > free:
        raise UsageError(
            "ONNX Runtime has no bfloat16 on the CPU, so the check of the candidate holds its "
            f"weights in float32: {needed / 1e9:.3g} GB of memory, and {free / 1e9:.3g} GB are "
            "free.",
            "Say --dtype float16 or float32, whose weights stay on the disk.",
        )


def score(run: Run) -> ImportanceReport:
    """Measures how redundant each sublayer is, a layer's weights at a time."""
    return score_model(
        _hollow(run.choosing),
        run.request.score,
        stream_dir=run.request.stream_dir,
        progress=run.progress,
    )


def _hollow(loaded: LoadedModel) -> MetaModel:
    if not isinstance(loaded, MetaModel):
        raise UsageError("The model was loaded whole.", "Say --stream.")
    return loaded
