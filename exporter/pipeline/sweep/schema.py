"""What a sweep's file says: models, plans and precisions, and what all of them have in common.

Keys have the names of `depthcut export`'s options. Nothing here looks at the disk.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from exporter.artifacts import HealKind, Target
from exporter.artifacts.plans.by_score import parse_drops
from exporter.choose.selection.options import Objective
from exporter.choose.selection.search_options import Search
from exporter.errors import DepthcutError
from exporter.export.options import ExporterName
from exporter.option_types import Dtype
from exporter.quantize.settings import Method, Scheme
from exporter.score.registry import METRICS

Count = Annotated[int, Field(strict=True, ge=1)]
Whole = Annotated[int, Field(strict=True, ge=0)]
Text = Annotated[str, StringConstraints(strict=True, min_length=1, strip_whitespace=True)]
Switch = Annotated[bool, Field(strict=True)]
Number = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]

DTYPES: dict[str, Dtype] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""Precisions of both models in float, and how PyTorch calls them."""
FloatName = Literal["fp32", "fp16", "bf16"]
_COUNTS = ("attention", "mlp", "block", "joint")
_FOREIGN = re.compile(r"[^A-Za-z0-9._+-]+")


class Entry(BaseModel):
    """A part of the file; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class NamedEntry(Entry):
    """One line of an axis of the sweep.

    Attributes:
        name: What the table and the folders call it; None takes a name from what it says.
    """

    name: Text | None = None

    @property
    def label(self) -> str:
        """Its name, as a folder may be called too."""
        return slug(self.name or self.described())

    def described(self) -> str:
        """What it says, briefly."""
        raise NotImplementedError


class ModelEntry(NamedEntry):
    """A model: a folder, a GGUF file, or a hub id with its revision."""

    source: Text
    revision: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, given: Any) -> Any:
        return {"source": given} if isinstance(given, str) else given

    def described(self) -> str:
        """The file's or folder's name."""
        return posixpath.normpath(self.source).rpartition("/")[2].removesuffix(".gguf")


class HealEntry(Entry):
    """What takes the dropped sublayers' places, as ``HealOptions`` has it."""

    kind: HealKind
    rank: Count | None = None
    ridge: Number | None = None
    sequential: Switch = False
    calibration: tuple[Text, ...] = ()
    check_text: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, given: Any) -> Any:
        return {"kind": given} if isinstance(given, str) else given


class PlanEntry(NamedEntry):
    """What is dropped: a plan's file, sublayers by hand, or numbers; exactly one of them.

    Attributes:
        file: A plan.json.
        drops: Such as ``attention:25,26``.
        by: The metric whose lowest scores go first.
        search: How numbers are chosen; see
            :class:`exporter.choose.selection.search_options.SearchOptions`.
    """

    file: Text | None = None
    drops: tuple[Text, ...] = ()
    attention: Count | None = None
    mlp: Count | None = None
    block: Count | None = None
    joint: Count | None = None
    by: Text | None = None
    search: Search | None = None
    objective: Objective | None = None
    protect: tuple[Text, ...] = ()
    heal: HealEntry | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, given: Any) -> Any:
        if isinstance(given, str):
            key = "file" if given.strip().endswith(".json") else "drops"
            given = {key: given}
        if isinstance(given, dict) and isinstance(given.get("drops"), str):
            given = {**given, "drops": given["drops"].split()}
        return given

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        counted = any(self.counts.values())
        if (self.file is not None) + bool(self.drops) + counted != 1:
            raise ValueError(
                "say what to drop in one way: a file, drops such as attention:25,26, or a number "
                "of attention, mlp, block or joint"
            )
        _refuse_unreadable(self.drops)
        if self.by is not None and self.by not in METRICS:
            raise ValueError(f"there is no metric {self.by!r}; there are {', '.join(METRICS)}")
        idle = [name for name in ("by", "search", "objective", "protect") if getattr(self, name)]
        if idle and not counted:
            raise ValueError(f"{idle[0]} says how numbers are chosen, and no number is given")
        return self

    @property
    def counts(self) -> dict[str, int]:
        """How many of each kind."""
        return {name: getattr(self, name) or 0 for name in _COUNTS}

    def described(self) -> str:
        """``attention8-cosine``, ``attention-3-4``, the file's name; what is put in follows."""
        return "+".join([self._what(), *([] if self.heal is None else [_heal_name(self.heal)])])

    def _what(self) -> str:
        if self.file is not None:
            return self.file.rpartition("/")[2].removesuffix(".json")
        if self.drops:
            return "_".join(self.drops)
        told = [f"{name}{number}" for name, number in self.counts.items() if number]
        return "-".join([*told, *filter(None, (self.by, self.search, self.objective))])


def _refuse_unreadable(drops: Sequence[str]) -> None:
    """Tells what is no drop as what pydantic takes for a mistake."""
    try:
        parse_drops(drops) if drops else None
    except DepthcutError as error:
        raise ValueError(f"{error.message} {error.hint or ''}".strip()) from error


def _heal_name(heal: HealEntry) -> str:
    rank = "" if heal.rank is None else f"-rank{heal.rank}"
    return f"{heal.kind}{rank}{'-sequential' if heal.sequential else ''}"


class PrecisionEntry(NamedEntry):
    """In what both models are compared: in float, or quantised after the cut.

    Attributes:
        dtype: Of the weights, before a quantisation too.
        scheme: Into what they are quantised; None for not at all. The other keys are for that; see
            :class:`exporter.quantize.settings.QuantizeSettings`.
    """

    dtype: FloatName = "fp32"
    scheme: Scheme | None = None
    method: Method | None = None
    block_size: Count | None = None
    symmetric: Switch | None = None
    accuracy_level: Whole | None = None
    embedding_bits: Literal[4, 8, "none"] | None = None
    head_bits: Literal[4, 8, "none"] | None = None
    calibration: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, given: Any) -> Any:
        if not isinstance(given, str):
            return given
        if given not in (*DTYPES, *get_args(Scheme)):
            known = ", ".join((*DTYPES, *get_args(Scheme)))
            raise ValueError(f"{given!r} is no precision; there are {known}")
        return {"dtype" if given in DTYPES else "scheme": given}

    @model_validator(mode="after")
    def _no_idle_setting(self) -> Self:
        said = sorted(self.model_fields_set - {"name", "dtype", "scheme"})
        if self.scheme is None and said:
            raise ValueError(f"{said[0]} is for a quantisation, and no scheme is given")
        return self

    def described(self) -> str:
        """``fp16``, ``int4``, ``int4-hqq``."""
        dtype = None if self.scheme and self.dtype == "fp32" else self.dtype
        block = self.block_size and f"block{self.block_size}"
        return "-".join(filter(None, (self.scheme, self.method, block or None, dtype)))


class Shapes(Entry):
    """What is timed of every cell: each length with each batch."""

    prefill: tuple[Count, ...] = (128, 512)
    decode_past: tuple[Count, ...] = (512,)
    batch: Annotated[tuple[Count, ...], Field(min_length=1)] = (1,)
    generate: tuple[tuple[Count, Count], ...] = ()


class Scoring(Entry):
    """On which text importance is measured, and replacements are fitted."""

    calibration: Text | None = None
    samples: Count | None = None
    sequence_length: Annotated[int, Field(strict=True, ge=2)] = 512
    batch_size: Count = 4
    seed: Annotated[int, Field(strict=True)] = 0
    kl_positions: Count = 2


class Measuring(Entry):
    """How both models of a cell are compared."""

    provider: Literal["cpu", "cuda"] = "cpu"
    threads: Count | None = None
    rounds: Annotated[int, Field(strict=True, ge=2)] | None = None
    time_budget_s: Number = 60.0
    threshold: Annotated[float, Field(strict=True, gt=0, lt=1)] = 0.01
    eval_text: Text = "pydoc"
    eval_tokens: Annotated[int, Field(strict=True, ge=2)] = 8192
    eval_sequence_length: Annotated[int, Field(strict=True, ge=2)] = 512
    agreement_prompts: Whole = 8
    tasks: tuple[Text, ...] = ()
    task_data: Text | None = None
    task_limit: Count | None = None


class Exporting(Entry):
    """How both graphs are written."""

    target: Target = "portable"
    exporter: ExporterName | None = None
    opset: Annotated[int, Field(strict=True, ge=18, le=23)] | None = None
    checkpoint: Switch = False


class SweepFile(Entry):
    """The whole file: three axes, and what all cells have in common.

    Attributes:
        keep: Whether a cell's models stay on the disk once they were measured.
    """

    models: Annotated[tuple[ModelEntry, ...], Field(min_length=1)]
    plans: Annotated[tuple[PlanEntry, ...], Field(min_length=1)]
    precisions: Annotated[tuple[PrecisionEntry, ...], Field(min_length=1)] = (PrecisionEntry(),)
    shapes: Shapes = Shapes()
    scoring: Scoring = Scoring()
    measuring: Measuring = Measuring()
    export: Exporting = Exporting()
    keep: Literal["models", "reports"] = "models"

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        axes: dict[str, Sequence[NamedEntry]] = {
            "models": self.models,
            "plans": self.plans,
            "precisions": self.precisions,
        }
        for axis, entries in axes.items():
            for first, second in _alike(entries):
                raise ValueError(
                    f"{axis}[{first}] and {axis}[{second}] are both called "
                    f"{entries[second].label}; give one a name of its own"
                )
        return self


def _alike(entries: Sequence[NamedEntry]) -> Iterator[tuple[int, int]]:
    seen: dict[str, int] = {}
    for index, entry in enumerate(entries):
        name = entry.label.casefold()  # some file systems tell no case
        if name in seen:
            yield seen[name], index
        seen.setdefault(name, index)


def slug(text: str) -> str:
    """A name that is also a folder's, on any file system."""
    return _FOREIGN.sub("-", text).strip("-.")[:80] or "unnamed"
