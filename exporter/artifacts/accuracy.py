"""Quality in report.json, of both arms on the same texts and items; and evaluation.json."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

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


class GenerationAgreement(Record):
    """Greedy continuations of the same prompts by both arms, and the share that is the same."""

    gone = frozenset({"new_tokens"})

    prompts: Count
    exact_match: float


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


class EmbeddingAgreement(Record):
    """Encoders: both arms' sentence embeddings of the same texts.

    ``cosine`` is the mean over texts of the two arms' cosine, its interval Student's t over texts;
    ``rank_agreement`` Spearman's correlation of all pairs' similarities in one arm with those in
    the other, its interval a jackknife's over texts.
    """

    gone = frozenset({"texts"})

    cosine: float
    lowest_cosine: float
    rank_agreement: float
    cosine_interval: Interval | None = None
    rank_interval: Interval | None = None


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


Compared = Literal["tokens", "classes", "order"]
"""Whose distributions a comparison held against each other."""


class Accuracy(Record):
    """How far the candidate's predictions are from the baseline's.

    ``other`` is of text of another domain that both models read, too.
    """

    text_source: str
    text_sha256: str
    tokens: Count
    perplexity: PerplexityPair | None
    kl_divergence: float | None = None
    top1_agreement: float | None = None
    images: Count | None = None
    compared: Compared = "tokens"
    log_perplexity_increase: Interval | None = None
    kl_interval: Interval | None = None
    top1_interval: Interval | None = None
    sample_losses: SampleLosses | None = None
    top5_agreement: float | None = None
    generation: GenerationAgreement | None = None
    tasks: list[TaskResult] = Field(default_factory=list, max_length=1_000)
    embeddings: EmbeddingAgreement | None = None
    other: Accuracy | None = None
    answers: SampleAnswers | None = None

    @property
    def text_name(self) -> str:
        """Short: of a file without its folder."""
        return Path(self.text_source).name

    @property
    def top5_of_images(self) -> float | None:
        """The share of images whose five likeliest classes both arms agree on."""
        return None if self.images is None else self.top5_agreement


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

    kind: Literal["evaluation_report"] = "evaluation_report"
    model: str
    backend: str
    provider: str
    threads: Length | None = None
    scores: list[TaskScore]
