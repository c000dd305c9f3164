"""`depthcut compare`, `evaluate` and `generate`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from exporter.artifacts.store import locked
from exporter.cli.command import command
from exporter.cli.console import ConsoleProgress, echo
from exporter.cli.results import print_comparison, print_result
from exporter.compare.options import CompareOptions, RunOptions, TaskOptions
from exporter.errors import UsageError
from exporter.files import refuse_overwriting
from exporter.option_types import Arm, Count, InputPath, OutputFolder, OutputPath, Provider, Threads
from exporter.options import Options, Rule, argument, dataclass, option, part, required
from exporter.printable import Pieces
from graph_passes.files.kinds import HTML, TEXT, refuse_foreign


@dataclass(frozen=True, kw_only=True)
class CompareCall(Options):
    """What `depthcut compare` is asked to do."""

    baseline: Arm = argument("BASELINE")
    candidate: Arm = argument("CANDIDATE")
    output: OutputFolder = required("Folder for the report.", "-o", "--output")
    references: tuple[Arm, ...] = option(
        (),
        "Another model of any kind, timed in the same rounds without a verdict.",
        "--reference",
        metavar="ARM",
    )
    also: tuple[Arm, ...] = option(
        (),
        "Another form of the model, such as another cut, whole or quantised: timed in the same "
        "rounds and on the same text, in one table with both. Repeatable.",
        metavar="ARM",
    )
    floats: tuple[Arm, Arm] | None = option(
        None,
        "The float versions of BASELINE and CANDIDATE, if these are quantised: all four are "
        "compared.",
        "--float",
        metavar="BASELINE CANDIDATE",
    )
    onnx: tuple[OutputPath, OutputPath] | None = option(
        None,
        "The ONNX files that the two engines were built from, if they are not next to the engines.",
        "--engine-onnx",
        metavar="BASELINE CANDIDATE",
        rare=True,
    )
    compare: CompareOptions = part(CompareOptions())


@command(CompareCall)
def compare(call: CompareCall, progress: ConsoleProgress) -> None:
    """Compare CANDIDATE with BASELINE: latency, perplexity, agreement, size.

    Both are ONNX files or folders with one, engines or folders of them; or what another
    runtime runs: torch:DIR, torch-compile:DIR (Hugging Face folders), openvino:DIR (ONNX),
    llama.cpp:FILE (GGUF). Writes report.json, report.md and report.html.
    """
    from exporter import compare_models, write_reports
    from exporter.compare.kept import forget

    _refuse_places(call)
    with locked(call.output):  # A folder that can't be made fails now, not after the measurement.
        report = compare_models(
            call.baseline,
            call.candidate,
            call.compare,
            references=call.references,
            also=call.also,
            floats=call.floats,
            onnx=call.onnx,
            resume=call.output,
            progress=progress,
        )
        write_reports(report, call.output)
        forget(call.output)
    print_comparison(report, call.output, progress.as_json)


def _refuse_places(call: CompareCall) -> None:
    """Keeps reports out of a model's folder, and from taking other files' places."""
    from exporter.report.files import REPORTS

    for name, kind in zip(REPORTS, ("comparison_report", TEXT, HTML), strict=True):
        refuse_foreign(call.output / name, kind)
    for arm in (call.baseline, call.candidate, *call.references, *call.also, *(call.floats or ())):
        path = Path(arm.partition(":")[2] or arm)
        if path.exists() and call.output.exists() and call.output.samefile(path):
            raise UsageError(
                f"{call.output} is one of the models; inputs are never changed.",
                "Name another folder for the report.",
            )


@dataclass(frozen=True, kw_only=True)
class EvaluateCall(Options):
    """What `depthcut evaluate` is asked to do."""

    model: Arm = argument("MODEL")
    tasks: TaskOptions = part(TaskOptions())
    output: OutputPath | None = option(
        None, "File for the scores of each item, as JSON.", "-o", "--output"
    )
    run: RunOptions = part(RunOptions())
    rules = (
        Rule(
            ("tasks.tasks",),
            lambda told: not told.tasks.tasks,
            "There is no task to score.",
            "Name some by {0}.",
        ),
    )


@command(EvaluateCall)
def evaluate(call: EvaluateCall, progress: ConsoleProgress) -> None:
    """Score MODEL on tasks. To score two models on the same items, use compare.

    MODEL is an ONNX file with its tokenizer next to it, their folder, or an engine; or
    openvino:DIR, or a GGUF file in llama.cpp: llama.cpp:FILE.
    """
    from exporter.compare.tasks.choosing import evaluate_model
    from exporter.engines.runners.registry import named_backend

    if call.output is not None:
        refuse_overwriting(call.output, [named_backend(call.model)[1]], "evaluation_report")
    report = evaluate_model(
        call.model,
        call.tasks,
        provider=call.run.provider,
        threads=call.run.threads,
        progress=progress,
    )
    if call.output is not None:
        report.write(call.output)
    rows = [f"{s.task:<20} {s.metric:<10} {s.value:.4f}  {s.source}" for s in report.scores]
    print_result(report, progress.as_json, *rows)


@dataclass(frozen=True, kw_only=True)
class GenerateCall(Options):
    """What `depthcut generate` is asked to do."""

    model: Arm = argument("MODEL")
    prompt: str = argument("PROMPT")
    new_tokens: Count = option(64, "Maximum number of tokens to generate.", "-n", "--new-tokens")
    chat: bool = option(False, "Ask PROMPT as a user of a chat: in the tokenizer's chat template.")
    provider: Provider = option("cpu", "Where ONNX Runtime runs the graphs.")
    threads: Threads = option(
        None, "CPU threads; auto: the physical cores that the process may use.", usual="auto"
    )
    cache_length: Count | None = option(
        None, "Length of the cache, in tokens.", usual="prompt and new tokens", config_only=True
    )
    tokenizer: InputPath | None = option(
        None, "tokenizer.json or its folder.", usual="beside the model"
    )


@command(GenerateCall)
def generate(call: GenerateCall, progress: ConsoleProgress) -> None:
    """Continue PROMPT, greedily, with a model and the tokenizer next to it.

    MODEL is an ONNX file, an engine, or a folder with one of them or with an engine for prefill and
    one for decode; of several builds (-b1, -b2) the first runs. Or openvino:DIR, or a GGUF file in
    llama.cpp: llama.cpp:FILE.

    Control sequences for a terminal or a CI system are escaped in the printed text; --json has the
    text as it is.
    """
    from exporter.engines.decoding.conversation import text_model_of
    from exporter.engines.decoding.generate import generate as run
    from exporter.engines.decoding.generate import open_decoder, refuse_too_long
    from exporter.engines.runners.base import tell_notes

    texts = text_model_of(call.model, call.tokenizer)
    if call.chat:
        (prompt_ids,) = texts.encode_chats([call.prompt])
    else:
        prompt_ids = texts.encode(call.prompt)
    decoder = open_decoder(
        call.model,
        provider=call.provider,
        threads=call.threads,
        context=call.cache_length,
        progress=progress,
    )
    refuse_too_long(decoder, len(prompt_ids), call.new_tokens, texts.positions)
    pieces = Pieces()
    silent = progress.as_json
    stream = texts.stream(lambda piece: None if silent else click.echo(pieces.add(piece), nl=False))
    with decoder:
        tell_notes([decoder.capabilities], progress)
        done = run(
            decoder,
            prompt_ids,
            new_tokens=call.new_tokens,
            stop_ids=texts.stop_ids,
            on_token=stream.add,
        )
    if silent:
        text = texts.decode(done.token_ids)
        print_result({"text": text, **asdict(done)}, silent)
        return
    stream.finish(done.token_ids)
    echo()
    later = "" if done.per_token_ms is None else f", then {done.per_token_ms:.1f} ms a token"
    progress.say(f"{len(done.token_ids)} tokens; first after {done.first_token_ms:.0f} ms{later}")
