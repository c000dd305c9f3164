"""What a sweep's file says: models, plans and precisions, and what all of them have in common."""

from __future__ import annotations

import functools
import posixpath
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    create_model,
    model_validator,
)
from pydantic_core import ErrorDetails

from exporter.artifacts import json_path
from exporter.artifacts.plans import parse_drops
from exporter.artifacts.yaml_file import YamlFile, parse_yaml, read_yaml
from exporter.choose.budgets.budget import SearchOptions
from exporter.compare.options import CompareOptions
from exporter.errors import DepthcutError, OptionError, SweepError
from exporter.files import sha256_bytes
from exporter.heal.options import HealOptions
from exporter.option_types import Dtype, mistake
from exporter.options import Options, build, leaves
from exporter.pipeline.request import ExportRequest
from exporter.quantize.settings import QuantizeSettings, Scheme
from exporter.score.options import ScoreOptions

Text = Annotated[str, StringConstraints(strict=True, min_length=1, strip_whitespace=True)]

DTYPES: dict[str, Dtype] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""Precisions of both models in float, and how PyTorch calls them."""
_FOREIGN = re.compile(r"[^A-Za-z0-9._+-]+")


Told = dict[str, Any]
"""Values of options of ``depthcut export`` by their keys."""

COUNTS = {
    "drop_attn": "attention",
    "drop_mlp": "mlp",
    "drop_block": "block",
    "drop_joint": "joint",
}
"""Numbers to drop, and of what."""
_OPTIONS = {leaf.key: leaf for leaf in leaves(ExportRequest)}


def _keys(schema: type[Options], *without: str) -> tuple[str, ...]:
    return tuple(leaf.key for leaf in leaves(schema) if leaf.key not in without)


SCORING = _keys(ScoreOptions)
SHAPES = ("prefill", "decode_past", "batch", "generate")
MEASURING = _keys(CompareOptions, *SHAPES)
EXPORT = ("target", "exporter", "opset", "cache_length", "checkpoint")
CHOICE = ("metric", *_keys(SearchOptions))
PLAN = ("plan", *COUNTS, *CHOICE, *_keys(HealOptions, *SCORING, "for"))
PRECISION = ("dtype", *_keys(QuantizeSettings, "gguf"))


@functools.cache
def _model(keys: tuple[str, ...]) -> type[BaseModel]:
    """Reads these options as a configuration file's are read."""
    fields: dict[str, Any] = {
        key: (Annotated[_OPTIONS[key].type, BeforeValidator(_OPTIONS[key].from_yaml)], None)
        for key in keys
    }
    return create_model("Keys", __config__=ConfigDict(extra="forbid", strict=True), **fields)


def _read(given: Any, keys: tuple[str, ...]) -> Told:
    model = _model(keys).model_validate(given)
    return {key: getattr(model, key) for key in keys if key in model.model_fields_set}


def _split(given: Any, own: Collection[str], keys: tuple[str, ...]) -> Any:
    """An entry with its options among themselves."""
    if not isinstance(given, dict):
        return given
    values = {key: value for key, value in given.items() if key not in own}
    return {**{key: given[key] for key in own if key in given}, "told": _read(values, keys)}


def _check(value: Told) -> None:
    """Tells as a mistake what `depthcut export` would refuse."""
    try:
        build(ExportRequest, {"source": "MODEL", "output": Path("OUT"), **value})
    except DepthcutError as error:
        if isinstance(error, OptionError):
            error.say(error.keys)
        raise ValueError(str(error)) from error


def _section(keys: tuple[str, ...]) -> BeforeValidator:
    def read(given: Any) -> Told:
        result = _read(given, keys)
        _check({"drop_joint": 1, **result})
        return result

    return BeforeValidator(read)


class Entry(BaseModel):
    """A part of the file; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class NamedEntry(Entry):
    """One line of an axis of the sweep."""

    name: Text | None = None  # None takes a name from what it says

    @property
    def label(self) -> str:
        """Its name, as a folder may be called too."""
        return _FOREIGN.sub("-", self.name or self.described()).strip("-.")[:80] or "unnamed"

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


class KeyedEntry(NamedEntry):
    """An entry that says options of ``depthcut export``."""

    told: Told = Field(default_factory=dict)


class PlanEntry(KeyedEntry):
    """What is dropped: a plan's file, sublayers by hand, or numbers; exactly one of them."""

    drop: tuple[Text, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _read(cls, given: Any) -> Any:
        if isinstance(given, str):
            given = {"plan" if given.strip().endswith(".json") else "drop": given}
        if isinstance(given, dict) and isinstance(given.get("drop"), str):
            given = {**given, "drop": given["drop"].split()}
        return _split(given, ("name", "drop"), PLAN)

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        counted = any(self.told.get(key) for key in COUNTS)
        if ("plan" in self.told) + bool(self.drop) + counted != 1:
            raise ValueError(
                "say what to drop in one way: a plan, drop such as attention:25,26, or a number: "
                + ", ".join(COUNTS)
            )
        _refuse_unreadable(self.drop)
        idle = [key for key in self.told if key in CHOICE]
        if idle and not counted:
            raise ValueError(f"{idle[0]} says how numbers are chosen, and no number is given")
        _check({"plan": Path("plan.json"), **self.told} if self.drop else self.told)
        return self

    def described(self) -> str:
        """``attention8-cosine``, ``attention-3-4``, the file's name; what is put in follows."""
        result = self.told
        if result.get("heal", "none") == "none":
            return self._what()
        return f"{self._what()}+{result['heal']}"

    def _what(self) -> str:
        if "plan" in self.told:
            return str(self.told["plan"].name).removesuffix(".json")
        if self.drop:
            return "_".join(self.drop)
        numbers = [f"{COUNTS[key]}{self.told[key]}" for key in COUNTS if self.told.get(key)]
        chosen = (self.told.get(key) for key in ("search", "objective"))
        return "-".join([*numbers, *self.told.get("metric", ()), *filter(None, chosen)])


def _refuse_unreadable(drops: Sequence[str]) -> None:
    """Tells what is no drop as what pydantic takes for a mistake."""
    try:
        parse_drops(drops) if drops else None
    except DepthcutError as error:
        raise ValueError(str(error)) from error


class PrecisionEntry(KeyedEntry):
    """In what both models are compared: in float, or quantised after the cut."""

    @model_validator(mode="before")
    @classmethod
    def _read(cls, given: Any) -> Any:
        if isinstance(given, str):
            if given not in (*DTYPES, *get_args(Scheme)):
                known = ", ".join((*DTYPES, *get_args(Scheme)))
                raise ValueError(f"{given!r} is no precision; there are {known}")
            given = {"dtype": DTYPES[given]} if given in DTYPES else {"quantize": given}
        return _split(given, ("name",), PRECISION)

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if "calibration" in self.told and "quantize" not in self.told:
            raise ValueError("calibration is for quantize")
        _check({"drop_joint": 1, **self.told})
        return self

    def described(self) -> str:
        """``fp16``, ``int4``, ``int4-hqq``."""
        result = self.told
        scheme, block = result.get("quantize"), result.get("block_size")
        dtype = next(
            name for name, long in DTYPES.items() if long == result.get("dtype", "float32")
        )
        shown = None if scheme and dtype == "fp32" else dtype
        words = (scheme, result.get("quantize_method"), block and f"block{block}", shown)
        return "-".join(filter(None, words))


class SweepFile(Entry):
    """The whole file: three axes, and what all cells have in common."""

    models: Annotated[tuple[ModelEntry, ...], Field(min_length=1)]
    plans: Annotated[tuple[PlanEntry, ...], Field(min_length=1)]
    precisions: Annotated[tuple[PrecisionEntry, ...], Field(min_length=1)] = (PrecisionEntry(),)
    shapes: Annotated[Told, _section(SHAPES)] = Field(default_factory=dict)
    scoring: Annotated[Told, _section(SCORING)] = Field(default_factory=dict)
    measuring: Annotated[Told, _section(MEASURING)] = Field(default_factory=dict)
    export: Annotated[Told, _section(EXPORT)] = Field(default_factory=dict)
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


_MOST_TOLD = 5
_HINT = "What may stand there: exporter/docs/sweeps.md."


@dataclass(frozen=True)
class Sweep:
    """A sweep as it was asked for."""

    path: Path
    text: str
    file: SweepFile

    @property
    def sha256(self) -> str:
        """Of the file."""
        return sha256_bytes(self.text.encode())


def read_sweep(path: Path) -> Sweep:
    """Reads and validates a sweep's file. Names in it are not looked up."""
    return _validated(read_yaml(path, SweepError))


def parse_sweep(text: str, path: Path) -> Sweep:
    """The same of a text that was read before."""
    return _validated(parse_yaml(text, path, SweepError))


def _validated(yaml_file: YamlFile) -> Sweep:
    try:
        return Sweep(yaml_file.path, yaml_file.text, SweepFile.model_validate(yaml_file.data))
    except ValidationError as error:
        raise SweepError("\n".join(_mistakes(error, yaml_file)), _HINT) from error


def _mistakes(error: ValidationError, file: YamlFile) -> Iterator[str]:
    details = _deepest(error.errors(include_url=False))
    for one in details[:_MOST_TOLD]:
        words = mistake(one)
        yield f"{file.place(*one['loc'])}: {json_path(one['loc'])}: {words}."
    if len(details) > _MOST_TOLD:
        yield f"And {len(details) - _MOST_TOLD} more."


def _deepest(details: Sequence[ErrorDetails]) -> list[ErrorDetails]:
    """Without what is only said because something within is wrong."""
    places = [one["loc"] for one in details]
    return [
        one
        for one in details
        if not any(len(p) > len(one["loc"]) and p[: len(one["loc"])] == one["loc"] for p in places)
    ]
