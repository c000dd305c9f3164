"""healed.report.json: what replacements were fitted, and what they cost and gained."""

from __future__ import annotations

from typing import ClassVar, Literal, NamedTuple

from pydantic import Field

from exporter.artifacts.base import Artifact, Count, Layer, Nouns, Record, nouns_of
from exporter.artifacts.stages import CalibrationRef, ModelRef
from graph_passes.types import DeletionKind, Replacement

HealKind = Literal["bias", "linear", "best", "fold", "distill"]
Train = Literal["adapters", "all"]
Role = Literal["calibration", "other"]
StoppedBy = Literal["tokens", "time", "no_gain", "diverged"]


class HealedFigure(NamedTuple):
    """One figure of one text, without what heals and with it; their errors, and how they are shown.

    ``shown`` are the whole model's, the dropped and the healed one's, where a table has others.
    """

    dropped: float | None
    healed: float | None
    ci95: tuple[float, float] | None = None
    std_errors: tuple[float | None, float | None] = (None, None)
    shown: tuple[float, float, float] | None = None


class AnswerDamage(Record):
    """What a cut does to a model's answers on one text; its errors are over documents.

    ``log_perplexity_increase`` is the log of the perplexity over the whole model's, in nats;
    ``kl`` the mean KL divergence from the whole model's next-token distribution, in nats.
    """

    perplexity: float
    log_perplexity_increase: float
    log_perplexity_increase_std_error: float | None
    kl: float
    kl_std_error: float | None
    top1_agreement: float
    log_perplexity_increase_ci95: tuple[float, float] | None = None
    top1_agreement_ci95: tuple[float, float] | None = None


class HealedText(Record):
    """The damage on one text, without replacements and with them.

    ``role`` is ``calibration`` for samples of the texts that were fitted on, but none of those
    samples; ``other`` for another domain. ``gain`` is the log-perplexity that the replacements take
    back, in nats, paired by sample. ``degrees`` are those of freedom of the intervals.
    """

    role: Role
    text: CalibrationRef
    baseline_perplexity: float
    dropped: AnswerDamage
    healed: AnswerDamage
    gain: float
    gain_std_error: float | None
    degrees: float | None = None

    @property
    def figures(self) -> dict[str, HealedFigure]:
        """By their keys in plans."""
        before, after = self.dropped, self.healed
        return {
            "log_perplexity_increase": HealedFigure(
                before.log_perplexity_increase,
                after.log_perplexity_increase,
                after.log_perplexity_increase_ci95,
                shown=(self.baseline_perplexity, before.perplexity, after.perplexity),
            ),
            "kl": HealedFigure(
                before.kl, after.kl, std_errors=(before.kl_std_error, after.kl_std_error)
            ),
            "top1_agreement": HealedFigure(
                before.top1_agreement, after.top1_agreement, after.top1_agreement_ci95
            ),
        }

    @property
    def gained_share(self) -> float | None:
        """Share of the log-perplexity increase taken back; None where dropping cost nothing."""
        cost = self.dropped.log_perplexity_increase
        return self.gain / cost if cost > 0 else None


class _OfTwo(Record):
    """Figures of the dropped and the healed model, each a field with one of these ends."""

    ends: ClassVar[dict[str, str]] = {}

    @property
    def figures(self) -> dict[str, HealedFigure]:
        """By their keys in plans."""
        return {
            key: HealedFigure(
                getattr(self, f"dropped{end}"),
                getattr(self, f"healed{end}"),
                getattr(self, f"healed{end}_ci95", None),
            )
            for key, end in self.ends.items()
        }


class HealedEmbeddings(_OfTwo):
    """What healing did for the embeddings of one text's paragraphs, of a model without next tokens.

    ``role`` as for :class:`HealedText`. ``dropped`` and ``healed`` are the mean cosine with the
    whole model's embeddings, without and with what heals; ``gain`` is their difference, its
    standard error paired by paragraph. The correlations are Pearson's, of the similarities of pairs
    of paragraphs in both models; earlier versions didn't measure them.
    """

    role: Role
    text: CalibrationRef
    dropped: float
    healed: float
    gain: float
    gain_std_error: float | None
    dropped_correlation: float | None = None
    healed_correlation: float | None = None
    healed_ci95: tuple[float, float] | None = None
    healed_correlation_ci95: tuple[float, float] | None = None
    degrees: float | None = None

    ends: ClassVar[dict[str, str]] = {"cosine": "", "similarity_correlation": "_correlation"}


class HealedClasses(_OfTwo):
    """What healing did for the classes of one text's paragraphs, of a classifier or reranker.

    ``role`` as for :class:`HealedText`. ``dropped_kl`` and ``healed_kl`` are the mean KL divergence
    from the whole model's classes, in nats, without and with what heals, ``dropped_same`` and
    ``healed_same`` the share of the same likeliest class, with its 95 % interval over paragraphs;
    ``gain`` is the divergence that is taken back, its standard error paired by paragraph.
    """

    ends: ClassVar[dict[str, str]] = {"kl": "_kl", "top1_agreement": "_same"}
    role: Role
    text: CalibrationRef
    dropped_kl: float
    dropped_same: float
    healed_kl: float
    healed_same: float
    healed_same_ci95: tuple[float, float] | None
    gain: float
    gain_std_error: float | None
    degrees: float | None = None


class HealedBranch(Record):
    """What took one branch's place.

    ``parameters`` are the replacement's numbers. The explained shares are of the branch's output
    over held-out tokens: by its mean alone, and by the linear map; 1 at best, negative where it
    does harm. They and the ridge are None where the fits were made one on the other.
    """

    layer: Layer
    kind: DeletionKind
    replacement: Replacement
    parameters: Count
    ridge: float | None = None
    bias_explained: float | None = None
    linear_explained: float | None = None


class TrainingCheck(Record):
    """The loss on held-out text after some tokens; the training's own is that of its last step."""

    tokens: Count
    seconds: float
    training_loss: float
    held_out_loss: float


class Training(Record):
    """How the whole model taught the cut one."""

    train: Train
    loss: Literal["answers", "classes", "embeddings", "states"]
    trained_parameters: Count
    steps: Count
    tokens: Count
    seconds: float
    stopped_by: StoppedBy
    stopped_on: CalibrationRef
    checks: list[TrainingCheck]
    learning_rate: float | None = None

    @property
    def fitted_loss(self) -> float | None:
        """The held-out loss of the fold or replacements that it began with; None without any."""
        bare, *fitted = [check.held_out_loss for check in self.checks if not check.tokens]
        return fitted[0] if fitted and fitted[0] < bare else None


class Healing(Record):
    """How a plan was healed, and how that turned out.

    ``parameters`` are those that replacements add; ``changed_weights`` tells how many weights that
    the model keeps have other values, ``training`` how they came by them.
    """

    asked: HealKind
    rank: Count | None
    calibration: list[CalibrationRef]
    branches: list[HealedBranch]
    parameters: Count
    changed_weights: Count = 0
    training: Training | None = None
    texts: list[HealedText] = Field(default_factory=list)
    embeddings: list[HealedEmbeddings] = Field(default_factory=list)
    classes: list[HealedClasses] = Field(default_factory=list)
    warnings: list[str] = Field(default_factory=list)

    @property
    def measured(self) -> list[HealedText | HealedEmbeddings | HealedClasses]:
        """What was measured on each text, whatever it is measured by."""
        return [*self.texts, *self.embeddings, *self.classes]

    def of_role(self, role: Role) -> HealedText | HealedEmbeddings | HealedClasses | None:
        """What was measured on held-out text, or on another domain's; None where nothing was."""
        return next((item for item in self.measured if item.role == role), None)


class HealingReport(Artifact):
    """The file that `depthcut heal` writes beside the healed plan."""

    kind: Literal["healing_report"] = "healing_report"
    model: ModelRef
    healing: Healing

    @property
    def reads(self) -> Nouns:
        """What the model reads, in words."""
        return nouns_of(self.model.architecture)
