"""One run of `depthcut export`: what was asked for, what is finished, and the loaded model."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from exporter.artifacts import Healing, HealingReport, ImportanceReport, library_versions
from exporter.artifacts.loaded_plan import LoadedPlan
from exporter.artifacts.store import StageLedger
from exporter.compare.options import QualityOptions
from exporter.errors import TextSourceError
from exporter.files import sha256_file
from exporter.heal.plan_file import FOLDER_PLAN, report_of
from exporter.models.changed_weights import change_weights
from exporter.models.loading.meta_model import load_meta
from exporter.models.loading.model_source import LoadedModel, load_model
from exporter.models.loading.sources import SourceOptions, encoder_decoder_config, source_sha256
from exporter.models.texts.images import read_images
from exporter.models.texts.pairs import read_pairs
from exporter.models.texts.sources import PYDOC, Part
from exporter.pipeline.request import ExportRequest
from exporter.progress import Progress
from exporter.report.files import REPORTS

ARMS = {"baseline": "export", "candidate": "prune"}
"""The folders of both models, and the stages that make them."""
QUANTIZE = {arm: f"quantize-{arm}" for arm in ARMS}
"""The stages that quantise them."""
GRAPHS = (*ARMS.values(), *QUANTIZE.values())
"""All of these."""
QUANTIZED = {"baseline": "baseline-quantized", "candidate": "candidate-quantized"}
"""The folders of their quantised forms."""
CHECKPOINT = "checkpoint"
"""The stage that writes the pruned Hugging Face checkpoint with its card, and its folder."""
HEALING = "healing"
"""The stage that heals the plan, and its folder, with the healed plan and its numbers in it."""
ENGINES = "engines"
"""The stage that builds engines, and its folder, with ``baseline`` and ``candidate`` in it."""
MODEL = "model"
"""What stages are made of that no stage has made."""
Key = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """A step of the road whose result is kept, and found again by its key."""

    name: str
    key: Callable[[Run], Key]
    make: Callable[[Run, Path], Any]  # writes its results into a folder, and gives notes
    of: tuple[str, ...] = ()  # the stages that it is made from, as far as they are asked for
    wanted: Callable[[ExportRequest], bool] = lambda _: True
    shared: bool = True  # with other folders; what was measured is a folder's own


class Run:
    """The request, the ledger of finished stages, and the model once it is needed."""

    def __init__(self, request: ExportRequest, progress: Progress) -> None:
        self.request = request
        self.progress = progress
        self.versions = {**library_versions(), "python": platform.python_version()}
        self.source_sha256 = source_sha256(request.source, **request.load.reading)
        given = {MODEL: self.source_sha256}
        self.ledger = StageLedger(request.out, force=request.redo, given=given)

    def finish(self, stage: Stage) -> None:
        """Makes a stage, or finds that it was made of the same before; says which."""
        if not stage.wanted(self.request):
            if stage.name == HEALING:  # nothing here is made of it any more
                self.ledger.forget(HEALING)
            return

        def make(folder: Path) -> Any:
            self.progress.detail(f"{stage.name}: begins")
            return stage.make(self, folder)

        key = {**stage.key(self), "versions": self.versions}
        shared = self.request.shared if stage.shared else None
        how = self.ledger.once(stage.name, key, make, of=stage.of, shared=shared)
        if how == "reused":
            self.progress.say(f"{stage.name}: reused, nothing it depends on has changed")
        elif how == "shared":
            self.progress.say(f"{stage.name}: shared, it was made from the same before")

    @cached_property
    def stacks_config(self) -> dict[str, Any] | None:
        """The config of a model that has two stacks of layers, and so three graphs; else None."""
        return encoder_decoder_config(self.request.source, **self.request.load.reading)

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether it is such a model."""
        return self.stacks_config is not None

    @property
    def hears(self) -> bool:
        """Whether its encoder reads recordings."""
        return "num_mel_bins" in (self.stacks_config or {})

    @cached_property
    def loaded(self) -> LoadedModel:
        """The PyTorch model as it is written; without its weights where they are streamed."""
        self.__dict__.pop("_choosing", None)  # both at once would take twice the memory
        return self._load(self.request.load, "to export")

    @property
    def choosing(self) -> LoadedModel:
        """The PyTorch model as it is scored, searched and healed."""
        same = self.request.choosing == self.request.load
        return self.loaded if same else self._choosing

    @cached_property
    def _choosing(self) -> LoadedModel:
        self.__dict__.pop("loaded", None)
        return self._load(self.request.choosing, "to choose")

    def _load(self, options: SourceOptions, what_for: str) -> LoadedModel:
        if self.request.stream:
            return load_meta(
                self.request.source,
                dtype=options.dtype,
                revision=options.revision,
                allow_any_model_type=options.allow_any_model_type,
            )
        twice = self.request.choosing != self.request.load
        text = f" in {options.dtype}, {what_for}" if twice else ""
        with self.progress.task(f"load {self.request.source}{text}"):
            return load_model(self.request.source, **vars(options))

    def healed_model(self) -> LoadedModel:
        """The PyTorch model with the weights that the plan changes; the whole one is let go of."""
        loaded = self.loaded
        if self.plan.changed_weights:
            self.free_model()
            change_weights(loaded.model, self.plan.changed_weights)
        return loaded

    def free_model(self) -> None:
        """Lets go of the PyTorch model, before anything is built or timed."""
        self.__dict__.pop("loaded", None)
        self.__dict__.pop("_choosing", None)

    @cached_property
    def importance(self) -> ImportanceReport:
        """What the score stage found."""
        return ImportanceReport.read(self.ledger.path("importance.json"))

    @property
    def num_layers(self) -> int:
        """How many layers the model has."""
        scored = self.request.scored
        return self.importance.model.num_layers if scored else self.choosing.ref.num_layers

    @property
    def encoder_layers(self) -> int | None:
        """How many of them are the encoder's, of an encoder-decoder; else None."""
        ref = self.importance.model if self.request.scored else self.choosing.ref
        return ref.encoder_layers

    @cached_property
    def given_plan(self) -> LoadedPlan | None:
        """The user's own plan; None where it is chosen here."""
        given = self.request.drops.plan
        return None if given is None else LoadedPlan.read(given)

    @cached_property
    def chosen_plan(self) -> LoadedPlan:
        """What the plan stage has chosen, or taken."""
        return LoadedPlan.read(self.ledger.path("plan.json"))

    @cached_property
    def plan(self) -> LoadedPlan:
        """The plan that is carried out: the healed one, where it was healed in this run."""
        if not self.request.heals_plan:
            return self.chosen_plan
        return LoadedPlan.read(self.ledger.path(HEALING) / FOLDER_PLAN)

    @property
    def healing(self) -> Healing | None:
        """What the plan's replacements gain; None where there are none, or it isn't known."""
        path = self.plan.path
        report = None if path is None else report_of(self.plan.plan, path)
        return None if report is None else HealingReport.read(report).healing

    def built_from(self) -> dict[str, Path]:
        """The folder of each model that engines are built from, quantised if that is asked for."""
        names = {arm: arm for arm in ARMS} if self.request.quantize is None else QUANTIZED
        return {arm: self.ledger.path(folder) for arm, folder in names.items()}


def request_key(request: ExportRequest, source_sha256: str, plan: str | None) -> Key:
    """Everything that a whole run depends on, but for the machine that it is measured on."""
    result = asdict(request) | {"out": None, "redo": None, "shared": None}
    result["drops"] = result["drops"] | {"plan": None}
    heal, quantize = request.heal, request.quantize
    texts: list[str | None] = [*request.score.calibration, *request.compare.texts]
    texts += () if heal is None else (*heal.calibration, heal.check_text)
    texts += () if quantize is None else (*quantize.calibration, str(quantize.gguf))
    return {
        "model": source_sha256,
        "asked": result,
        "plan": plan,
        "texts": [file_hash(text) for text in texts],
        "tasks": question_hashes(request.compare.quality),
        "writes": REPORTS,
        "versions": {**library_versions(), "python": platform.python_version()},
    }


def question_hashes(quality: QualityOptions) -> list[str | None]:
    """Of the user's prompts, and of the tasks' files where they are local."""
    folder, prompts = quality.task_data, quality.prompts
    names = () if folder is None else quality.tasks
    files = [*([prompts] if prompts else []), *(f"{folder}/{name}.jsonl" for name in names)]
    return [file_hash(str(file)) for file in files]


def text_hashes(run: Run, specs: Iterable[str], part: Part) -> list[str | None]:
    """Of the texts that are files; of an encoder-decoder with the recordings that they name."""
    if not run.is_encoder_decoder:
        return [file_hash(text) for text in specs]
    named = [text for text in specs if text != PYDOC]
    return [read_pairs(text, part=part, sound=run.hears).content_sha256 for text in named]


def file_hash(source: str | None) -> str | None:
    """The hash of a text or plan that is a file, or of a folder's images; else None.

    That is for a name such as ``pydoc``, and for a folder of something else.
    """
    if source is None or not Path(source).exists():
        return None
    if Path(source).is_file():
        return sha256_file(Path(source))
    with contextlib.suppress(TextSourceError):
        return read_images(source, part="calibration").content_sha256
    return None
