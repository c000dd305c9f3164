"""`depthcut score`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from exporter.artifacts import ImportanceReport
from exporter.cli.command import command
from exporter.cli.console import ConsoleProgress
from exporter.cli.results import print_result, print_study
from exporter.errors import UsageError
from exporter.files import refuse_overwriting
from exporter.models.loading.sources import LOADING, SourceOptions, StreamOptions
from exporter.option_types import OutputFile
from exporter.options import (
    Options,
    Rule,
    argument,
    dataclass,
    excludes,
    is_given,
    leaves,
    option,
    part,
)
from exporter.printable import significant
from exporter.progress import Progress
from exporter.score.options import ClusterOptions, ScoreOptions
from graph_passes.files.placing import working

_PARTS = {"score": ScoreOptions, "streaming": StreamOptions, "load": SourceOptions}
_OF_SCORING = (
    *("device_map", "cluster"),
    *(
        f"{name}.{leaf.path[0]}"
        for name, schema in _PARTS.items()
        for leaf in leaves(schema)
        if leaf.key not in ("metric", "dtype")
    ),
)


@dataclass(frozen=True)
class ScoreCall(Options):
    """What `depthcut score` is asked to do."""

    models: tuple[str, ...] = argument("MODEL...")
    output: OutputFile | None = option(
        None,
        "The file.",
        "-o",
        "--output",
        usual="importance.json",
    )
    compare: bool = option(
        False,
        "Score nothing, but print how far the rankings in importance.json files, given as "
        "MODEL..., agree. -o also writes them and the scores as JSON, Markdown and a page.",
    )
    score: ScoreOptions = part(ScoreOptions())
    streaming: StreamOptions = part(StreamOptions())
    device_map: Literal["auto"] | None = option(
        None,
        "Distribute the model over GPUs, memory and disk with accelerate.",
        section=LOADING,
        rare=True,
    )
    load: SourceOptions = part(SourceOptions(), without=("dtype",))
    cluster: ClusterOptions | None = part(None)

    rules = (
        Rule(
            ("compare", "models"),
            lambda told: told.compare and len(told.models) < 2,
            "One file can't be compared.",
            "Name two or more with {0}.",
        ),
        Rule(
            ("compare",),
            lambda told: len(told.models) > 1 and not told.compare,
            "Several models are named.",
            "Score each by itself, and compare the files with {0}.",
        ),
        *(excludes("compare", name, "a comparison scores nothing") for name in _OF_SCORING),
        excludes("device_map", "cluster", "one distributes one model, the other copies of it"),
        *(
            excludes("streaming.stream", other, "it reads safetensors a layer at a time")
            for other in ("device_map", "load.trust_remote_code", "load.allow_pickle", "cluster")
        ),
    )


def scored(model: str, call: ScoreCall, progress: Progress) -> ImportanceReport:
    """Loads and scores one model, whichever way it runs."""
    from exporter import load_model, score_model

    if call.streaming.stream:
        return _streamed(model, call, progress)
    if call.cluster is not None:
        return _on_cluster(model, call, call.cluster, progress)
    with progress.task(f"load {model}"):
        loaded = load_model(model, **vars(call.load), device_map=call.device_map)
    return score_model(loaded, call.score, progress=progress)


def _streamed(model: str, call: ScoreCall, progress: Progress) -> ImportanceReport:
    from exporter.models.loading.meta_model import load_meta
    from exporter.score.scoring import refuse_unstreamable, score

    refuse_unstreamable(call.score)
    with progress.task(f"open {model}"):
        meta = load_meta(
            model,
            dtype=call.load.dtype,
            revision=call.load.revision,
            allow_any_model_type=call.load.allow_any_model_type,
        )
    folder = call.streaming.stream_dir
    return score(meta, call.score, stream_dir=folder, progress=progress)


def _on_cluster(
    model: str, call: ScoreCall, cluster: ClusterOptions, progress: Progress
) -> ImportanceReport:
    from exporter.score.cluster.pool import open_pool
    from exporter.score.cluster.scoring import score_on_cluster

    with open_pool(cluster.address, workers=cluster.workers, progress=progress) as pool:
        return score_on_cluster(model, pool, call.score, load=vars(call.load), progress=progress)


@command(ScoreCall)
def score(call: ScoreCall, progress: ConsoleProgress) -> None:
    """Measure how redundant each attention, MLP and block of MODEL is.

    MODEL is a Hugging Face folder, a hub id or a GGUF file. Sublayers with lower
    scores are more redundant, whatever the metric. With --compare, MODEL... are importance.json
    files: of one model by other metrics or on other texts, or of checkpoints of one training.
    """
    if call.compare:
        _compare(call, progress)
    else:
        _score(call, call.output or Path("importance.json"), progress)


def _score(call: ScoreCall, output: Path, progress: ConsoleProgress) -> None:
    model = call.models[0]
    inputs = map(Path, (model, *call.score.calibration))
    refuse_overwriting(output, inputs, "importance_report")
    with working(output):
        report = scored(model, call, progress)
        report.write(output)
    lowest = sorted((s for s in report.scores if s.kind != "block"), key=lambda s: s.score)[:5]
    text = ", ".join(f"{s.kind} {s.layer} ({significant(s.score, 3)})" for s in lowest)
    by = f" by {report.metric}" if report.further else ""
    print_result(report, progress.as_json, f"Most redundant{by}: {text}", output)


def _compare(call: ScoreCall, progress: ConsoleProgress) -> None:
    """Compares score files, and writes that where a file is named for it."""
    from exporter.report.files import study_files, write_study
    from exporter.score.comparison import compare_files

    files, output = list(map(Path, call.models)), call.output
    # Cosine, the default, may be asked for on the command line; --show-config writes it always.
    source = click.get_current_context().get_parameter_source("metric")
    on_line = source is click.core.ParameterSource.COMMANDLINE
    metrics = call.score.metrics if on_line or is_given(call.score, "metrics") else ()
    if len(metrics) > 1:
        raise UsageError("One metric can be chosen of files.", "Give --metric once.")
    for path in study_files(output) if output else ():
        refuse_overwriting(path, files)
    comparison = compare_files(files, metrics[0] if metrics else None)
    if output:
        write_study(comparison, output)
    print_study(comparison, output, as_json=progress.as_json)
