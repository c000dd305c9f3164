"""How much worse a candidate may be, and how such limits are written."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from exporter.option_types import Amount, Share
from exporter.options import Options, dataclass, option

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

    max_slowdown: _Share | None = _limit("Such as 3%, of each shape's time.")
    min_speedup: _Factor | None = _limit("Such as 1.1, over the unpruned arm.", metavar="FACTOR")
    max_perplexity_increase: _Share | None = _limit("Share by which the perplexity may rise.")
    max_kl: _Nats | None = _limit("KL divergence from the unpruned arm.", metavar="NATS")
    min_top1_agreement: _AtMostOne | None = _limit(
        "Share of positions at which both arms think the same token the likeliest."
    )
    min_embedding_cosine: _AtMostOne | None = _limit("Encoders: with the unpruned arm.")
    max_task_drop: _Share | None = _limit("Points of a task's score: 1% is 0.01.")
    max_probe_drop: _Share | None = _limit("Points of a probe's right answers: 1% is 0.01.")
    max_size_increase: _Share | None = _limit("Of files and engines.")
    max_memory_increase: _Share | None = _limit("Of KV cache and device memory.")
    noise_floor: _Share = option(
        0.01,
        "Changes of time within it are noise, as are those within the measured one.",
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
