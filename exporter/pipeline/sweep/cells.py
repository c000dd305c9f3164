"""From what a sweep says to its cells: each a request to the pipeline, with a folder of its own."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from exporter.artifacts import SweepCell
from exporter.artifacts.loaded_plan import LoadedPlan
from exporter.artifacts.plans import parse_drops
from exporter.artifacts.store import FOLDER, StageLedger, key_hash, locked
from exporter.errors import SweepError
from exporter.files import sha256_bytes, sha256_file, write_text
from exporter.heal.options import NO_TEXT
from exporter.models.loading.checked_folder import Dangers
from exporter.models.loading.sources import source_sha256
from exporter.models.texts.self_text import SAMPLED
from exporter.models.texts.sources import DOCSTRINGS, PYDOC
from exporter.option_types import Dtype
from exporter.options import build
from exporter.pipeline.planning import given_plan_hash
from exporter.pipeline.request import ExportRequest
from exporter.pipeline.run import ARMS, QUANTIZED, request_key
from exporter.pipeline.sweep.schema import Entry, Sweep, SweepFile, Values
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
    """One model with one plan in one precision."""

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
    """
    place = _NamedPlaces(sweep.path.resolve().parent, look)
    return list(_cells(sweep.file, place, out.resolve(), dangers or Dangers()))


def _cells(file: SweepFile, place: _NamedPlaces, out: Path, dangers: Dangers) -> Iterator[Cell]:
    for model, plan, precision in product(file.models, file.plans, file.precisions):
        names = (model.label, plan.label, precision.label)
        folder = "/".join((CELLS, *names))
        own = {key: value for key, value in precision.values.items() if key != "calibration"}
        options = place.options({**file.common, **plan.values, **own})
        on_demand = options.get("metric", (DEFAULT,))[0] in _BLOCKS_ON_DEMAND
        if plan.drop:
            options["plan"] = out / PLANS / f"{plan.label}.json"
        result = build(
            ExportRequest,
            {
                **options,
                **vars(dangers),
                "source": place.model(model.values["source"]),
                "revision": model.values["revision"],
                "output": out / folder,
                "blocks": options.get("blocks", False)
                or (on_demand and bool(options.get("drop_block"))),
            },
        )
        request = replace(
            result,
            choose_dtype=_CHOOSE_IN,
            shared=out / FOLDER / SHARED,
            quantize=_quantize(result.quantize, precision, place),
        )
        if request.quantize is not None:
            request.quantize.refuse()
        yield Cell(*names, folder, request, plan.drop, file.keeps_models)


def _quantize(
    settings: QuantizeSettings | None, precision: Entry, place: _NamedPlaces
) -> QuantizeSettings | None:
    own = precision.values.get("calibration")
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

    def options(self, values: Values) -> Values:
        """Values of options, with what names a file or a folder as its path."""
        result = dict(values)
        for key, value in values.items():
            if value is None:
                continue
            if key in _TEXTS:
                several = isinstance(value, tuple)
                result[key] = tuple(map(self.text, value)) if several else self.text(value)
            elif key in _PATHS:
                result[key] = self.existing(str(value), _PATHS[key])
        return result

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

    def model(self, source: str) -> str:
        """A model's path, or its hub id."""
        path = self.path(source)
        if path.exists():
            return str(path)
        if _HUB_ID.fullmatch(source) and not Path(source).exists():
            return source
        return str(self.existing(source, "model"))


def plan_text(cell: Cell) -> str | None:
    """The plan that the sweep's file has written out; the same whoever writes it, and when."""
    if not cell.drops:
        return None
    return parse_drops(cell.drops).model_copy(update={"versions": {}, "command": []}).to_json()


def write_plan(cell: Cell) -> None:
    """Puts that plan where the cell's request expects it; what a killed run left there goes."""
    text, path = plan_text(cell), cell.request.drops.plan
    if text is not None and path is not None:
        write_text(path, text)


def cell_key(cell: Cell, source_sha256: str) -> str:
    """The hash of everything that a cell depends on, but for the machine."""
    given, written = cell.request.drops.plan, plan_text(cell)
    plan = None if written is None else sha256_bytes(written.encode())
    if plan is None and given is not None:
        plan = given_plan_hash(LoadedPlan.read(given))
    return key_hash(request_key(cell.request, source_sha256, plan))


def source_hashes() -> Callable[[Cell], str]:
    """Hashes each model once, however many cells it has."""
    known: dict[tuple[str, str | None], str] = {}

    def sha256(cell: Cell) -> str:
        source, load = cell.request.source, cell.request.load
        name = (source, load.revision)
        if name not in known:
            known[name] = source_sha256(source, **load.reading)
        return known[name]

    return sha256


def drop_models(cell: Cell) -> None:
    """Removes the weights of a cell that was measured, where only its reports are wanted."""
    if not cell.keeps_models:
        with locked(cell.request.out):
            StageLedger(cell.request.out).drop(*ARMS, *QUANTIZED.values())


def is_kept(cell: Cell, key: str, result: SweepCell | None) -> bool:
    """Whether an earlier run has finished the cell from the same, and its report is as it was."""
    if result is None or (result.status, result.key) != ("done", key):
        return False
    report = cell.request.out / "report.json"
    if cell.keeps_models and not (cell.request.out / "candidate" / "model.onnx").is_file():
        return False
    return report.is_file() and sha256_file(report) == result.report_sha256
