"""`depthcut export`, `sweep` and `plan`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.artifacts import ComparisonReport, ImportanceReport, PruningPlan
from exporter.artifacts.servers import is_plain, other_class, serving_rows
from exporter.choose.budgets.budget import (
    DROPPING,
    USUAL_LIMITS,
    USUAL_REQUEST,
    asks_for_more_than_numbers,
)
from exporter.choose.budgets.settings import PlanRequest
from exporter.cli.asking import Step, offer
from exporter.cli.command import command
from exporter.cli.console import ConsoleProgress
from exporter.cli.results import print_comparison, print_result, print_serving, table_lines
from exporter.errors import DepthcutError, OptionError
from exporter.heal.options import NO_TEXT
from exporter.models.gguf_model_files import GGUF_SUFFIX
from exporter.models.loading.checked_folder import Dangers
from exporter.models.loading.sources import SourceOptions, encoder_decoder_config
from exporter.option_types import InputFile, OutputFolder
from exporter.options import Options, argument, dataclass, option, part, required
from exporter.pipeline.request import OF_TEXTS, QUICK, ExportRequest
from exporter.pipeline.sweep.schema import read_sweep
from exporter.report.sections.sweep import cells_grid, failure_lines, sweep_lead
from exporter.score.options import ClusterOptions

if TYPE_CHECKING:
    from exporter.pipeline.sweep.run import Runner


@dataclass(frozen=True, kw_only=True)
class SweepCall(Options):
    """What `depthcut sweep` is asked to do."""

    file: InputFile = argument("FILE.yaml")
    output: OutputFolder = required("Folder for all results.", "-o", "--output")
    dry_run: bool = option(False, "Check the file and list what would run; run nothing.")
    redo: bool = option(False, "Run every cell again, with all of its stages.")
    load: SourceOptions = part(SourceOptions(), without=("dtype", "revision"))
    cluster: ClusterOptions | None = part(None)


@command(SweepCall)
def sweep(call: SweepCall, progress: ConsoleProgress) -> int:
    """Run `depthcut export` for every model with every plan in every precision of a file.

    Stages that cells share run once. Finished cells whose settings have not changed are kept; the
    others run one after the other, each in its own process, or with --ray each on its own machine.
    If a cell fails, the table says so, the others still run, and the exit code is 2. The output
    folder holds sweep.json, sweep.md and sweep.html, and a folder for each cell.
    """
    from exporter.pipeline.sweep.run import look, run_sweep

    result, load = read_sweep(call.file), call.load
    dangers = Dangers(load.trust_remote_code, load.allow_pickle, load.allow_any_model_type)
    if call.dry_run:
        report = look(result, call.output, dangers=dangers, force=call.redo)
    else:
        report = run_sweep(
            result,
            call.output,
            runner=_runner(call.cluster, progress.verbosity),
            dangers=dangers,
            force=call.redo,
            progress=progress,
        )
    grid = cells_grid(report, brief=True)
    named = [[c.model, *row[1:]] for c, row in zip(report.cells, grid.rows, strict=True)]
    lines = [*table_lines(grid.header, named), *failure_lines(report), sweep_lead(report)]
    lines += [] if call.dry_run else [f"Report: {call.output / 'sweep.html'}"]
    print_result(report, progress.as_json, *lines)
    return 2 if report.of_status("failed") else 0


def _runner(cluster: ClusterOptions | None, verbosity: int) -> Runner:
    """What runs the cells: this machine, or those of a cluster."""
    from exporter.pipeline.sweep.job import run_in_children
    from exporter.pipeline.sweep.run import run_on_ray

    if cluster is None:
        return partial(run_in_children, verbosity=verbosity)
    return partial(run_on_ray, address=cluster.address, workers=cluster.workers)


_FASTEST_DTYPES = {"cpu": "float32", "cuda": "float16"}
"""What the fastest form is written in for each provider."""
_ROW_S = 20.0
"""For a measured row where nothing is said at all: an answer within a quarter of an hour."""
_CHANGING = (None, "auto", "fold", "distill")
"""Ways of healing that change kept weights, the usual one among them."""
_WEIGHTS = (*_CHANGING, "none")
"""Ways that put nothing in the branches' places, and none."""


@dataclass(frozen=True, kw_only=True)
class ExportCall(Options):
    """What `depthcut export` is asked to do."""

    request: ExportRequest = part()
    allow_damage: bool = option(
        False,
        "Go on even if the perplexity more than doubles; for encoders, if the mean cosine of the "
        "embeddings falls below 0.8; for classifiers, if fewer than 0.8 of the texts keep their "
        "class.",
        section=DROPPING,
        config_only=True,
    )
    quick: bool = option(
        False,
        "A first look: less text, no training; shorter measurements.",
    )

    def check(self) -> None:
        """Refuses what no export can be."""
        self.request.check()

    @classmethod
    def usual(cls, told: Mapping[str, Any]) -> Mapping[str, Any]:
        """Without a number, a goal or a plan the largest cut is taken that costs next to nothing.

        A cut is healed as the machine can afford; the paper's own way is not, nor is a model that
        is read a layer at a time.
        """
        quick, heal, has_goal = bool(told.get("quick")), told.get("heal"), _names_goal(told)
        if quick and heal is None and told.get("time") is not None:
            raise OptionError(
                "{0} trains nothing, so there is no training for {1} to limit.",
                "Leave {0} out for a training of that length, or {1} for a first look.",
                {"quick": "quick", "request.heal.time_s": "time"},
                code="options-clash",
            )
        if told.get("plan") is not None or told.get("stream"):
            return {}
        usual: dict[str, Any] = {} if has_goal else {"time_budget": _ROW_S, **_fastest_form(told)}
        usual |= _first_look(told) if quick else {}
        if quick and heal not in (None, "none") and "calibration" in usual:
            usual["heal_calibration"] = usual["calibration"]  # without minutes of sampled text
        if not has_goal and not asks_for_more_than_numbers(told):
            usual |= USUAL_LIMITS
        # TensorRT's graphs are not timed on ONNX Runtime.
        on_tensorrt = str(told.get("target")).startswith("tensorrt")
        if not has_goal and heal in _CHANGING and not on_tensorrt:
            usual["at"] = USUAL_REQUEST
        if told.get("search") == "one-shot":
            return usual
        if heal in _WEIGHTS:
            usual["search"] = "auto"
        if heal is None and quick:
            # Where a model has no weight that can be folded into, as BERT, maps take the places.
            return {**usual, "heal": "fold", "replacements": "linear", "check_text": NO_TEXT}
        return {**usual, "heal": "auto"}


def _first_look(items: Mapping[str, Any]) -> Mapping[str, Any]:
    """What --quick asks for of such a model; a broken one is told where it is opened."""
    names = ("revision", "trust_remote_code", "allow_pickle", "allow_any_model_type")
    reading = {name: items[name] for name in names if items.get(name)}
    with contextlib.suppress(DepthcutError):
        if encoder_decoder_config(str(items.get("source")), **reading) is not None:
            return {key: value for key, value in QUICK.items() if key not in OF_TEXTS}
    return QUICK


def _names_goal(items: Mapping[str, Any]) -> bool:
    """Whether more is asked for than the largest cut within limits on quality."""
    counts = tuple(f"drop_{kind}" for kind in ("attn", "cross", "mlp", "block", "joint"))
    others = ("keep_first", "parameters", "fits", "faster")
    return any(items.get(name) is not None for name in (*counts, *others))


def _fastest_form(items: Mapping[str, Any]) -> Mapping[str, Any]:
    """The target that this machine runs fastest, where its exporter is installed."""
    others = any(items.get(key) for key in ("exporter", "opset", "engine"))
    provider, dtype = items.get("provider") or "cpu", items.get("dtype") or "float32"
    if others or dtype != _FASTEST_DTYPES.get(provider):
        return {}
    if find_spec("onnxruntime_genai") is None:
        return {}
    return {"target": f"onnxruntime-{provider}"}


@command(ExportCall)
def export(call: ExportCall, progress: ConsoleProgress) -> None:
    """Score MODEL, drop its most redundant sublayers, export and compare both.

    MODEL is a Hugging Face folder, a hub id or a GGUF file. Without a number, a goal or a plan, the
    largest cut is taken that costs at most 2 % perplexity after healing (encoders: 0.98 mean cosine
    of the embeddings). The output folder holds the plan, both models and the report. Valid stages
    of an earlier run are reused.
    """
    from exporter import export_model, write_models

    request = replace(call.request, refuses_useless=not call.allow_damage)
    if request.compared:
        report = export_model(request, progress)
        print_comparison(report, request.out, progress.as_json)
        offer("What next?", [*_next_steps(request, report, progress.words)], progress)
    else:
        pruned = write_models(request, progress)
        before, after = pruned.before.parameters, pruned.after.parameters
        print_result(
            pruned,
            progress.as_json,
            f"{before / 1e6:,.2f} -> {after / 1e6:,.2f} million parameters, not compared yet: "
            "the same command does that without --no-measure.",
            f"Models: {request.out / 'baseline'} and {request.out / 'candidate'}",
        )


def _next_steps(
    request: ExportRequest, report: ComparisonReport, words: list[str]
) -> Iterator[Step]:
    """What can be done with cuts of a decoder."""
    from exporter.report.terminal import cut_lines

    accuracy, out = report.accuracy, request.out
    if accuracy is None or accuracy.compared != "tokens" or request.in_stacks:
        return
    for whole, cut, measured in cut_lines(report):
        yield f"talk to both: {measured}", ["chat", whole, cut]
    if not request.checkpoint:
        yield "write the cut as a checkpoint, for PyTorch and vLLM", [*words, "--checkpoint"]
    if request.source.endswith(GGUF_SUFFIX):
        files = ["-o", str(out / "cut.gguf"), "--plan", str(out / "plan.json")]
        yield "write the cut for llama.cpp, not healed", ["gguf", request.source, *files]


def _print_servers(plan: PruningPlan, importance: Path) -> None:
    """Where the plan can be served; most runtimes hold gaps only in models that are Llamas."""
    if is_plain(plan.deletions):
        return  # everywhere
    architecture = ImportanceReport.read(importance).model.architecture
    print_serving(serving_rows(other_class(architecture), plan.deletions))


@command(PlanRequest)
def plan(call: PlanRequest, progress: ConsoleProgress) -> None:
    """Choose what to drop from an importance.json: by its scores, by a search, or for a budget.

    A number of sublayers drops the lowest scores, or what --search finds; --heal adds replacements.
    For any other budget the damage of cuts and replacements is measured. Budgets can be combined.
    After an interruption the same command resumes.
    """
    from exporter import make_plan

    made = make_plan(call, progress)
    if not progress.as_json:
        _print_servers(made, call.importance)
    print_result(made, progress.as_json, "Drop " + made.describe(), call.output)
