"""The figures that a cut is judged by: a row has all that limits, reports and CI need of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, Field

from exporter.option_types import Amount, Share
from exporter.options import Options, dataclass, option
from exporter.printable import counted, milliseconds, percent, relative_change, significant

if TYPE_CHECKING:
    from exporter.artifacts.accuracy import Accuracy, Compared, Interval
    from exporter.artifacts.comparison import Arm

Scale = Literal["ratio", "difference"]
"""Whether a value is a factor, of which 1 is no change, or an amount, of which 0 is none."""
NotNegative = Annotated[Share, Field(ge=0, allow_inf_nan=False)]
_Part = Annotated[Share, Field(ge=0, le=1)]
_Factor = Annotated[Amount, Field(gt=0, allow_inf_nan=False)]
_Nats = Annotated[Amount, Field(ge=0, allow_inf_nan=False)]


class AnswerWords(NamedTuple):
    """What a kind of answers is called."""

    same: str  # what both arms have in common where they agree
    counted: str  # what the number of an evaluation text's tokens counts
    compared: str


ANSWERS: Mapping[Compared, AnswerWords] = {
    "tokens": AnswerWords("top-1 token", "tokens", "tokens"),
    "classes": AnswerWords("top-1 class", "answers", "answers"),
    "order": AnswerWords("order of two texts", *("comparisons of two texts",) * 2),
    "images": AnswerWords("top-1 class", "images", "answers"),
    "embeddings": AnswerWords("embedding", "tokens", "embeddings"),
}


class Limit(NamedTuple):
    """An option; ``look`` is how it is shown."""

    name: str
    type: Any
    words: str
    usual: float | None = None  # against an earlier report, where the caller names none
    look: Mapping[str, Any] = {}


def options_of(limits: Iterable[Limit], section: str) -> Any:
    """A class of options with a field for each limit, None where it isn't set."""
    fields: dict[str, Any] = {"__annotations__": {}}
    for limit in limits:
        look = {"section": section, **limit.look}
        fields[limit.name] = option(None, limit.words, *look.pop("names", ()), **look)
        fields["__annotations__"][limit.name] = limit.type | None
    return dataclass(frozen=True)(type("Limited", (Options,), fields))


class Place(NamedTuple):
    """Where a value stands: paths in an accuracy, in one of its tasks, or in an arm."""

    value: str
    subject: str = "against the unpruned arm"
    before: str = ""
    interval: str = ""
    ci: str = ""  # what github-action-benchmark calls it


class Reading(NamedTuple):
    """A figure's value of one text, task or file."""

    place: Place
    item: Any  # what it was read in
    value: float
    before: float | None
    interval: Interval | None

    @property
    def subject(self) -> str:
        """What it is of."""
        return self.place.subject.format(self.item)


def _at(item: Any, path: str) -> Any:
    """What stands there; None where nothing does."""
    for name in path.split("."):
        item = item.get(name) if isinstance(item, Mapping) else getattr(item, name, None)
    return item


def _change(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.1f} %"


def _three(value: float) -> str:
    return significant(value, 3)


def _cosine(value: float) -> str:
    return f"{value:.4f}"


def _bytes(value: float) -> str:
    return f"{value / 1e6:,.1f} MB" if value >= 1e6 else f"{value:,.0f} B"


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure of a report.

    ``judged`` writes what a limit is on, ``amount`` a value before or after, ``row`` a value in a
    report's table. Of ``of_the_cut`` the limit is on the value itself, which has no before; of the
    others on how it changes. ``row_name`` may name ``{same}``, ``{other}`` and ``{prompts}``.
    """

    key: str
    limit: Limit | None = None
    places: tuple[Place, ...] = ()
    name: str = ""  # in a check
    row_name: str = ""
    brief: str = ""  # in tables of several reports
    column: str = ""  # in the table of all models
    sentence: str = ""
    note: str = ""  # what it is
    missing: str = ""  # why it isn't there
    needs: str = ""  # what has to be there for it
    unit: str = ""
    ci_unit: str = "1"
    ci_factor: int = 1
    higher_is_better: bool = False
    of_the_cut: bool = False
    scale: Scale = "ratio"
    judged: Callable[[float], str] = _change
    amount: Callable[[float], str] = significant
    row: Callable[[float], str] = significant
    narrowed_by: str = ""
    stands_in: Literal["accuracy", "tasks", "arm"] = "accuracy"
    may_be_nan: bool = False  # where all texts are alike

    def readings(self, accuracy: Accuracy | None, arm: Arm | None = None) -> Iterator[Reading]:
        """What a report has of it."""
        items: Sequence[Any] = [arm if self.stands_in == "arm" else accuracy]
        if self.stands_in == "tasks":
            items = [] if accuracy is None else accuracy.tasks
        for item, place in product(items, self.places):
            if (value := _at(item, place.value)) is not None:
                yield Reading(
                    place, item, value, _at(item, place.before), _at(item, place.interval)
                )

    def words(self, name: str, accuracy: Accuracy | None) -> str:
        """One of its names, of what an accuracy has."""
        other = accuracy and accuracy.other
        return name.format(
            same=ANSWERS[accuracy.compared if accuracy else "tokens"].same,
            other=f"on {Path(other.text_source).name}" if other else "second text",
            prompts=counted(accuracy.prompts or 0, "prompt") if accuracy else "",
        )

    @property
    def has_before(self) -> bool:
        """Whether both arms have one of their own."""
        return any(place.before for place in self.places)

    def change(self, one: Reading) -> str:
        """A value in few words: by how much it has changed, where it can."""
        if one.before is None:
            return self.row(one.value)
        return relative_change(one.before, one.value)

    def bound(self, limit: float, *, higher_is_better: bool) -> float:
        """What a value is held against."""
        if self.of_the_cut:
            return limit
        return 1 + limit if self.scale == "ratio" else -limit if higher_is_better else limit

    @property
    def unchanged(self) -> float:
        """Its value where nothing has changed."""
        return 1.0 if self.scale == "ratio" or (self.of_the_cut and self.higher_is_better) else 0.0


_ROUNDS = " More rounds narrow it (compare --rounds)."
_TEXT = " More text narrows it (compare --eval-tokens)."
_OF_THE_CUT: dict[str, Any] = {"of_the_cut": True, "scale": "difference", "narrowed_by": _TEXT}
_EMBEDDED: dict[str, Any] = {
    **_OF_THE_CUT, "higher_is_better": True, "judged": _three, "row": _cosine,
    "needs": " It takes a model that embeds texts.",
}  # fmt: skip
_DISTRIBUTIONS = " It takes a model that gives tokens or classes."
_RANKS = "Encoders: minimum correlation (Spearman) of the similarities of pairs of texts with those"

FIGURES = (
    Figure(
        "time",
        Limit("max_slowdown", NotNegative, "Limit for each shape's time, such as 3%.", 0.03),
        unit="ms", amount=lambda value: f"{milliseconds(value)} ms", narrowed_by=_ROUNDS,
    ),
    Figure(
        "speedup",
        Limit("min_speedup", _Factor, "Minimum speedup over the unpruned model, such as 1.1.",
              look={"metavar": "FACTOR"}),
        unit="ms", higher_is_better=True, of_the_cut=True, judged="{:.3f}x".format,
        amount=lambda value: f"{milliseconds(value)} ms", narrowed_by=_ROUNDS,
    ),
    Figure(
        "perplexity",
        Limit("max_perplexity_increase", NotNegative, "Limit for the rise of the perplexity.",
              0.01),
        (Place("perplexity.candidate", "evaluation text", "perplexity.baseline",
               "intervals.perplexity", "accuracy: perplexity"),),
        row_name="perplexity", brief="perplexity", column="perplexity",
        narrowed_by=_TEXT,
        sentence="perplexity goes from {before} to {value} ({change})",
        needs=" It takes a text, and a model that predicts the next token.",
        missing="There is no perplexity: the tokens are no text, or the models predict none; "
                "their {} are compared.",
    ),
    Figure(
        "other_perplexity",
        places=(Place("other.perplexity.candidate", "", "other.perplexity.baseline",
                      "other.intervals.perplexity"),),
        row_name="{other}", column="{other}",
    ),
    Figure(
        "kl_divergence",
        Limit("max_kl", _Nats, "Limit for the KL divergence from the unpruned model.",
              look={"metavar": "NATS"}),
        (Place("kl_divergence", interval="intervals.kl_divergence", ci="accuracy: kl-divergence"),),
        name="KL divergence", row_name="KL divergence, nats", brief="KL, nats",
        column="KL divergence, nats",
        note="KL divergence is KL(baseline || candidate) of the next-token distributions, of a "
             "classifier's classes, mean over positions; 0 means that nothing changed.",
        needs=_DISTRIBUTIONS,
        sentence="its predictions are {value} nats of KL divergence from the baseline's",
        unit="nats", ci_unit="nats", judged=_three, row=_three, **_OF_THE_CUT,
    ),
    Figure(
        "top1_agreement",
        Limit("min_top1_agreement", _Part,
              "Minimum share of positions at which both models have the same top-1 token."),
        (Place("top1_agreement", interval="intervals.top1_agreement",
               ci="accuracy: top1-agreement"),),
        name="same top-1 token", row_name="same {same}", column="same {same}",
        ci_unit="%", ci_factor=100, higher_is_better=True,
        judged=percent, amount=percent, row=percent, needs=_DISTRIBUTIONS, **_OF_THE_CUT,
    ),
    Figure(
        "top5_agreement", places=(Place("figures.top5_agreement"),),
        row_name="same of top-5 classes", row=percent,
    ),
    Figure(
        "exact_match", places=(Place("figures.exact_match"),),
        row_name="same continuation of {prompts}", column="same continuation", row=percent,
    ),
    Figure(
        "embedding_cosine",
        Limit("min_embedding_cosine", _Part,
              "Encoders: minimum cosine with the unpruned model's embeddings."),
        (Place("figures.embedding_cosine", interval="intervals.embedding_cosine",
               ci="accuracy: embedding-cosine"),),
        name="cosine of embeddings", row_name="cosine of embeddings, mean",
        column="cosine of embeddings", sentence="its embeddings keep a mean cosine of {value}",
        **_EMBEDDED,
    ),
    Figure(
        "lowest_cosine", places=(Place("figures.lowest_cosine"),),
        row_name="cosine of embeddings, lowest", row=_cosine,
    ),
    Figure(
        "rank_agreement",
        Limit("min_rank_agreement", _Part, f"{_RANKS} in the unpruned model.",
              look={"config_only": True}),
        (Place("figures.rank_agreement", interval="intervals.rank_agreement",
               ci="accuracy: rank-agreement"),),
        name="ranking of pairs, Spearman", row_name="same ranking of pairs, Spearman",
        may_be_nan=True, **_EMBEDDED,
    ),
    Figure(
        "task",
        Limit("max_task_drop", NotNegative, "Limit for the drop of a task's score: 1% is 0.01."),
        (Place("candidate", "{0.task}, {0.metric}", "baseline", "difference",
               "{0.task} {0.metric}: score"),),
        stands_in="tasks", higher_is_better=True, scale="difference",
        judged=lambda value: f"{100 * value:+.1f} %", amount=percent,
        needs=" It takes what is right: tasks (--tasks), images with labels, or transcripts.",
    ),
    Figure(
        "size",
        Limit("max_size_increase", NotNegative, "Limit for the size of files and engines.", 0.01),
        (Place("file_bytes", "files", ci="model: file-size"),
         Place("largest_engine_bytes", "engines")),
        stands_in="arm", unit="bytes", ci_unit="bytes", amount=_bytes,
    ),
    Figure(
        "memory",
        Limit("max_memory_increase", NotNegative, "Limit for KV cache and device memory.", 0.01),
        (Place("kv_cache_bytes_per_token", "KV cache per token", ci="model: kv-cache-per-token"),
         Place("device_memory_bytes", "device memory", ci="model: device-memory")),
        stands_in="arm", unit="bytes", ci_unit="bytes", amount=_bytes,
    ),
    Figure(
        "nodes",
        Limit("max_node_increase", NotNegative, "Limit for the graph's nodes: 0%.",
              look={"rare": True}),
        (Place("nodes", "graph", ci="model: nodes"),),
        stands_in="arm", judged=lambda ratio: f"{100 * (ratio - 1):+.3g} %",
        amount="{:,.0f}".format,
    ),
)  # fmt: skip
"""In the order of tables, options and CI files."""

BRIEF = [figure for figure in FIGURES if figure.brief]
"""Those that tables of several reports have."""
LIMITED = {figure.key: figure for figure in FIGURES if figure.limit is not None}
"""Those that a limit can be on."""


def _known(key: str) -> str:
    if key not in _KEYS:
        raise ValueError(f"{key} is none of {', '.join(_KEYS)}")
    return key


_KEYS = [figure.key for figure in FIGURES]


Quantity = Annotated[str, AfterValidator(_known)]
