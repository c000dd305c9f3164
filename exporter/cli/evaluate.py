"""`depthcut evaluate`."""

from __future__ import annotations

from exporter.cli.command import command
from exporter.cli.console import ConsoleProgress, echo, echo_json
from exporter.compare.options import DeviceOption, RunOptions, TaskOptions
from exporter.files import refuse_overwriting
from exporter.option_types import Arm, OutputPath
from exporter.options import Options, Rule, argument, dataclass, option, part


@dataclass(frozen=True, kw_only=True)
class EvaluateCall(Options):
    """What `depthcut evaluate` is asked to do."""

    model: Arm = argument("MODEL")
    tasks: TaskOptions = part(TaskOptions())
    output: OutputPath | None = option(
        None, "File for the scores of each item, as JSON.", "-o", "--output"
    )
    run: RunOptions = part(RunOptions())
    gpu: DeviceOption = part(DeviceOption())
    rules = (
        Rule(
            ("tasks.tasks", "tasks.probes"),
            lambda told: not (told.tasks.tasks or told.tasks.probes),
            "Neither a task nor a probe is given.",
            "Give {0} or {1}.",
        ),
    )


@command(EvaluateCall)
def evaluate(call: EvaluateCall, progress: ConsoleProgress) -> None:
    """Score MODEL on tasks and probes. To score two models on the same items, use compare.

    MODEL is an ONNX file with its tokenizer next to it, their folder, or an engine; or
    openvino:DIR, or a GGUF file in llama.cpp: llama.cpp:FILE.
    """
    from exporter.compare.tasks.evaluation import evaluate_model
    from exporter.engines.runners.registry import named_backend

    if call.output is not None:
        refuse_overwriting(call.output, [named_backend(call.model)[1]], "evaluation_report")
    call.gpu.use()
    report = evaluate_model(
        call.model,
        call.tasks,
        provider=call.run.provider,
        threads=call.run.threads,
        progress=progress,
    )
    if call.output is not None:
        report.write(call.output)
    if progress.as_json:
        echo_json(report.to_json())
        return
    for score in report.scores:
        echo(f"{score.task:<20} {score.metric:<10} {score.value:.4f}  {score.source}")
