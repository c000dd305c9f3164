"""`depthcut score`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from exporter.artifacts import ImportanceReport
from exporter.cli.command import command
from exporter.cli.console import ConsoleProgress
from exporter.cli.results import print_artifact
from exporter.files import refuse_overwriting
from exporter.models.loading.options import LOADING, SourceOptions, StreamOptions
from exporter.option_types import Lengths, Names, OutputPath
from exporter.options import Options, Rule, alone, argument, dataclass, excludes, option, part
from exporter.progress import Progress
from exporter.report.words import significant
from exporter.score.cluster.options import ClusterOptions
from exporter.score.options import ScoreOptions
from graph_passes.files.placing import working

if TYPE_CHECKING:
    from exporter.models.loading.model_source import LoadedModel

SERIES = "A series of scores"


@dataclass(frozen=True)
class Series(Options):
    """What is varied where a model is scored again and again."""

    checkpoints: bool = option(
        False,
        "MODEL... are checkpoints of one training: their folders, a folder that holds them, or a "
        "pattern in quotes. Each is scored on the same text, into the folder -o.",
        section=SERIES,
    )
    revisions: Names = option(
        (), "Score these revisions of a hub model, as checkpoints of its training.", section=SERIES
    )
    vary_calibration: tuple[str, ...] = option(
        (),
        "Score MODEL on this text and on others, into the folder -o. Repeatable.",
        metavar="SOURCE",
        section=SERIES,
    )
    vary_samples: Lengths = option(
        (), "Score MODEL on each of these numbers of samples.", section=SERIES
    )


@dataclass(frozen=True)
class ScoreCall(Options):
    """What `depthcut score` is asked to do."""

    models: tuple[str, ...] = argument("MODEL...")
    output: OutputPath | None = option(
        None,
        "The file; of a series, the folder.",
        "-o",
        "--output",
        usual="importance.json; importance",
    )
    compare: bool = option(
        False,
        "Score nothing: MODEL... are importance.json. Tell how far rankings of two of one model "
        "agree; of more files, of checkpoints or by --metric write a report with plots.",
    )
    score: ScoreOptions = part(ScoreOptions())
    series: Series = part(Series())
    streaming: StreamOptions = part(StreamOptions())
    device_map: Literal["auto"] | None = option(
        None,
        "Spread the model over GPUs, memory and disk by accelerate.",
        section=LOADING,
        rare=True,
    )
    load: SourceOptions = part(SourceOptions(), without=("dtype",))
    cluster: ClusterOptions | None = part(switch="address")

    rules = (
        alone(
            "compare",
            "output",
            "models",
            "score.metrics",
            message="{0} is for scoring, and {1} scores nothing.",
        ),
        Rule(
            ("compare", "models"),
            lambda told: told.compare and len(told.models) < 2,
            "One file is held against nothing.",
            "Name two or more with {0}.",
        ),
        Rule(
            ("series.checkpoints",),
            lambda told: len(told.models) > 1 and told.series == Series() and not told.compare,
            "Several models are named.",
            "Score one; or, where they are checkpoints of one training, say {0}.",
        ),
        excludes("device_map", "cluster", "one spreads one model, the other copies of it"),
        *(
            excludes("streaming.stream", other, "it reads safetensors a layer at a time")
            for other in ("device_map", "load.trust_remote_code", "load.allow_pickle", "cluster")
        ),
    )


@command(ScoreCall)
def score(call: ScoreCall, progress: ConsoleProgress) -> None:
    """Measure how redundant each attention, MLP and block of MODEL is.

    MODEL is a Hugging Face folder, a hub id or a GGUF file. Lower scores are more redundant,
    whatever the metric. Several MODELs are the checkpoints of one training: --checkpoints.
    """
    if call.compare:
        from exporter.cli.score_comparison import compare

        compare(call, _file(call.output), progress)
    elif call.series != Series():
        from exporter.cli.score_series import score_series

        score_series(call, call.output or Path("importance"), progress)
    else:
        _score(call, _file(call.output) or Path("importance.json"), progress)


def _file(output: Path | None) -> Path | None:
    """Refuses a folder where a file is to be written, before anything is scored."""
    if output is not None and output.is_dir():
        raise click.BadParameter(f"{output} is a directory.", param_hint="-o")
    return output


def _score(call: ScoreCall, output: Path, progress: ConsoleProgress) -> None:
    model = call.models[0]
    refuse_overwriting(output, map(Path, filter(None, (model, call.score.calibration))))
    with working(output):
        report = scored(model, call, progress)
        report.write(output)
    lowest = sorted((s for s in report.scores if s.kind != "block"), key=lambda s: s.score)[:5]
    told = ", ".join(f"{s.kind} {s.layer} ({significant(s.score, 3)})" for s in lowest)
    by = f" by {report.metric}" if report.further else ""
    print_artifact(report, output, progress.as_json, f"Most redundant{by}: {told}")


def scored(
    model: str,
    call: ScoreCall,
    progress: Progress,
    *,
    load: Callable[[], LoadedModel] | None = None,
) -> ImportanceReport:
    """Loads and scores one model, whichever way it runs.

    Args:
        model: A folder, a hub id or a GGUF file.
        call: What is asked for.
        progress: Told what goes on.
        load: Gives the model where it is scored whole in this process; None: :func:`loaded_model`.
    """
    from exporter.score import score as score_model

    if call.streaming.stream:
        return _streamed(model, call, progress)
    if call.cluster is not None:
        return _on_cluster(model, call, call.cluster, progress)
    loaded = loaded_model(model, call, progress) if load is None else load()
    return score_model(loaded, call.score, progress=progress)


def loaded_model(model: str, call: ScoreCall, progress: Progress) -> LoadedModel:
    """Loads a model as it is asked for."""
    from exporter.models.loading.model_source import load_model

    with progress.task(f"load {model}"):
        return load_model(model, **vars(call.load), device_map=call.device_map)


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
