"""How much worse a candidate may be, how such limits are written, and which figures they are on."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from exporter.artifacts import Accuracy, Arm, ComparisonReport, Quantity
from exporter.option_types import Amount, Share
from exporter.options import Options, dataclass, option
from exporter.report.words import short_shape

_Share = Annotated[Share, Field(ge=0, allow_inf_nan=False)]
_AtMostOne = Annotated[Share, Field(ge=0, le=1)]
_Factor = Annotated[Amount, Field(gt=0, allow_inf_nan=False)]
_Nats = Annotated[Amount, Field(ge=0, allow_inf_nan=False)]


def _limit(words: str, **look: Any) -> Any:
    return option(None, words, section="Limits", **look)


@dataclass(frozen=True)
class Limits(Options):
    """What is checked: each limit that isn't None.

    Attributes:
        min_speedup: Factor by which the candidate must be faster than its own unpruned arm.
        max_kl: In nats per position.
        max_task_drop: A metric of which less is better may grow by as much.
        noise_floor: Where the session measured none of its own; the larger of both counts.
    """

    max_slowdown: _Share | None = _limit("Limit for each shape's time, such as 3%.")
    min_speedup: _Factor | None = _limit(
        "Minimum speedup over the unpruned model, such as 1.1.", metavar="FACTOR"
    )
    max_perplexity_increase: _Share | None = _limit("Limit for the rise of the perplexity.")
    max_kl: _Nats | None = _limit(
        "Limit for the KL divergence from the unpruned model.", metavar="NATS"
    )
    min_top1_agreement: _AtMostOne | None = _limit(
        "Minimum share of positions at which both models have the same top-1 token."
    )
    min_embedding_cosine: _AtMostOne | None = _limit(
        "Encoders: minimum cosine with the unpruned model's embeddings."
    )
    min_rank_agreement: _AtMostOne | None = _limit(
        "Encoders: minimum correlation (Spearman) of the similarities of pairs of texts with those "
        "in the unpruned model.",
        rare=True,
    )
    max_task_drop: _Share | None = _limit(
        "Limit for the drop of a task's score: 1% is 0.01.",
        brief="Limit for the drop of a task's score",
    )
    max_probe_drop: _Share | None = _limit("Limit for the drop of a probe's accuracy: 1% is 0.01.")
    max_size_increase: _Share | None = _limit("Limit for the size of files and engines.")
    max_memory_increase: _Share | None = _limit("Limit for KV cache and device memory.")
    max_node_increase: _Share | None = _limit("Limit for the graph's nodes: 0%.", rare=True)
    max_layer_increase: _Share | None = _limit("Limit for an engine's layers.", rare=True)
    max_scratch_increase: _Share | None = _limit("Limit for an engine's scratch memory.", rare=True)
    noise_floor: _Share = option(
        0.01,
        "Smaller changes of time count as noise; so do those within the measured noise.",
        usual="1%",
        section="Baselines and verdicts",
    )

    @property
    def empty(self) -> bool:
        """Whether nothing is limited."""
        return self == Limits(noise_floor=self.noise_floor)


AGAINST_BASELINE = Limits(
    max_slowdown=0.03,
    max_perplexity_increase=0.01,
    max_size_increase=0.01,
    max_memory_increase=0.01,
)
"""What is checked against an earlier report where the caller names nothing."""

Figure = tuple[Quantity, str]
"""A quantity, and the shape, task or file that it is of."""

WITH_ARM, FROM_ARM = "with the unpruned arm", "from the unpruned arm"

LIMIT_ON: dict[Quantity, str] = {
    "time": "max_slowdown",
    "speedup": "min_speedup",
    "perplexity": "max_perplexity_increase",
    "kl_divergence": "max_kl",
    "top1_agreement": "min_top1_agreement",
    "embedding_cosine": "min_embedding_cosine",
    "rank_agreement": "min_rank_agreement",
    "task": "max_task_drop",
    "probe": "max_probe_drop",
    "size": "max_size_increase",
    "memory": "max_memory_increase",
    "nodes": "max_node_increase",
    "engine_layers": "max_layer_increase",
    "scratch_bytes": "max_scratch_increase",
}


def byte_counts(arm: Arm) -> dict[Figure, int]:
    """Files, engines and memory of an arm, those that it has; of engines the largest."""
    counts: dict[Figure, int | None] = {
        ("size", "files"): arm.file_bytes,
        ("size", "engines"): max((engine.engine_bytes for engine in arm.engines), default=None),
        ("memory", "KV cache per token"): arm.kv_cache_bytes_per_token,
        ("memory", "device memory"): arm.device_memory_bytes,
    }
    return {figure: count for figure, count in counts.items() if count}


def figures(report: ComparisonReport, arm: Arm) -> list[Figure]:
    """All that a report tells of one of its arms and that a limit can be on."""
    shapes = [short_shape(row) for row in report.latency]
    timed: list[Quantity] = ["time", "speedup"]
    times = [(quantity, shape) for shape in shapes for quantity in timed]
    quality = [] if report.accuracy is None else _quality_figures(report.accuracy)
    return [*times, *quality, *byte_counts(arm), *_counted(arm)]


def _counted(arm: Arm) -> list[Figure]:
    return [(name, "candidate") for name in arm.counted if name in LIMIT_ON]


def _quality_figures(accuracy: Accuracy) -> list[Figure]:
    texts = accuracy.embeddings
    single: dict[Figure, object] = {
        ("perplexity", "evaluation text"): accuracy.perplexity,
        ("kl_divergence", FROM_ARM): accuracy.kl_divergence,
        ("top1_agreement", WITH_ARM): accuracy.top1_agreement,
        ("embedding_cosine", WITH_ARM): None if texts is None else texts.cosine,
        ("rank_agreement", WITH_ARM): None if texts is None else texts.rank_agreement,
    }
    return [
        *(figure for figure, value in single.items() if value is not None),
        *(("task", f"{one.task}, {one.metric}") for one in accuracy.tasks),
        # A limit in points is none for a log-probability.
        *(
            ("probe", f"{one.task}, {one.metric}")
            for one in accuracy.probes
            if one.metric != "log_prob"
        ),
    ]
