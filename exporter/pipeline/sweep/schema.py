"""What a sweep's file says: models, plans and precisions, and what all of them have in common."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from exporter.artifacts import json_path
from exporter.artifacts.plans import parse_drops
from exporter.artifacts.yaml_file import YamlFile, parse_yaml, read_yaml
from exporter.choose.budgets.budget import SearchOptions
from exporter.compare.options import CompareOptions
from exporter.errors import DepthcutError, OptionError, SweepError
from exporter.files import sha256_bytes
from exporter.heal.options import HealOptions
from exporter.option_types import Dtype
from exporter.options import Options, build, leaves
from exporter.pipeline.request import ExportRequest
from exporter.quantize.settings import QuantizeSettings, Scheme
from exporter.score.options import ScoreOptions

DTYPES: dict[str, Dtype] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""Precisions of both models in float, and how PyTorch calls them."""
_FOREIGN = re.compile(r"[^A-Za-z0-9._+-]+")

Values = dict[str, Any]
"""Values of options of ``depthcut export`` by their keys."""
_At = tuple[str | int, ...]

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
_SECTIONS = {
    "export": ("target", "exporter", "opset", "cache_length", "checkpoint"),
    "scoring": SCORING,
    "shapes": SHAPES,
    "measuring": _keys(CompareOptions, *SHAPES),
}
CHOICE = ("metric", *_keys(SearchOptions))
PLAN = ("plan", *COUNTS, *CHOICE, *_keys(HealOptions, *SCORING, "for"))
PRECISION = ("dtype", *_keys(QuantizeSettings, "gguf"))
_KEEP = ("models", "reports")


class _MistakeError(Exception):
    """What is wrong in the file, and where."""

    def __init__(self, at: _At, words: str) -> None:
        super().__init__(words)
        self.at = at


@dataclass(frozen=True)
class Entry:
    """One line of an axis: its name, as a folder may be called too, and what it says."""

    label: str
    values: Values
    drop: tuple[str, ...] = ()  # a plan by hand


@dataclass(frozen=True)
class SweepFile:
    """The whole file: three axes, and what all cells have in common."""

    models: tuple[Entry, ...]
    plans: tuple[Entry, ...]
    precisions: tuple[Entry, ...]
    common: Values
    keeps_models: bool


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


def _validated(file: YamlFile) -> Sweep:
    try:
        return Sweep(file.path, file.text, _whole(file.data))
    except _MistakeError as error:
        raise SweepError(
            f"{file.place(*error.at)}: {json_path(error.at)}: {error}.",
            "What may stand there: exporter/docs/sweeps.md.",
        ) from error


def _whole(data: Any) -> SweepFile:
    given = _mapping(data, (), (*_AXES, *_SECTIONS, "keep"))
    axes = {axis: _axis(axis, given.get(axis, usual)) for axis, (_, usual) in _AXES.items()}
    common: Values = {}
    for name, keys in _SECTIONS.items():
        values = _values(given.get(name, {}), (name,), keys)
        _check({"drop_joint": 1, **values}, (name,))
        common |= values
    keep = given.get("keep", _KEEP[0])
    if keep not in _KEEP:
        raise _MistakeError(("keep",), f"{keep!r}: it should be {' or '.join(_KEEP)}")
    return SweepFile(**axes, common=common, keeps_models=keep == _KEEP[0])


def _axis(axis: str, given: Any) -> tuple[Entry, ...]:
    if not isinstance(given, list) or not given:
        raise _MistakeError((axis,), "a list of one entry or more is expected here")
    entries: list[Entry] = []
    for number, item in enumerate(given):
        entry = _AXES[axis][0](item, (axis, number))
        name = _text(item, "name", (axis, number)) if isinstance(item, dict) else None
        label = _FOREIGN.sub("-", name or entry.label).strip("-.")[:80] or "unnamed"
        for first, other in enumerate(entries):
            if other.label.casefold() == label.casefold():  # some file systems tell no case
                words = f"{axis}[{first}] and {axis}[{number}] are both called {label}"
                raise _MistakeError((axis, number), f"{words}; give one a name of its own")
        entries.append(Entry(label, entry.values, entry.drop))
    return tuple(entries)


def _mapping(given: Any, at: _At, known: Collection[str]) -> Mapping[str, Any]:
    if not isinstance(given, dict):
        raise _MistakeError(at, "keys and their values are expected here")
    for key in given:
        if key not in known:
            raise _MistakeError((*at, str(key)), "this key is not known here")
    return given


def _text(given: Mapping[str, Any], key: str, at: _At) -> str | None:
    text = given.get(key)
    if text is not None and not (isinstance(text, str) and text.strip()):
        raise _MistakeError((*at, key), f"{text!r}: a text is expected here")
    return None if text is None else text.strip()


def _values(given: Any, at: _At, keys: Collection[str], own: Collection[str] = ()) -> Values:
    """The options of a mapping, read as a configuration file's are."""
    results: Values = {}
    for key, value in _mapping(given, at, (*own, *keys)).items():
        if key not in own:
            try:
                results[key] = _OPTIONS[key].read(value, strict=True)
            except ValueError as error:
                raise _MistakeError((*at, key), str(error).rstrip(".")) from error
    return results


def _check(values: Values, at: _At) -> None:
    """Tells as a mistake what `depthcut export` would refuse."""
    try:
        build(ExportRequest, {"source": "MODEL", "output": Path("OUT"), **values})
    except DepthcutError as error:
        if isinstance(error, OptionError):
            error.say(error.keys)
        raise _MistakeError(at, str(error).rstrip(".")) from error


def _model(item: Any, at: _At) -> Entry:
    """A folder, a GGUF file, or a hub id with its revision."""
    given = {"source": item} if isinstance(item, str) else item
    _mapping(given, at, ("source", "revision", "name"))
    source, revision = (_text(given, key, at) for key in ("source", "revision"))
    if source is None:
        raise _MistakeError(at, "source, the model, is missing")
    name = posixpath.normpath(source).rpartition("/")[2].removesuffix(".gguf")
    return Entry(name, {"source": source, "revision": revision})


def _plan(item: Any, at: _At) -> Entry:
    """A plan's file, sublayers by hand, or numbers; exactly one of them."""
    if isinstance(item, str):
        item = {"plan" if item.strip().endswith(".json") else "drop": item}
    values = _values(item, at, PLAN, ("name", "drop"))
    drop = item.get("drop", ())
    if not isinstance(drop, str | list | tuple):
        raise _MistakeError((*at, "drop"), f"{drop!r}: a text is expected here")
    drop = tuple(drop.split() if isinstance(drop, str) else map(str, drop))
    counted = any(values.get(key) for key in COUNTS)
    if ("plan" in values) + bool(drop) + counted != 1:
        words = "say what to drop in one way: a plan, drop such as attention:25,26, or a number: "
        raise _MistakeError(at, words + ", ".join(COUNTS))
    try:
        parse_drops(drop) if drop else None
    except DepthcutError as error:
        raise _MistakeError(at, str(error).rstrip(".")) from error
    for key in (key for key in values if key in CHOICE and not counted):
        raise _MistakeError(at, f"{key} says how numbers are chosen, and no number is given")
    _check({"plan": Path("plan.json"), **values} if drop else values, at)
    healed = values.get("heal", "none")
    return Entry(_what(values, drop) + (f"+{healed}" if healed != "none" else ""), values, drop)


def _what(values: Values, drop: tuple[str, ...]) -> str:
    """``attention8-cosine``, ``attention-3-4``, or the file's name."""
    if "plan" in values:
        return str(values["plan"].name).removesuffix(".json")
    if drop:
        return "_".join(drop)
    numbers = [f"{COUNTS[key]}{values[key]}" for key in COUNTS if values.get(key)]
    chosen = (values.get(key) for key in ("search", "objective"))
    return "-".join([*numbers, *values.get("metric", ()), *filter(None, chosen)])


def _precision(item: Any, at: _At) -> Entry:
    """In float, or quantised after the cut: ``fp16``, ``int4``, ``int4-hqq``."""
    if isinstance(item, str):
        if item not in (known := (*DTYPES, *get_args(Scheme))):
            raise _MistakeError(at, f"{item!r}: it is no precision; there are {', '.join(known)}")
        item = {"dtype": DTYPES[item]} if item in DTYPES else {"quantize": item}
    values = _values(item, at, PRECISION, ("name",))
    if "calibration" in values and "quantize" not in values:
        raise _MistakeError(at, "calibration is for quantize")
    _check({"drop_joint": 1, **values}, at)
    scheme, block = values.get("quantize"), values.get("block_size")
    dtype = next(name for name, long in DTYPES.items() if long == values.get("dtype", "float32"))
    shown = None if scheme and dtype == "fp32" else dtype
    words = (scheme, values.get("quantize_method"), block and f"block{block}", shown)
    return Entry("-".join(filter(None, words)), values)


_AXES: Mapping[str, tuple[Callable[[Any, _At], Entry], Any]] = {
    "models": (_model, None),
    "plans": (_plan, None),
    "precisions": (_precision, ["fp32"]),
}
"""How an entry of each is read, and what stands there where nothing does."""
