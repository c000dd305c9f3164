"""From what a sweep says to its cells: each a request to the pipeline, with a folder of its own."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from exporter.artifacts.ledger import FOLDER
from exporter.choose.budgets.budget import Budget
from exporter.choose.selection.search_options import SearchOptions
from exporter.compare.options import CompareOptions, QualityOptions, TimingOptions
from exporter.errors import SweepError
from exporter.heal.options import HealOptions
from exporter.models.loading.checked_folder import Dangers
from exporter.models.loading.options import SourceOptions
from exporter.option_types import Dtype
from exporter.pipeline.request import DropRequest, ExportRequest
from exporter.pipeline.sweep.reading import Sweep
from exporter.pipeline.sweep.schema import (
    DTYPES,
    HealEntry,
    ModelEntry,
    PlanEntry,
    PrecisionEntry,
    Scoring,
    SweepFile,
)
from exporter.quantize.settings import QuantizeSettings
from exporter.score import ScoreOptions

CELLS = "cells"
PLANS = "plans"
"""The folder of plans that were written down by hand in the sweep's file."""
SHARED = "shared"
_CHOOSE_IN: Dtype = "float32"
_BLOCKS_ON_DEMAND = ("kl", "perplexity")  # the other metrics score them anyway
_NO_PATH = ("self", "pydoc")
_HUB_ID = re.compile(r"hf:[\w./-]+|[\w][\w.-]*/[\w][\w.-]*")


@dataclass(frozen=True)
class Cell:
    """One model with one plan in one precision.

    Attributes:
        model: Its name on that axis.
        plan: Likewise.
        precision: Likewise.
        folder: Where its results go, relative to the sweep's folder.
        request: What the pipeline is asked for.
        drops: What is dropped, where that stands in the sweep's file; the request's plan is then to
            be written from it.
        keeps_models: Whether its models stay once they were measured.
    """

    model: str
    plan: str
    precision: str
    folder: str
    request: ExportRequest
    drops: tuple[str, ...] = ()
    keeps_models: bool = True

    @property
    def name(self) -> str:
        """As progress calls it."""
        return f"{self.model}, {self.plan}, {self.precision}"


def cells_of(
    sweep: Sweep, out: Path, dangers: Dangers | None = None, *, look: bool = True
) -> list[Cell]:
    """All cells, in the order of the file: by model, then plan, then precision.

    Relative paths are relative to the file. Paths of the requests are absolute, for a worker may
    run elsewhere.

    Args:
        sweep: What is asked for.
        out: The folder that takes the results.
        dangers: What models may do.
        look: Whether what is named has to be there now.

    Raises:
        SweepError: Something that is named is not there.
        DepthcutError: Settings exclude each other.
    """
    place = _NamedPlaces(sweep.path.resolve().parent, look)
    return list(_cells(sweep.file, place, out.resolve(), dangers or Dangers()))


def _cells(file: SweepFile, place: _NamedPlaces, out: Path, dangers: Dangers) -> Iterator[Cell]:
    compare, scoring = _compare(file, place), _score(file.scoring, place)
    for model, plan, precision in product(file.models, file.plans, file.precisions):
        names = (model.label, plan.label, precision.label)
        folder = "/".join((CELLS, *names))
        request = ExportRequest(
            source=place.model(model),
            out=out / folder,
            drops=_drops(plan, place, out),
            search=_search(plan),
            exporter=file.export.exporter,
            target=file.export.target,
            opset=file.export.opset,
            checkpoint=file.export.checkpoint,
            load=SourceOptions(DTYPES[precision.dtype], model.revision, **vars(dangers)),
            score=_scored_by(plan, scoring),
            compare=compare,
            quantize=_quantize(precision, scoring.calibration, place),
            heal=_heal(plan.heal, scoring, place),
            choose_dtype=_CHOOSE_IN,
            shared=out / FOLDER / SHARED,
        )
        yield Cell(*names, folder, request, plan.drops, file.keep == "models")


@dataclass(frozen=True)
class _NamedPlaces:
    """The folder that names in the file are relative to."""

    root: Path
    look: bool

    def path(self, name: str) -> Path:
        """Absolute, and without ``..`` unless that leads elsewhere, behind a link."""
        path = self.root / Path(name).expanduser()
        plain = Path(os.path.normpath(path))
        return path if path.exists() and not (plain.exists() and plain.samefile(path)) else plain

    def text(self, spec: str | None) -> str | None:
        """A text's name: a file's path, or what is no path."""
        if spec is None or spec in _NO_PATH or spec.startswith("hf:"):
            return spec
        return str(self.existing(spec, "text"))

    def existing(self, name: str, what: str) -> Path:
        path = self.path(name)
        if self.look and not path.exists():
            raise SweepError(
                f"There is no {what} {path}.", "Relative paths are relative to the sweep's file."
            )
        return path

    def model(self, entry: ModelEntry) -> str:
        """A model's path, or its hub id."""
        path = self.path(entry.source)
        if path.exists():
            return str(path)
        if _HUB_ID.fullmatch(entry.source) and not Path(entry.source).exists():
            return entry.source
        return str(self.existing(entry.source, "model"))


def _drops(plan: PlanEntry, place: _NamedPlaces, out: Path) -> DropRequest:
    if plan.file is not None:
        return DropRequest(plan=place.existing(plan.file, "plan"))
    if plan.drops:
        return DropRequest(plan=out / PLANS / f"{plan.label}.json")
    counts: dict[str, Any] = plan.counts
    return DropRequest(Budget(**counts))


def _search(plan: PlanEntry) -> SearchOptions:
    told = {"search": plan.search, "objective": plan.objective, "protect": plan.protect}
    return SearchOptions(**{name: value for name, value in told.items() if value})  # type: ignore[arg-type]


def _score(scoring: Scoring, place: _NamedPlaces) -> ScoreOptions:
    options = scoring.model_dump()
    return ScoreOptions(**{**options, "calibration": place.text(scoring.calibration)})


def _scored_by(plan: PlanEntry, scoring: ScoreOptions) -> ScoreOptions:
    if plan.by is None:
        return scoring
    blocks = bool(plan.block) and plan.by in _BLOCKS_ON_DEMAND
    return replace(scoring, metrics=(plan.by,), blocks=blocks)


def _heal(heal: HealEntry | None, scoring: ScoreOptions, place: _NamedPlaces) -> HealOptions | None:
    """By default fitted on the text that importance is measured on, as `depthcut export` does."""
    if heal is None:
        return None
    texts = tuple(filter(None, map(place.text, heal.calibration)))
    shared = {n: getattr(scoring, n) for n in ("samples", "sequence_length", "batch_size", "seed")}
    return HealOptions(
        kind=heal.kind,
        rank=heal.rank,
        ridge=heal.ridge,
        sequential=heal.sequential,
        calibration=texts or ((scoring.calibration,) if scoring.calibration else ()),
        check_text=place.text(heal.check_text),
        **shared,
    )


def _quantize(
    precision: PrecisionEntry, calibration: str | None, place: _NamedPlaces
) -> QuantizeSettings | None:
    if precision.scheme is None:
        return None
    names = ("method", "block_size", "symmetric", "accuracy_level")
    told = {n: value for n in names if (value := getattr(precision, n)) is not None}
    for name in ("embedding_bits", "head_bits"):
        value = getattr(precision, name)
        if value is not None:
            told[name] = None if value == "none" else value
    text = place.text(precision.calibration) or calibration
    settings = QuantizeSettings(
        scheme=precision.scheme, calibration=None if text == "self" else text, **told
    )
    settings.refuse_nonsense()
    return settings


def _compare(file: SweepFile, place: _NamedPlaces) -> CompareOptions:
    told = file.measuring
    data = None if told.task_data is None else place.existing(told.task_data, "folder")
    return CompareOptions(
        provider=told.provider,
        threads=told.threads,
        prefill_lengths=file.shapes.prefill,
        decode_past_lengths=file.shapes.decode_past,
        batches=file.shapes.batch,
        rounds=told.rounds,
        eval_text=place.text(told.eval_text) or told.eval_text,
        eval_tokens=told.eval_tokens,
        eval_sequence_length=told.eval_sequence_length,
        quality=QualityOptions(
            tasks=told.tasks,
            task_data=data,
            task_limit=told.task_limit,
            agreement_prompts=told.agreement_prompts,
        ),
        timing=TimingOptions(
            time_budget_s=told.time_budget_s,
            threshold=told.threshold,
            generate=file.shapes.generate,
        ),
    )
