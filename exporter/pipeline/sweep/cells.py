"""From what a sweep says to its cells: each a request to the pipeline, with a folder of its own."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from exporter.artifacts.ledger import FOLDER
from exporter.errors import SweepError
from exporter.heal.options import NO_TEXT
from exporter.models.loading.checked_folder import Dangers
from exporter.models.texts.self_text import SAMPLED
from exporter.models.texts.sources import DOCSTRINGS, PYDOC
from exporter.option_types import Dtype
from exporter.options import build
from exporter.pipeline.request import ExportRequest
from exporter.pipeline.sweep.reading import Sweep
from exporter.pipeline.sweep.schema import ModelEntry, PrecisionEntry, SweepFile, Told
from exporter.quantize.settings import QuantizeSettings
from exporter.score.registry import DEFAULT

CELLS = "cells"
PLANS = "plans"
"""The folder of plans that were written down by hand in the sweep's file."""
SHARED = "shared"
_CHOOSE_IN: Dtype = "float32"
_BLOCKS_ON_DEMAND = ("kl", "perplexity")  # the other metrics score them anyway
_NO_PATH = (*SAMPLED, PYDOC, DOCSTRINGS, NO_TEXT)
_TEXTS = ("calibration", "heal_calibration", "check_text", "eval_text", "other_text")
_PATHS = {"plan": "plan", "task_data": "folder", "prompts": "file"}
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
    for model, plan, precision in product(file.models, file.plans, file.precisions):
        names = (model.label, plan.label, precision.label)
        folder = "/".join((CELLS, *names))
        told = place.options({**_common(file), **plan.told, **_told_of(precision)})
        if plan.drop:
            told["plan"] = out / PLANS / f"{plan.label}.json"
        asked = build(
            ExportRequest,
            {
                **told,
                **vars(dangers),
                "source": place.model(model),
                "revision": model.revision,
                "output": out / folder,
                "blocks": told.get("blocks", False) or _wants_blocks(told),
            },
        )
        request = replace(
            asked,
            choose_dtype=_CHOOSE_IN,
            shared=out / FOLDER / SHARED,
            quantize=_quantize(asked.quantize, precision, place),
        )
        if request.quantize is not None:
            request.quantize.refuse_missing_text()
        yield Cell(*names, folder, request, plan.drop, file.keep == "models")


def _common(file: SweepFile) -> Told:
    return {**file.export, **file.scoring, **file.shapes, **file.measuring}


def _told_of(precision: PrecisionEntry) -> Told:
    """Without its own text, which isn't that of scoring."""
    return {key: value for key, value in precision.told.items() if key != "calibration"}


def _wants_blocks(told: Told) -> bool:
    metric = told.get("metric", (DEFAULT,))[0]
    return bool(told.get("drop_block")) and metric in _BLOCKS_ON_DEMAND


def _quantize(
    settings: QuantizeSettings | None, precision: PrecisionEntry, place: _NamedPlaces
) -> QuantizeSettings | None:
    own = precision.told.get("calibration")
    if settings is None or own is None:
        return settings
    return replace(settings, calibration=tuple(map(place.text, own)))


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

    def options(self, told: Told) -> Told:
        """Values of options, with what names a file or a folder as its path."""
        found = dict(told)
        for key, value in told.items():
            if value is None:
                continue
            if key in _TEXTS:
                several = isinstance(value, tuple)
                found[key] = tuple(map(self.text, value)) if several else self.text(value)
            elif key in _PATHS:
                found[key] = self.existing(str(value), _PATHS[key])
        return found

    def text(self, spec: str) -> str:
        """A text's name: a file's path, or what is no path."""
        if spec in _NO_PATH or spec.startswith("hf:"):
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
