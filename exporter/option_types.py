"""The types of options: how values are written on a command line and in a YAML file."""

from __future__ import annotations

import functools
import re
import types
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import AfterValidator, BeforeValidator, Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from exporter.errors import DepthcutError


@dataclass(frozen=True)
class Written:
    """How the values of a type are written, as a mark in an ``Annotated``."""

    metavar: str | None = None
    listed: bool = False  # several in one word, with commas between them
    choices: tuple[Any, ...] = ()
    path: str | None = None


def bare_type(hint: Any) -> Any:
    """A type without its marks and without None."""
    if get_origin(hint) is Annotated:
        return bare_type(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        others = [argument for argument in get_args(hint) if argument is not type(None)]
        return bare_type(others[0]) if len(others) == 1 else hint
    return hint


def _writings(hint: Any) -> Iterator[Written]:
    """The marks of a type, and of its type beside None, that say how it is written."""
    if get_origin(hint) is Annotated:
        inner, *marks = get_args(hint)
        yield from (mark for mark in marks if isinstance(mark, Written))
        yield from _writings(inner)
    elif get_origin(hint) in (Union, types.UnionType):
        for argument in get_args(hint):
            yield from _writings(argument)


def frozen(value: Any, hint: Any) -> Any:
    """Lists as tuples and paths as such: YAML has neither, and strict validation wants them."""
    if isinstance(value, list):
        return tuple(frozen(item, get_args(bare_type(hint))[:1] or None) for item in value)
    return Path(value) if isinstance(value, str) and bare_type(hint) is Path else value


_NOUNS = {"int": "a whole number", "float": "a number", "bool": "true or false", "string": "a text"}
_BOUNDS = {
    "greater_than_equal": "{ge} is the least",
    "less_than_equal": "{le} is the most",
    "greater_than": "it has to be above {gt}",
    "less_than": "it has to be below {lt}",
}


def mistake(details: ErrorDetails) -> str:
    """What pydantic has found, with what was given; without a full stop."""
    if (kind := details["type"]) in ("extra_forbidden", "unexpected_keyword_argument"):
        return "this key is not known here"
    given, words = details.get("input"), details["msg"].removeprefix("Value error, ").rstrip(".")
    if noun := _NOUNS.get(kind.removesuffix("_type").removesuffix("_parsing")):
        words = f"{noun} is expected here"
    elif kind in _BOUNDS:
        words = _BOUNDS[kind].format(**details["ctx"])
    shown = f"{given!r}: " if isinstance(given, str | int | float) else ""
    return shown + words.replace("Input should", "it should", 1)


_adapter = functools.cache(TypeAdapter[Any])


def _validated(hint: Any, value: Any, *, strict: bool = False) -> Any:
    try:
        return _adapter(hint).validate_python(value, strict=strict)
    except ValidationError as error:
        raise ValueError(mistake(error.errors(include_url=False)[0])) from None


@dataclass(frozen=True)
class OptionType:
    """How the values of an option are read."""

    type: Any

    @property
    def written(self) -> Written:
        """How its values are written."""
        return next(_writings(self.type), Written())

    @property
    def width(self) -> int:
        """How many values are given at once; 0: the option can be given several times."""
        inner = get_args(bare_type(self.type)) if self.is_tuple else ()
        return 0 if inner[1:] == (...,) else len(inner) or 1

    @property
    def is_tuple(self) -> bool:
        """Whether a value is several words."""
        return get_origin(bare_type(self.type)) is tuple and not self.written.listed

    @property
    def item(self) -> Any:
        """The type of one value."""
        return get_args(bare_type(self.type))[0] if self.is_tuple else self.type

    @property
    def place(self) -> str | None:
        """What has to be at the path that it is; see :class:`Written`."""
        return next((one.path for one in _writings(self.item) if one.path is not None), None)

    @property
    def choices(self) -> tuple[Any, ...]:
        """The values that there are; empty: no such list."""
        literal = bare_type(self.item)
        known = get_args(literal) if get_origin(literal) is Literal else ()
        return next((one.choices for one in _writings(self.item)), known)

    @property
    def is_flag(self) -> bool:
        """Whether it is a switch."""
        return bare_type(self.type) is bool

    def from_yaml(self, value: Any) -> Any:
        """YAML's lists and paths as validation wants them; one of several may stand alone."""
        if self.written.metavar == "SHARE" and isinstance(value, float):
            value = str(value)  # as a text, it is refused above 1 without a percent sign
        several = self.width == 0 and isinstance(value, str)
        return frozen([value] if several else value, self.type)

    def read(self, value: Any, *, strict: bool = False) -> Any:
        """A value as the option's type has it."""
        if self.written.listed and isinstance(value, str | int) and not isinstance(value, bool):
            value, strict = str(value), False  # a list as the command line has it
        return _validated(self.type, self.from_yaml(value) if strict else value, strict=strict)

    def read_item(self, text: str) -> Any:
        """One value as text."""
        return _validated(self.item, text)


def _split(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    parts = [part.strip() for part in value.split(",")]
    if value and not all(parts):
        raise ValueError("names stand between commas, such as a,b")
    return tuple(dict.fromkeys(filter(None, parts)))


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number is expected here")
    return value


comma_list = BeforeValidator(_split)
"""Reads a tuple from a text with commas."""

Integer = Annotated[int, BeforeValidator(_no_bool)]
Float = Annotated[float, BeforeValidator(_no_bool)]
Count = Annotated[Integer, Field(ge=1), Written("N")]
Whole = Annotated[Integer, Field(ge=0), Written("N")]
Several = Annotated[Integer, Field(ge=2), Written("N")]
WholeOrNone = Annotated[
    Integer,
    Field(ge=0),
    BeforeValidator(lambda value: 0 if value == "none" else value),
    Written("N|none"),
]
"""A whole number; ``none`` is 0."""
Seed = Annotated[Integer, Written("N")]
Lengths = Annotated[tuple[Count, ...], BeforeValidator(_split), Written("N,N", True)]
"""Token counts: ``128,512``."""
Names = Annotated[tuple[str, ...], BeforeValidator(_split), Written("NAME,NAME", True)]
"""Names, each once: ``arc_easy,piqa``."""
Dtype = Literal["float32", "float16", "bfloat16"]
Provider = Literal["cpu", "cuda"]
Engine = Literal["tensorrt-rtx", "tensorrt"]

InputFile = Annotated[Path, Written("FILE", path="file")]
InputFolder = Annotated[Path, Written("DIR", path="folder")]
InputPath = Annotated[Path, Written("PATH", path="any")]
OnnxFile = Annotated[Path, Written("MODEL", path="onnx")]
OutputFile = Annotated[Path, Written("FILE", path="new_file")]
OutputFolder = Annotated[Path, Written("DIR", path="new_folder")]
OutputPath = Annotated[Path, Written("PATH", path="new")]
Arm = Annotated[str, Written("ARM", path="arm")]
"""A path, or a kind with a path behind it such as ``torch:DIR``."""


def one_of(names: Collection[str]) -> Any:
    """A text that is one of these, which a registry holds."""

    def known(value: str) -> str:
        if value not in names:
            raise ValueError(f"it is one of {', '.join(names)}")
        return value

    return Annotated[str, AfterValidator(known), Written("NAME", choices=tuple(names))]


Threads = Annotated[
    Count | None,
    BeforeValidator(lambda value: None if value == "auto" else value),
    Written("N|auto"),
]
"""CPU threads; None, ``auto``: the physical cores that the process may use."""


def parsed(parse: Callable[[str], Any]) -> BeforeValidator:
    """Reads texts by a function whose errors are ours; other values pass."""

    def read(value: Any) -> Any:
        try:
            return parse(value) if isinstance(value, str) else value
        except DepthcutError as error:
            raise ValueError(str(error)) from error

    return BeforeValidator(read)


def _matched(pattern: str, text: str, such: str) -> re.Match[str]:
    match = re.fullmatch(pattern, text.strip(), re.IGNORECASE)
    if match is None:
        raise ValueError(f"write {such}")
    return match


def amount(text: Any, such: str = "a number or a percentage, such as 1.1 or 110%") -> Any:
    """Reads ``3%`` or ``0.03`` as 0.03; a number passes."""
    if not isinstance(text, str):
        return text
    match = _matched(r"([+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:e[+-]?\d+)?)\s*(%)?", text, such)
    return float(match[1]) / (100 if match[2] else 1)


def share(text: Any) -> Any:
    """Reads an amount that is a share; ``3`` is refused, since 3 % is meant and 300 % is not.

    A float passes: it was read before.
    """
    value = amount(text, "a share as 0.03 or 3%")
    if isinstance(text, str | int) and value > 1 and "%" not in str(text):
        raise ValueError(f"that is {100 * value:g} %; write {value:g}% or {value / 100:g}")
    return value


def size(text: str) -> int:
    """Reads ``8GB``, ``500 MB``, ``2GiB`` or ``0`` as bytes."""
    match = _matched(r"(\d+(?:\.\d+)?) ?([KMGT]?)(i?)B?", text, "a size as 8GB, 500MB or 2GiB")
    base = 1024 if match[3] else 1000
    return int(Fraction(match[1]) * base ** "_KMGT".index(match[2].upper() or "_"))


def _seconds(text: str) -> float:
    match = _matched(r"(\d+(?:\.\d+)?) ?(s|m|min|h)?", text, "a time as 60s or 2m")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[(match[2] or "s")[0].lower()]


def _tokens(text: str) -> int:
    match = _matched(r"(\d+)\s*(k)?", text, "a number of tokens as 32k or 32768")
    return int(match[1]) * (1024 if match[2] else 1)


PositiveNumber = Annotated[Float, Field(gt=0, allow_inf_nan=False), Written("X")]
Amount = Annotated[Float, BeforeValidator(lambda text: amount(text)), Written("NUMBER")]
"""A number, or percent: ``1.1`` or ``110%``."""

Share = Annotated[Float, BeforeValidator(share), Written("SHARE")]
"""A share: ``3%`` or ``0.03``, and no ``3``."""
OpenShare = Annotated[Float, Field(gt=0, lt=1), BeforeValidator(share), Written("SHARE")]
"""A share between 0 and 1, without the two."""
Size = Annotated[Integer, Field(ge=0), parsed(size), Written("SIZE")]
"""Bytes: ``8GB``, ``2GiB``."""
Duration = Annotated[Float, Field(gt=0, allow_inf_nan=False), parsed(_seconds), Written("TIME")]
"""Seconds: ``60s``, ``2m``."""
Tokens = Annotated[Integer, Field(ge=1), parsed(_tokens), Written("TOKENS")]
"""A number of tokens: ``32k``."""
