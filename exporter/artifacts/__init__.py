"""The data that passes between the stages, as files: JSON, validated, with their parents' hashes.

Every file begins with ``schema_version`` and ``kind`` and says what it was made from. A lower
importance score means more redundant, whatever the metric.
"""

from __future__ import annotations

from exporter.artifacts.accuracy import (
    Accuracy,
    Answer,
    EmbeddingAgreement,
    EvaluationReport,
    GenerationAgreement,
    Interval,
    LongContext,
    NearestNeighbours,
    Neighbour,
    OtherText,
    PerplexityPair,
    PositionError,
    QueryNeighbours,
    SampleAnswer,
    SampleAnswers,
    SampleLosses,
    TaskResult,
    TaskScore,
)
from exporter.artifacts.base import (
    _TOLD_VERSIONS,
    SCHEMA_VERSION,
    Artifact,
    Record,
    command_line,
    json_path,
    library_versions,
)
from exporter.artifacts.comparison import (
    RUN_IN_FP32,
    Arm,
    Arms,
    ComparisonReport,
    EngineFacts,
    ParityCheck,
)
from exporter.artifacts.depths import (
    DepthCell,
    DepthDamage,
    DepthsInt8,
    DepthsReport,
    DropAnswer,
    Way,
)
from exporter.artifacts.forms import (
    FLOAT_BASELINE,
    FLOAT_CANDIDATE,
    FORM_KEY,
    QUANTIZATION_KEY,
    Corner,
    FormRecord,
    QuantizationRecord,
    Target,
)
from exporter.artifacts.healing import (
    AnswerDamage,
    HealedBranch,
    HealedClasses,
    HealedEmbeddings,
    HealedText,
    Healing,
    HealingReport,
    HealKind,
    StoppedBy,
    Train,
    Training,
    TrainingCheck,
)
from exporter.artifacts.latency import (
    FEWEST_ROUNDS,
    Environment,
    LatencyRow,
    LatencySamples,
    MachineState,
    NoiseFloor,
    Phase,
    PowerReached,
    Speedup,
    Stop,
    TimedPhase,
    VerdictWord,
)
from exporter.artifacts.regression import (
    Against,
    BaselineSet,
    ChangePoint,
    Check,
    CheckReport,
    CheckVerdict,
    Drift,
    HistoryCurve,
    HistoryEntry,
    HistoryRow,
    HistoryRun,
    JudgedModels,
    KeyDifference,
    Quantity,
    RunKey,
    Scale,
    WorkChange,
)
from exporter.artifacts.stages import (
    CalibrationRef,
    CurvePoint,
    DeletedEntry,
    EngineParse,
    FiguresFrom,
    GraphSizeEntry,
    ImportanceReport,
    JudgedText,
    MetricScores,
    ModelRef,
    ParetoCurve,
    PlannedDeletion,
    PlanParts,
    PruneReport,
    PruningPlan,
    RankAgreement,
    RankedScores,
    RankingRef,
    RefusedEntry,
    ReplacementsRef,
    Score,
    ScoreComparison,
    TriedCut,
    Verification,
)
from exporter.artifacts.sweep import (
    AgainstFloat,
    CellStatus,
    SweepCell,
    SweepFailure,
    SweepReport,
    SweepResult,
    SweepShape,
)
from exporter.artifacts.work import GraphWork, WorkFigure
