"""What `depthcut score` is asked to do, and one model scored so."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from exporter.artifacts import ImportanceReport
from exporter.errors import OptionError
from exporter.models.loading.options import LOADING, SourceOptions, StreamOptions
from exporter.option_types import Lengths, Names, OutputPath
from exporter.options import (
    Options,
    Rule,
    argument,
    dataclass,
    excludes,
    flag,
    key_at,
    leaves,
    option,
    part,
    values_of,
)
from exporter.progress import Progress
from exporter.score.cluster.options import ClusterOptions
from exporter.score.options import ScoreOptions

if TYPE_CHECKING:
    from exporter.models.loading.model_source import LoadedModel

SERIES = "A series of scores"


@dataclass(frozen=True)
class Series(Options):
    """What is varied where a model is scored again and again."""

    checkpoints: bool = option(
        False,
        "Score the checkpoints of one training on the same text, into the folder -o. MODEL... "
        "are their folders, a folder that contains them, or a pattern in quotes.",
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


class _ScoresNothing(Rule):
    """Where the first is given, nothing is but the others."""

    def check(self, told: Any) -> None:
        """Raises an OptionError where it is broken."""
        kept = {key_at(type(told), name) for name in self.names}
        values = values_of(told) if self.broken(told) else {}
        for leaf in leaves(type(told)):
            if leaf.key not in kept and leaf.key in values and values[leaf.key] != leaf.default:
                words = flag(leaf.key), flag(key_at(type(told), self.names[0]))
                raise OptionError(self.message.format(*words), self.hint, [leaf.key])


@dataclass(frozen=True)
class ScoreCall(Options):
    """What `depthcut score` is asked to do."""

    models: tuple[str, ...] = argument("MODEL...")
    output: OutputPath | None = option(
        None,
        "The file, or for a series the folder.",
        "-o",
        "--output",
        usual="importance.json or importance",
    )
    compare: bool = option(
        False,
        "Score nothing, but compare importance.json files, given as MODEL.... For two files "
        "of one model, print how far the rankings agree; for more files, for checkpoints, or "
        "with --metric, write a report with plots.",
    )
    score: ScoreOptions = part(ScoreOptions())
    series: Series = part(Series())
    streaming: StreamOptions = part(StreamOptions())
    device_map: Literal["auto"] | None = option(
        None,
        "Distribute the model over GPUs, memory and disk with accelerate.",
        section=LOADING,
        rare=True,
    )
    load: SourceOptions = part(SourceOptions(), without=("dtype",))
    cluster: ClusterOptions | None = part(switch="address")

    rules = (
        _ScoresNothing(
            ("compare", "output", "models", "score.metrics"),
            lambda told: told.compare,
            "{0} is for scoring, but {1} scores nothing.",
            "Leave it out.",
        ),
        Rule(
            ("compare", "models"),
            lambda told: told.compare and len(told.models) < 2,
            "One file can't be compared.",
            "Name two or more with {0}.",
        ),
        Rule(
            ("series.checkpoints",),
            lambda told: len(told.models) > 1 and told.series == Series() and not told.compare,
            "Several models are named.",
            "Score one; if they are checkpoints of one training, add {0}.",
        ),
        excludes("device_map", "cluster", "one distributes one model, the other copies of it"),
        *(
            excludes("streaming.stream", other, "it reads safetensors a layer at a time")
            for other in ("device_map", "load.trust_remote_code", "load.allow_pickle", "cluster")
        ),
    )


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
