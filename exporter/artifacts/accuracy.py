"""Quality in report.json, of both arms on the same texts and items; and evaluation.json."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from exporter.artifacts.base import Artifact, Count, Length, Record


def _above_zero(value: float) -> float:
    if value <= 0:
        raise ValueError("a perplexity is above 0")
    return value


Perplexity = Annotated[float, AfterValidator(_above_zero)]
"""Infinite or NaN of a model that a cut has ruined."""


class Interval(Record):
    """An estimate with its 95 % interval."""

    value: float
    ci95: tuple[float, float]


class PerplexityPair(Record):
    """exp of the mean negative log-likelihood per token, both arms on the same tokens."""

    baseline: Perplexity
    candidate: Perplexity


class SampleLosses(Record):
    """Each document's loss, or each sample's, summed over its predicted tokens, in nats.

    With them a later report on the same text can be compared document by document.
    """

    tokens: list[Count]
    baseline: list[float]
    candidate: list[float]


class TaskResult(Record):
    """A task's score of both arms on the same items.

    ``difference`` is candidate minus baseline, its interval from a paired bootstrap over items.
    ``higher_is_better`` is false for losses and error rates.
    """

    task: str
    metric: str
    items: Count
    baseline: float
    candidate: float
    difference: Interval
    source: str = ""
    higher_is_better: bool = True


CUT = " …"
"""Ends an answer that had more to say."""


def _as_text(answer: Any) -> Any:
    """Files of earlier versions tell apart what was said and whether it ended."""
    if not isinstance(answer, dict):
        return answer
    return f"{answer.get('text', '')}{'' if answer.get('ended') else CUT}"


Said = Annotated[str, BeforeValidator(_as_text)]


class SampleAnswer(Record):
    """One prompt, and what both arms say to it."""

    prompt: str
    baseline: Said
    candidate: Said


class SampleAnswers(Record):
    """What both arms say to the same prompts, by the likeliest token each time.

    ``source`` is the prompts' file, or ``built in``. With ``chat`` they were asked in the
    tokenizer's chat template, else continued as they are. ``new_tokens`` is the most that an answer
    may have. ``left_out`` says why there are no answers.
    """

    source: str = ""
    chat: bool = False
    new_tokens: Length = 0
    answers: list[SampleAnswer] = Field(default_factory=list)
    left_out: str = ""


Compared = Literal["tokens", "classes", "order", "images", "embeddings"]
"""What a comparison held against each other: distributions, of images over classes, or vectors."""
_PLACES_BEFORE = {
    "log_perplexity_increase": ("intervals", "perplexity"),
    "kl_interval": ("intervals", "kl_divergence"),
    "top5_agreement": ("figures", "top5_agreement"),
    "top1_interval": ("intervals", "top1_agreement"),
    "embeddings.cosine": ("figures", "embedding_cosine"),
    "embeddings.cosine_interval": ("intervals", "embedding_cosine"),
    "embeddings.lowest_cosine": ("figures", "lowest_cosine"),
    "embeddings.rank_agreement": ("figures", "rank_agreement"),
    "embeddings.rank_interval": ("intervals", "rank_agreement"),
    "generation.exact_match": ("figures", "exact_match"),
}
"""Where files of earlier versions have figures, and where they are now."""


class Accuracy(Record):
    """How far the candidate's predictions are from the baseline's.

    ``figures`` has those without a field of their own, by their keys; ``intervals`` those of all,
    of what both arms have of the change of its logarithm. ``prompts`` were continued by both.
    ``other`` is of text of another domain that both models read, too.
    """

    text_source: str
    text_sha256: str
    tokens: Count
    perplexity: PerplexityPair | None
    kl_divergence: float | None = None
    top1_agreement: float | None = None
    compared: Compared = "tokens"
    figures: dict[str, float] = Field(default_factory=dict)
    intervals: dict[str, Interval] = Field(default_factory=dict)
    prompts: Count | None = None
    sample_losses: SampleLosses | None = None
    tasks: list[TaskResult] = Field(default_factory=list, max_length=1_000)
    other: Accuracy | None = None
    answers: SampleAnswers | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_earlier_versions(cls, content: Any) -> Any:
        """They have a field for each figure and each interval."""
        if not isinstance(content, dict):
            return content
        now = dict(content)
        groups = {key: now.pop(key, None) for key in ("embeddings", "generation")}
        before = {
            f"{group}.{name}": value
            for group, part in groups.items()
            for name, value in (part.items() if isinstance(part, dict) else ())
        } | {key: now.pop(key) for key in _PLACES_BEFORE if key in now}
        if now.pop("images", None) is None:
            before.pop("top5_agreement", None)
        else:
            now["compared"] = "images"
        if "embeddings.cosine" in before:
            now["compared"] = "embeddings"
        places: dict[str, dict[str, Any]] = {}
        for path, (group, key) in _PLACES_BEFORE.items():
            if before.get(path) is not None:
                places.setdefault(group, {})[key] = before[path]
        if (prompts := before.get("generation.prompts")) is not None:
            now["prompts"] = prompts
        return {**places, **now}


class TaskScore(Record):
    """One metric of one task: its mean, and the score of each item in the task's order."""

    task: str
    metric: str
    value: float
    source: str
    items: list[float]
    higher_is_better: bool = True


class EvaluationReport(Artifact):
    """evaluation.json. ``model`` is the path of what ran, ``backend`` and ``provider`` where."""

    model: str
    backend: str
    provider: str
    threads: Length | None = None
    scores: list[TaskScore]
