"""`depthcut costs`."""

from __future__ import annotations

from pathlib import Path

from exporter.choose.costs.request_shape import RequestShape, RequestShapeOption
from exporter.choose.costs.table import CostTable
from exporter.cli.command import command
from exporter.cli.console import ConsoleProgress, echo, echo_json
from exporter.cli.results import print_rows
from exporter.compare.options import SPEED, DeviceOption, RunOptions
from exporter.option_types import Arm, Count, Duration, Engine, OutputFile
from exporter.options import Options, Rule, argument, dataclass, option, part
from exporter.report.words import significant
from graph_passes.files.placing import working
from graph_passes.types import Replacement


@dataclass(frozen=True, kw_only=True)
class CostsCall(Options):
    """What `depthcut costs` is asked to do."""

    model: Arm = argument("MODEL")
    output: OutputFile = option(Path("costs.json"), "The table.", "-o", "--output")
    at: RequestShapeOption = option(
        RequestShape(),
        "The request: one prefill of the prompt, then a decode step for each new token.",
    )
    replacements: tuple[Replacement, ...] = option(
        ("none", "bias", "linear"),
        "Replacements to measure; cutting without any is always measured. Repeatable.",
        "--replacement",
    )
    rank: Count | None = option(None, "Rank of linear maps, stored as two factors.", usual="full")
    engine: Engine | None = option(
        None, "Build engines of the graph and its variants, and time them on the GPU."
    )
    run: RunOptions = part(RunOptions())
    gpu: DeviceOption = part(DeviceOption())
    time_budget_s: Duration = option(
        60.0,
        "Maximum time to measure one variant, in seconds; it ends earlier if the cost is known.",
        "--time-budget",
        section=SPEED,
    )
    rules = (
        Rule(
            ("rank", "replacements"),
            lambda told: told.rank is not None and "linear" not in told.replacements,
            "{0} is for linear maps.",
            "Add {1} linear.",
        ),
    )


@command(CostsCall)
def costs(call: CostsCall, progress: ConsoleProgress) -> None:
    """Measure how much of a request's time each attention and MLP of MODEL takes.

    MODEL is an ONNX file or a folder with one; torch:DIR, a Hugging Face folder that PyTorch
    runs; openvino:DIR, or llama.cpp:FILE, a GGUF file. Variants of it, each with half of the
    sublayers of one kind and shape cut, are timed in turns with the whole one. Measurements that
    are already in the output file are kept.
    """
    from exporter.choose.costs.measuring import CostSettings, measure_costs
    from exporter.choose.costs.timing import Effort

    call.gpu.use()
    with working(call.output):
        table = measure_costs(
            call.model,
            CostSettings(
                call.at,
                call.run.threads,
                call.replacements,
                effort=Effort(seconds=call.time_budget_s),
                kept=call.output,
            ),
            provider=call.run.provider,
            engine=call.engine,
            rank=call.rank,
            progress=progress,
        )
    if progress.as_json:
        echo_json(table.to_json())
        return
    echo(
        f"A request ({table.at}) takes {table.baseline_ms:.4g} ms. Cutting a sublayer saves, in ms:"
    )
    print_rows(*_saved(table))
    echo(call.output)


def _saved(table: CostTable) -> tuple[list[str], list[list[str]]]:
    """The header, and a row for each group of sublayers."""
    hows = list(dict.fromkeys(t.replacement for group in table.groups for t in group.trials))
    rows = []
    for group in table.groups:
        first = group.members[0]
        layers = ",".join(str(member.layer) for member in group.members)
        found = [group.each_ms(how) for how in hows]
        told = [
            "-" if each is None else f"{significant(each[0], 3)} ± {significant(each[1], 1)}"
            for each in found
        ]
        rows.append([first.kind, layers, *told])
    return ["sublayer", "layers", *("alone" if how == "none" else how for how in hows)], rows
