"""The figures of plans, searches and fits: how far a cut's answers are from the whole model's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, NamedTuple

from pydantic import Field

from exporter.artifacts.figures import Limit
from exporter.option_types import OpenShare, Share
from exporter.printable import percent, significant

Increase = Annotated[Share, Field(gt=0, allow_inf_nan=False)]
_MOST_LOG = 50.0


def _risen(log_increase: float) -> float:
    return math.expm1(min(log_increase, _MOST_LOG))


def _points(share: float) -> str:
    return f"{100 * share:+.1f} points"


@dataclass(frozen=True)
class PlanFigure:
    """A figure of one kind of answers; what it is of the whole model is ``unchanged``.

    ``sentence`` says it beside its limit, with ``{value}``, ``{by}``, ``{until}`` and ``{least}``;
    ``{several}`` are texts or images, and ``{fewest}`` says how many show the limit.
    """

    key: str
    name: str
    row_name: str
    written: Callable[[float], str]  # beside its name
    row: Callable[[float], str]  # in a table
    gained: Callable[[float], str]  # what healing took back, in a table
    unchanged: float = 0.0
    limit: Limit | None = None
    asked: str = ""  # what a plan calls its limit
    sentence: str = ""
    short: str = "{}"  # where it alone is said of a text
    elsewhere: str = ""  # of the other domain
    digits: str = ".1%"  # beside its limit
    is_log: bool = False  # of a factor, on whose rise the limit is
    is_share: bool = False  # of positions that stay as they are, and no mean
    is_minor: bool = False  # said only beside another one
    is_always_said: bool = False
    broken: float | None = None  # what it is where answers are no numbers; None: it is left out
    useless: float = math.nan  # with which nobody would ship a model
    useless_words: str = ""

    @property
    def higher_is_better(self) -> bool:
        """What can't be above the whole model's."""
        return self.unchanged > 0

    @property
    def flag(self) -> str:
        """The option with its limit."""
        return "" if self.limit is None else str(self.limit.look["names"][0])

    @property
    def worst(self) -> float:
        """What keeps no limit."""
        return -math.inf if self.higher_is_better else math.inf

    @property
    def worse_end(self) -> str:
        """The end of its 95 % interval that is further from the whole model's."""
        return f"{self.key}_{'low' if self.higher_is_better else 'high'}"

    @property
    def better_end(self) -> str:
        """The other end."""
        return f"{self.key}_{'high' if self.higher_is_better else 'low'}"

    def loss(self, value: float) -> float:
        """How far a value is from the whole model's."""
        return self.unchanged - value if self.higher_is_better else value - self.unchanged

    def used_up(self, value: float, limit: float) -> float:
        """The share of a limit that a value uses up."""
        return self.loss(value) / self.loss(math.log1p(limit) if self.is_log else limit)

    def held(self, value: float) -> float:
        """What of a value the limit is on."""
        return _risen(value) if self.is_log else value


class PlanKind(NamedTuple):
    """A kind of answers, with its figures; the first is the one that healing's gain is in."""

    figures: tuple[PlanFigure, ...]
    lost: str  # of what healing recovers a share
    gain_digits: int

    @property
    def limited(self) -> list[PlanFigure]:
        """Those that a limit can be on."""
        return [figure for figure in self.figures if figure.limit is not None]

    @property
    def usual(self) -> dict[str, float]:
        """The limits after healing where nothing is asked for, by their names."""
        limits = (figure.limit for figure in self.limited if figure.limit is not None)
        return {limit.name: limit.usual for limit in limits if limit.usual is not None}

    @property
    def main_figures(self) -> list[PlanFigure]:
        """Those that stand alone."""
        return [figure for figure in self.figures if not figure.is_minor]


_AGREEMENT = Limit(
    "top1_agreement", OpenShare,
    "Minimum of equal top-1 tokens: 0.95; the share of positions at which both models have the "
    "same, for classifiers of texts with the same likeliest class.",
    look={"names": ("--min-top1-agreement",)},
)  # fmt: skip

PLAN_KINDS = {
    "tokens": PlanKind(
        (
            PlanFigure(
                "log_perplexity_increase", "perplexity", "perplexity",
                lambda rise: f"{_risen(rise):+.1%}", lambda rise: f"{100 * _risen(rise):+.1f} %",
                "{:+.3f} nats".format,
                limit=Limit(
                    "perplexity_increase", Increase,
                    "Maximum increase of the perplexity: 5%; on tokens that the search does "
                    "not use. Without another budget, as much as this allows is dropped: for "
                    "speed if --at is given, otherwise for parameters.",
                    0.02,
                    {"names": ("--at-most",)},
                ),
                asked="max_perplexity_increase",
                sentence="the perplexity is {value} higher{by}{until}{allowed}",
                elsewhere=" (perplexity in the other domain {})",
                is_log=True, is_always_said=True, broken=math.inf,
                useless=math.log(2), useless_words="its perplexity is {factor:.1f} times as high",
            ),
            PlanFigure(
                "kl", "KL divergence", "KL, nats", "{:.3f} nats".format,
                lambda kl: significant(kl, 3), "{:+.3f} nats".format,
            ),
            PlanFigure(
                "top1_agreement", "same top-1 token", "same top-1", "{:.1%}".format, percent,
                _points, 1.0, _AGREEMENT, "min_top1_agreement",
                sentence="same top-1 token {value}{until}{least}", is_share=True,
                is_always_said=True,
            ),
        ),
        "log-perplexity", 3,
    ),
    "embeddings": PlanKind(
        (
            PlanFigure(
                "cosine", "mean cosine of the embeddings", "mean cosine of embeddings",
                "{:.3f}".format, "{:.4f}".format, "{:+.4f}".format, 1.0,
                Limit(
                    "embedding_cosine", OpenShare,
                    "Encoders: minimum cosine of embeddings: 0.98; the mean with the whole "
                    "model's.",
                    0.98,
                    {"names": ("--min-embedding-cosine",)},
                ),
                "min_embedding_cosine", sentence="the {name} is {value}{by}{until}{least}",
                short="cosine {}", elsewhere=" (in the other domain {})",
                digits=".3f", broken=-1.0, useless=0.8,
                useless_words="the mean cosine of the embeddings is {value:.3f}, less than {limit}",
            ),
            PlanFigure(
                "similarity_correlation", "correlation of similarities", "correlation of pairs",
                "{:.3f}".format, "{:.4f}".format, "{:+.4f}".format, 1.0,
                Limit(
                    "similarity", OpenShare,
                    "Encoders: minimum correlation of the similarities of pairs of texts in both "
                    "models, such as 0.98.",
                    look={"names": ("--min-similarity",), "config_only": True},
                ),
                "min_similarity", sentence="the {name} is {value}{by}{until}{least}",
                digits=".3f", is_minor=True,
            ),
        ),
        "cosine", 4,
    ),
    "classes": PlanKind(
        (
            PlanFigure(
                "kl", "KL divergence of the classes", "KL of classes, nats", "{:.3f} nats".format,
                lambda kl: significant(kl, 3), "{:+.4f} nats".format,
            ),
            PlanFigure(
                "top1_agreement", "same likeliest class", "same likeliest class", "{:.1%}".format,
                percent, _points, 1.0, _AGREEMENT._replace(usual=0.98),
                "min_top1_agreement",
                sentence="{value} of the {several} keep their likeliest class{by}{until}{least}"
                     "{fewest}",
                short="same likeliest class {}", is_share=True, is_always_said=True, useless=0.8,
                useless_words="{value:.0%} of the {several} keep their likeliest class, or of two "
                              "their order, less than {limit:.0%}",
            ),
        ),
        "divergence", 4,
    ),
}  # fmt: skip
"""By the kind of answers that a model is judged by; one whose first key others have comes last."""

LIMITED: dict[str, PlanFigure] = {}
"""Those that a limit can be on, by their keys."""
for _figure in (figure for kind in PLAN_KINDS.values() for figure in kind.limited):
    LIMITED.setdefault(_figure.key, _figure)


def kind_of(figures: Mapping[str, object], where: str = "") -> PlanKind:
    """Whose figures those of a plan are; ``where`` stands before their keys."""
    kinds = PLAN_KINDS.values()
    known = (kind for kind in kinds if f"{where}{kind.figures[0].key}" in figures)
    return next(known, PLAN_KINDS["classes"])
