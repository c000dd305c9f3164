"""healed.report.json: what replacements were fitted, and what they cost and gained."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from exporter.artifacts.base import Artifact, Count, Layer, Nouns, Record, nouns_of
from exporter.artifacts.plan_figures import PlanKind, kind_of
from exporter.artifacts.stages import CalibrationRef, ModelRef
from graph_passes.types import DeletionKind, Replacement

HealKind = Literal["bias", "linear", "best", "fold", "distill"]
Train = Literal["adapters", "all"]
Role = Literal["calibration", "other"]
StoppedBy = Literal["tokens", "time", "no_gain", "diverged"]


class HealedFigure(Record):
    """One figure of one text without what heals and with it.

    ``ci95`` is of the healed one. The errors are over documents.
    """

    dropped: float
    healed: float
    ci95: tuple[float, float] | None = None
    std_errors: tuple[float | None, float | None] = (None, None)


class HealedText(Record):
    """What a cut does to a model's answers on one text, without replacements and with them.

    ``role`` is ``calibration`` for samples of the texts that were fitted on, but none of those
    samples; ``other`` for another domain. ``figures`` stand by their keys in plans; those of pairs
    are left out where there were none. ``gain`` is what is taken back of the first of them, paired
    by sample; ``degrees`` are those of freedom of the intervals. ``perplexities`` are those of the
    whole, the dropped and the healed model.
    """

    role: Role
    text: CalibrationRef
    figures: dict[str, HealedFigure]
    gain: float
    gain_std_error: float | None
    degrees: float | None = None
    perplexities: tuple[float, float, float] | None = None

    @property
    def kind(self) -> PlanKind:
        """What kind of answers it is measured by."""
        return kind_of(self.figures)

    @property
    def gained_share(self) -> float | None:
        """Share of what dropping cost that is taken back; None where it cost nothing."""
        figure = self.kind.figures[0]
        cost = figure.loss(self.figures[figure.key].dropped)
        return self.gain / cost if cost > 0 else None

    @property
    def gain_words(self) -> str:
        """What is taken back, how sure that is, and its share: ``+0.500 nats ± 0.010 (83 %)``."""
        error, share = self.gain_std_error, self.gained_share
        sure = "" if error is None else f" ± {error:.{self.kind.gain_digits}f}"
        back = "" if share is None else f" ({100 * share:.0f} %)"
        return f"{self.kind.figures[0].gained(self.gain)}{sure}{back}"


class HealedBranch(Record):
    """What took one branch's place.

    ``parameters`` are the replacement's numbers.
    """

    gone = frozenset({"ridge", "bias_explained", "linear_explained"})

    layer: Layer
    kind: DeletionKind
    replacement: Replacement
    parameters: Count


class TrainingCheck(Record):
    """The loss on held-out text after some tokens."""

    gone = frozenset({"seconds", "training_loss"})

    tokens: Count
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
    warnings: list[str] = Field(default_factory=list)

    def of_role(self, role: Role) -> HealedText | None:
        """What was measured on held-out text, or on another domain's; None where nothing was."""
        return next((item for item in self.texts if item.role == role), None)


class HealingReport(Artifact):
    """The file that `depthcut heal` writes beside the healed plan."""

    model: ModelRef
    healing: Healing

    @property
    def reads(self) -> Nouns:
        """What the model reads, in words."""
        return nouns_of(self.model.architecture)
