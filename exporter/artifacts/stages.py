"""importance.json, plan.json, prune.json: what scoring, planning, cutting hand on."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from exporter.artifacts.base import (
    IMAGES,
    TEXTS,
    Artifact,
    Count,
    Layer,
    Layers,
    Length,
    Nouns,
    Record,
)
from exporter.errors import ArtifactError
from exporter.printable import counted
from graph_passes.types import MOST_LAYERS, DeletionKind, Replacement, SublayerRef, sublayer_kinds


class ModelRef(Record):
    """Which model a report speaks of; ``revision`` is the commit where it came from the hub.

    Of an encoder-decoder ``num_layers`` counts both stacks, whose layers are numbered through, and
    ``encoder_layers`` those of the encoder, which come first; None for models of one stack.
    """

    source: str
    architecture: str
    num_layers: Layers
    sha256: str
    revision: str | None = None
    encoder_layers: Layers | None = None


class CalibrationRef(Record):
    """Which text something rests on, or which items of a task."""

    source: str
    samples: Count
    sequence_length: Length
    tokens: Count
    sha256: str
    ids_sha256: str | None = None
    documents: str | None = Field(default=None, pattern=r"^(\d{1,9}(-\d{1,9})?(,|$))*$")
    content: str = ""
    unit: Literal["sample", "item"] = "sample"
    mixture: list[CalibrationRef] = Field(default_factory=list)

    @property
    def texts(self) -> list[CalibrationRef]:
        """The texts of a mixture that something of was taken; of a single text, itself."""
        return [text for text in self.mixture or [self] if text.samples]

    @property
    def spans(self) -> list[range]:
        """The numbers of its documents, if they are known."""
        spans = [span.split("-") for span in (self.documents or "").split(",") if span]
        return [range(int(span[0]), int(span[-1]) + 1) for span in spans]

    @property
    def clusters(self) -> int:
        """Of how many documents the samples are; of a single one each counts as one."""
        numbers = [(text.samples, sum(map(len, text.spans))) for text in self.texts]
        return sum(min(samples, own) if own > 1 else samples for samples, own in numbers)

    def describe(self, read: Nouns = TEXTS) -> str:
        """In words: ``15 samples of valid.txt (7,680 tokens)``, or ``64 images of photos/``."""
        if read == IMAGES:
            return f"{counted(self.samples, read.one)} of {self.source}"
        return f"{counted(self.samples, self.unit)} of {self.source} ({self.tokens:,} tokens)"


def document_of(source: str) -> str:
    """A text without its part: ``pydoc``, or ``hf:DATASET:CONFIG``; a file is one part."""
    if source.startswith("hf:"):
        return ":".join(source.split(":")[:3])
    return source.split(" (")[0] if source.startswith("pydoc (") else source


class Score(Record):
    """Importance of one sublayer or block; lower means more redundant.

    ``std_error`` is that of the mean over samples, not documents; None with fewer than two.
    """

    layer: Layer
    kind: DeletionKind
    score: float
    std_error: float | None


_Scores = Annotated[list[Score], Field(max_length=8 * MOST_LAYERS)]


def _by_metric(further: Any) -> Any:
    """Files of earlier versions have a list."""
    try:
        return {item["metric"]: item["scores"] for item in further}
    except (TypeError, KeyError):
        return further


class ImportanceReport(Artifact):
    """importance.json; ``further`` are those of other metrics, from the same pass."""

    model: ModelRef
    metric: str
    calibration: CalibrationRef
    scores: _Scores
    further: Annotated[dict[str, _Scores], BeforeValidator(_by_metric)] = Field(
        default_factory=dict
    )

    @property
    def tables(self) -> dict[str, list[Score]]:
        """All scores by their metric, the report's own first."""
        return {self.metric: self.scores, **self.further}

    def of_metric(self, name: str | None) -> ImportanceReport:
        """The same report with another of its metrics first; None: as it is."""
        tables = self.tables
        if name is None or name == self.metric:
            return self
        if name not in tables:
            raise ArtifactError(
                f"{self.model.source} is not scored by {name} here, only by {', '.join(tables)}.",
                f"Score it again: depthcut score --metric {name}.",
                code="not-scored",
            )
        others = {metric: scores for metric, scores in tables.items() if metric != name}
        chosen = {"metric": name, "scores": tables[name], "further": others}
        return self.model_copy(update=chosen)


class RankingRef(Record):
    """A metric of one of the compared files."""

    metric: str
    file: str


class RankedScores(Record):
    """The scores of one kind of sublayer in one ranking, by layer."""

    kind: DeletionKind
    ranking: RankingRef
    scores: dict[Layer, float]


class RankAgreement(Record):
    """How far two rankings of sublayers of one kind agree.

    ``spearman`` and ``kendall`` (tau-b) are 1 for the same order and -1 for the opposite; None
    where one of the rankings can't tell its sublayers apart. ``shared_first`` tells for some n how
    many sublayers are among the n most redundant in both.
    """

    kind: DeletionKind
    first: RankingRef
    second: RankingRef
    sublayers: Count
    spearman: float | None
    kendall: float | None
    shared_first: dict[Count, Count]


class ScoreComparison(Artifact):
    """Scores of one model by several metrics or texts, or of its checkpoints on one text."""

    models: dict[str, ModelRef]
    texts: dict[str, CalibrationRef]
    scores: list[RankedScores]
    agreements: list[RankAgreement]


class PlannedDeletion(Record):
    """One thing that a plan removes."""

    layer: Layer
    kind: DeletionKind
    replacement: Replacement = "none"

    @property
    def sublayers(self) -> tuple[SublayerRef, ...]:
        """What it removes of a PyTorch model: of a block both sublayers."""
        return tuple(SublayerRef(self.layer, kind) for kind in sublayer_kinds(self.kind))

    def names(self, ref: SublayerRef) -> bool:
        """Whether it removes this sublayer, alone or with its block."""
        return ref.layer == self.layer and self.kind in (ref.kind, "block")


class ReplacementsRef(Record):
    """The safetensors file with fitted replacements and changed weights."""

    path: str
    sha256: str


FiguresFrom = Literal["unseen", "checked", "searched"]
"""The text that a plan's ``predicted`` was measured on: none that the plan rests on; the one that
decided whether floors hold or which replacements are kept; the very one that was searched on."""


class JudgedText(Record):
    """What the finished plan costs on one text of a mixture; ``figures`` as in ``predicted``."""

    text: CalibrationRef
    figures: dict[str, float]


class TriedCut(Record):
    """A cut that was healed and held against the limits on quality, on held-out text.

    ``bare`` and ``healed`` have figures as in ``predicted``, before and after healing;
    ``healed`` also ``log_perplexity_increase_high``, the upper end of its 95 % interval.
    ``healed_by`` is the way of healing that was asked for; ``changed_weights`` how many of the kept
    weights it changed.
    """

    deletions: list[PlannedDeletion]
    healed_by: str
    training_seconds: float
    bare: dict[str, float]
    healed: dict[str, float]
    holds: bool
    changed_weights: Count


class PlanParts(Record):
    """What a plan rests on, by what that was for; several of one role were a mixture.

    ``chosen_on`` decided what goes, by scores or a search; ``fitted_on`` is what replacements or
    weights were fitted to; ``stopped_on`` decided when to stop and what was kept, such as floors of
    quality and the state of a training; on ``judged_on`` the finished plan's figures were measured.
    ``judged_apart`` has them for each text of a mixture that was searched on.
    """

    chosen_on: list[CalibrationRef] = Field(default_factory=list)
    fitted_on: list[CalibrationRef] = Field(default_factory=list)
    stopped_on: list[CalibrationRef] = Field(default_factory=list)
    judged_on: list[CalibrationRef] = Field(default_factory=list)
    judged_apart: list[JudgedText] = Field(default_factory=list)

    @property
    def parts(self) -> PlanParts:
        """Nothing but these."""
        return PlanParts(**{name: getattr(self, name) for name in PlanParts.model_fields})

    @property
    def decided(self) -> dict[str, list[CalibrationRef]]:
        """What the plan was made by, by its role; nothing else may judge it."""
        return {role: refs for role, refs in self.roles.items() if role != "judged"}

    @property
    def roles(self) -> dict[str, list[CalibrationRef]]:
        """Those that there are, by their role: ``chosen``, ``fitted``, ``stopped``, ``judged``."""
        calibrations = {
            "chosen": self.chosen_on,
            "fitted": self.fitted_on,
            "stopped": self.stopped_on,
            "judged": self.judged_on,
        }
        return {role: refs for role, refs in calibrations.items() if refs}


class PruningPlan(PlanParts, Artifact):
    """plan.json; ``deletions`` stand in the order in which they were chosen."""

    deletions: list[PlannedDeletion]
    replacements: ReplacementsRef | None = None
    changed_weights: int = Field(default=0, ge=0)
    encoder_layers: Annotated[Layers, Field(ge=1)] | None = None
    budget: dict[str, int | float | str] = Field(default_factory=dict)
    importance_sha256: str | None = None
    predicted: dict[str, float] = Field(default_factory=dict)
    predicted_on: FiguresFrom | None = None
    tried: list[TriedCut] = Field(default_factory=list)

    def describe(self) -> str:
        """The deletions in words: ``attention 25, 26 (linear); mlp 3``."""
        layers: dict[str, list[str]] = {}
        for deletion in self.deletions:
            place = "" if deletion.replacement == "none" else f" ({deletion.replacement})"
            layers.setdefault(deletion.kind, []).append(f"{deletion.layer}{place}")
        return "; ".join(f"{kind} {', '.join(numbers)}" for kind, numbers in layers.items())


class DeletedEntry(Record):
    """What one deletion took out of the graph, and what its replacement put in.

    ``parameters_added`` are the replacement's numbers; those of a bias that could be added to one
    of the graph's own are not counted, since the graph holds no more for it. ``graph`` is the file
    that it was taken out of, where a model is several.
    """

    layer: Layer
    kind: DeletionKind
    replacement: Replacement
    residual_add: str
    nodes_removed: Count
    parameters_removed: Count
    inputs_removed: list[str]
    outputs_removed: list[str]
    parameters_added: Count = 0
    graph: str = ""


class RefusedEntry(Record):
    """What the finder would not cut, and why."""

    layer: Layer | None
    kind: DeletionKind | None
    node: str
    reason: str


class GraphSizeEntry(Record):
    """Nodes, weights and the weights' bytes."""

    nodes: Count
    parameters: Count
    bytes: Count


class Verification(Record):
    """How the pruned graph was held against the masked original; ``method`` none: it was not."""

    method: str
    runs: Count
    max_abs_error: float | None
    tolerance: float | None
    passed: bool | None


class EngineParse(Record):
    """Whether an engine's parser takes the pruned graph; if not, it took the whole one neither.

    ``reasons`` are then the parser's, with the nodes.
    """

    backend: str
    version: str
    parsed: bool
    reasons: list[str] = Field(default_factory=list)


class PruneReport(Artifact):
    """prune.json, beside a pruned ONNX file; ``target`` is that file's name."""

    target: str = ""
    deleted: list[DeletedEntry]
    refused: list[RefusedEntry]
    before: GraphSizeEntry
    after: GraphSizeEntry
    verification: Verification
    engine: EngineParse | None = None
    kv_renumbering: dict[str, str] = Field(default_factory=dict)
