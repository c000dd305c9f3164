"""What `depthcut export` is asked to do."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from exporter.artifacts import Target
from exporter.choose.budgets import Budget, PlanSettings
from exporter.choose.selection import SearchOptions
from exporter.compare import CompareOptions
from exporter.engines.build.libraries import Backend
from exporter.engines.build.settings import BuildSettings
from exporter.errors import UsageError
from exporter.export.forms.portable import ExporterName
from exporter.heal.options import HealOptions
from exporter.models.loading.options import SourceOptions
from exporter.option_types import Dtype
from exporter.quantize.settings import QuantizeSettings
from exporter.score import ScoreOptions


@dataclass(frozen=True)
class DropRequest:
    """What to drop: whatever holds a budget, such as a number of attentions, or a plan's file.

    Exactly one is set.
    """

    budget: Budget | None = None
    plan: Path | None = None

    def __post_init__(self) -> None:
        if (self.plan is None) == (self.budget is None):
            raise UsageError(
                "Say what to drop, in one way:",
                "--drop-attn N, --drop-mlp N, --drop-block N, --drop N, or a budget such as "
                "--target-speedup 1.25; in export also --plan.",
            )
        if self.budget is not None:
            self.budget.refuse_empty()


@dataclass(frozen=True)
class EngineRequest:
    """The engines that are built of both models.

    Attributes:
        backend: Which library builds.
        builds: How many of each model.
        settings: How.
        split: An engine for each phase: one for both holds the weights twice.
    """

    backend: Backend
    builds: int = 1
    settings: BuildSettings = field(default_factory=BuildSettings)
    split: bool = False


@dataclass(frozen=True)
class ExportRequest:
    """Everything that `depthcut export` needs to know.

    Attributes:
        source: Hugging Face folder, hub id or GGUF file.
        out: The folder that takes all results.
        drops: What to drop.
        search: How it is chosen.
        exporter: For the target ``portable``: PyTorch's own exporter (None too), or optimum's.
        target: The runtime that both graphs are written for.
        opset: For the target ``portable``: the ONNX opset; None: 20 for PyTorch's exporter,
            optimum's own choice for optimum.
        quantize: How both are quantised after the cut; None for not at all.
        cache_length: For the TensorRT targets: positions of caches that are updated in place; 0
            lets them grow, None takes the usual number.
        engines: Engines to build of both, and to compare; None for none.
        heal: What takes the dropped sublayers' places; None for nothing, or for what the plan
            brings. A search by damage weighs it as it chooses, else it is fitted to the plan.
        checkpoint: Whether the pruned model is written as a Hugging Face checkpoint too.
        force: Redo what is already there, and drop what is asked for even if no sublayer is left.
        stream: Whether the model's weights are read a layer at a time, never all of them.
        stream_dir: Where hidden states are kept in a file meanwhile; None: in memory, if they fit.
        compared: Whether both models are run and compared at the end.
        choose_dtype: The weights' while the model is scored, searched and healed; None: as both
            models are written.
        shared: A folder of finished stages, for output folders that have some in common.
    """

    source: str
    out: Path
    drops: DropRequest
    exporter: ExporterName | None = None
    target: Target = "portable"
    opset: int | None = None
    cache_length: int | None = None
    load: SourceOptions = field(default_factory=SourceOptions)
    score: ScoreOptions = field(default_factory=ScoreOptions)
    search: SearchOptions = field(default_factory=SearchOptions)
    compare: CompareOptions = field(default_factory=CompareOptions)
    quantize: QuantizeSettings | None = None
    engines: EngineRequest | None = None
    heal: HealOptions | None = None
    checkpoint: bool = False
    stream: bool = False
    stream_dir: Path | None = None
    compared: bool = True
    force: bool = False
    choose_dtype: Dtype | None = None
    shared: Path | None = None

    def __post_init__(self) -> None:
        if self.drops.plan is not None and self.search != SearchOptions():
            raise UsageError(
                "A plan file says what is dropped; there is nothing to search for or to protect.",
                "Give --plan, or numbers such as --drop-attn 8 with --search.",
            )
        budget = self.drops.budget
        if budget is not None:
            self.plan_settings.settled(budget)
        if budget is not None and budget.at and self.target.startswith("tensorrt"):
            raise UsageError(
                f"Times are measured on ONNX Runtime, which doesn't run --target {self.target}.",
                "Plan on another target first (portable, onnxruntime-cuda), then give its --plan.",
            )

    @property
    def plan_settings(self) -> PlanSettings:
        """How the plan is looked for; what is chosen by scores is healed by a stage of its own."""
        return PlanSettings(
            search=self.search,
            heal=self.heal,
            calibration=self.score.calibration,
            batch_size=self.score.batch_size,
            allow_all=self.force,
        )

    @property
    def weighs_replacements(self) -> bool:
        """Whether the plan is chosen together with what takes the dropped branches' places."""
        budget = self.drops.budget
        return budget is not None and self.plan_settings.settled(budget).weighs_replacements

    @property
    def heals_plan(self) -> bool:
        """Whether replacements are fitted to a plan that was chosen, or given, without them."""
        return self.heal is not None and not self.weighs_replacements

    @property
    def plans_on_graph(self) -> bool:
        """Whether the plan wants the exported graph: its sizes, or the time that it takes."""
        budget = self.drops.budget
        measured = budget is not None and (not budget.only_counts or budget.at is not None)
        return measured or self.weighs_replacements

    @property
    def choosing(self) -> SourceOptions:
        """How the model is loaded that is scored, searched and healed."""
        return replace(self.load, dtype=self.choose_dtype or self.load.dtype)

    @property
    def by_modelopt(self) -> bool:
        """Whether both graphs are quantised for TensorRT, and engines are built from those."""
        return self.quantize is not None and self.quantize.modelopt is not None

    @property
    def cache_room(self) -> int | None:
        """Positions of caches of fixed length; None for the usual number, where that will do.

        ModelOpt can't run caches in place, so what it quantises has caches that grow.
        """
        from exporter.export.forms.tensorrt import USUAL_ROOM

        if self.by_modelopt:
            return 0
        if self.cache_length is None and self.compare.longest > USUAL_ROOM:
            return self.compare.longest
        return self.cache_length
