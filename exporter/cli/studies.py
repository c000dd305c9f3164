"""`depthcut depths` and `costs`."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

from exporter.artifacts import DepthCell, DepthsReport, ImportanceReport, PruningPlan
from exporter.choose.costs.table import CostTable, RequestShape, RequestShapeOption
from exporter.choose.depths import DepthOptions
from exporter.cli.asking import choose, run_words
from exporter.cli.command import command
from exporter.cli.console import ConsoleProgress, echo
from exporter.cli.results import print_result, print_study, table_lines
from exporter.compare.options import SPEED, RunOptions
from exporter.files import refuse_overwriting, sha256_bytes, sha256_file
from exporter.models.loading.model_source import LoadedModel
from exporter.models.loading.sources import SourceOptions
from exporter.models.tasks import Tokens
from exporter.models.texts.sources import DOCSTRINGS, PYDOC
from exporter.option_types import Arm, Duration, InputFile, OutputFile
from exporter.options import Options, argument, dataclass, option, part
from exporter.printable import significant
from exporter.score.options import SCORING, MetricName, ScoreOptions
from graph_passes.files.kinds import HTML, TEXT
from graph_passes.files.placing import working
from graph_passes.types import Replacement, SublayerKind

_SCORED_SAMPLES = 4


@dataclass(frozen=True, kw_only=True)
class DepthsCall(Options):
    """What `depthcut depths` is asked to do."""

    model: str = argument("MODEL")
    importance: InputFile | None = option(
        None,
        "The importance.json of MODEL.",
        usual="scored now, on Python's documentation",
    )
    output: OutputFile = option(
        Path("depths.json"),
        "File for the data; tables and a page are written next to it as .md and .html.",
        "-o",
        "--output",
    )
    metric: MetricName | None = option(
        None,
        "Which metric of IMPORTANCE to use, or to score with.",
        metavar="NAME",
        usual="its first, or cosine",
        section=SCORING,
    )
    options: DepthOptions = part(DepthOptions())
    load: SourceOptions = part(SourceOptions(), without=("dtype",))


def plan_file(output: Path) -> Path:
    """Where the plan of the recommended row is written."""
    return output.with_suffix(".plan.json")


def _scored(call: DepthsCall, loaded: LoadedModel, progress: ConsoleProgress) -> ImportanceReport:
    """A short scoring on a text that takes no time to make."""
    from exporter import score_model

    options = ScoreOptions(calibration=("pydoc",), samples=_SCORED_SAMPLES)
    if call.metric is not None:
        options = replace(options, metrics=(call.metric,))
    return score_model(loaded, options, progress=progress)


def _sha256(report: ImportanceReport) -> str:
    return sha256_bytes(report.to_json().encode())


@command(DepthsCall)
def depths(call: DepthsCall, progress: ConsoleProgress) -> None:
    """How much of MODEL may be dropped? A table, one row of it recommended.

    MODEL runs with attentions, MLPs or blocks left out, at a few numbers or at those of -n. The
    table lists how much faster each cut is by its sublayers' costs, and what it costs in perplexity
    and KL divergence, with and without healing by folded weights; the whole model and the
    recommended cut in int8 stand beside. The recommended cut is written as a plan, for
    `depthcut export --plan`. After an interruption the same command resumes.
    """
    result = _measured(call, progress)
    print_study(result, call.output, as_json=progress.as_json)
    if (best := result.recommended) is not None and not progress.as_json:
        words = shlex.join(["depthcut", *_judging(call, best)])
        echo(f"Plan of the recommended row: {plan_file(call.output)}; to judge it on other text:")
        echo(words)
    _offer_cuts(call, result, progress)


def _measured(call: DepthsCall, progress: ConsoleProgress) -> DepthsReport:
    """Writes the study and the recommended plan; the model is not kept in memory."""
    from exporter import load_model, measure_depths
    from exporter.report.files import study_files, write_study

    plan = plan_file(call.output)
    kinds = ("depths_report", TEXT, HTML, "pruning_plan")
    read = [Path(call.model), Path(call.options.text)]
    read += [] if call.importance is None else [call.importance]
    for path, kind in zip((*study_files(call.output), plan), kinds, strict=True):
        refuse_overwriting(path, read, kind)
    given = call.importance and ImportanceReport.read(call.importance).of_metric(call.metric)
    with working(call.output) as kept:
        with progress.task(f"load {call.model}"):
            loaded = load_model(call.model, **vars(call.load))
        Tokens.of(loaded.model)
        report = given or _scored(call, loaded, progress)
        scores = sha256_file(call.importance) if call.importance else _sha256(report)
        result = measure_depths(
            loaded,
            report,
            call.options,
            importance_sha256=scores,
            kept=kept,
            progress=progress,
        )
        write_study(result, call.output)
        if result.recommended is not None:
            _write_plan(result, result.recommended, plan)
    return result


def _write_plan(result: DepthsReport, cell: DepthCell, path: Path) -> None:
    """Writes what a row drops."""
    PruningPlan(
        deletions=cell.deletions,
        made_from={"model": result.model.sha256},
        chosen_on=[*result.calibration.texts, result.text],
    ).write(path)


def _judging(call: DepthsCall, cell: DepthCell) -> list[str]:
    """The command that exports a row's cut, and judges it on other text."""
    unseen = PYDOC if call.options.text == DOCSTRINGS else DOCSTRINGS
    words = ["export", call.model, "-o", "out", "--plan", str(plan_file(call.output))]
    words += ["--heal", "fold"] if cell.healed is not None else []
    return [*words, "--eval-text", unseen]


def _offer_cuts(call: DepthsCall, result: DepthsReport, progress: ConsoleProgress) -> None:
    """Exports the row that somebody at a terminal picks."""
    from exporter.report.sections.depths import cut_line

    cells = [cell for cell in result.cells if cell.damage is not None]
    number = choose("Which cut is to be exported?", [*map(cut_line, cells)], progress)
    if number is not None:
        _write_plan(result, cells[number], plan_file(call.output))
        run_words(_judging(call, cells[number]))


@dataclass(frozen=True, kw_only=True)
class CostsCall(Options):
    """What `depthcut costs` is asked to do."""

    model: Arm = argument("MODEL")
    output: OutputFile = option(Path("costs.json"), "The table.", "-o", "--output")
    at: RequestShapeOption = option(
        RequestShape(),
        "The request: one prefill of the prompt, then a decode step for each new token.",
    )
    run: RunOptions = part(RunOptions())
    time_budget_s: Duration | None = option(
        None,
        "Time variants too: at most so many seconds each; it ends earlier if the cost is known.",
        "--time-budget",
        usual="none is timed",
        section=SPEED,
    )


@command(CostsCall)
def costs(call: CostsCall, progress: ConsoleProgress) -> None:
    """Foretell how much of a request's time each attention and MLP of MODEL takes.

    MODEL is an ONNX file or a folder with one; torch:DIR, a Hugging Face folder that PyTorch
    runs; openvino:DIR; or an engine beside its ONNX file. It is run at a few lengths, and the
    times are shared out by what each sublayer multiplies and reads. With --time-budget variants of
    it, each with half of the sublayers of one kind and size cut, are timed in turns with the whole
    one; they are used where the saving stands out of the noise.
    """
    from exporter.choose.costs.measuring import CostSettings, Effort, measure_costs
    from exporter.compare.kinds import ArmName

    refuse_overwriting(call.output, [ArmName.of(call.model).path], "cost_table")
    with working(call.output):
        table = measure_costs(
            call.model,
            CostSettings(
                call.at,
                call.run.threads,
                variants=None if call.time_budget_s is None else Effort(call.time_budget_s),
            ),
            provider=call.run.provider,
            progress=progress,
        )
        table.write(call.output)
    words = f"A request ({table.at}) takes {table.baseline_ms:.4g} ms. Cutting a sublayer saves, in"
    print_result(table, progress.as_json, f"{words} ms:", *table_lines(*_saved(table)), call.output)


def _saved(table: CostTable) -> tuple[list[str], list[list[str]]]:
    """The header, and a row for all sublayers that cost the same."""
    groups: dict[tuple[SublayerKind, tuple[str, ...]], list[str]] = {}
    hows: tuple[Replacement, ...] = ("none", "bias", "linear")
    for one in table.sublayers:
        ms = (significant(one.saved_ms[how], 3) if how in one.saved_ms else "-" for how in hows)
        groups.setdefault((one.kind, tuple(ms)), []).append(str(one.layer))
    rows = [[kind, ",".join(layers), *ms] for (kind, ms), layers in groups.items()]
    return ["sublayer", "layers", "alone", *hows[1:]], rows
