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
    text: Callable[[Any], str] = str
    listed: bool = False
    none: str | None = None  # the word for None
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


_MISTAKES = {
    "missing": "this is missing",
    "extra_forbidden": "this key is not known here",
    "model_type": "keys and their values are expected here",
    "tuple_type": "a list is expected here",
    "int_type": "a whole number is expected here",
    "int_parsing": "this is no whole number",
    "int_from_float": "this is no whole number",
    "float_type": "a number is expected here",
    "float_parsing": "this is no number",
    "bool_type": "true or false is expected here",
    "string_type": "a text is expected here",
    "path_type": "a path is expected here",
    "is_instance_of": "a path is expected here",
    "greater_than_equal": "{ge} is the least",
    "greater_than": "it has to be above {gt}",
    "less_than_equal": "{le} is the most",
    "less_than": "it has to be below {lt}",
    "literal_error": "it is one of {expected}",
}
_ABOUT_KEYS = ("missing", "extra_forbidden")


def mistake(found: ErrorDetails) -> str:
    """What pydantic has found, in our words; without a full stop."""
    words = _MISTAKES.get(found["type"], found["msg"].removeprefix("Value error, "))
    given = found.get("input")
    shown = isinstance(given, str | int | float) and found["type"] not in _ABOUT_KEYS
    result = f"{given!r}: " if shown else ""
    return result + words.format(**found.get("ctx", {})).rstrip(".")


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


def _joined(value: Any) -> str:
    return ",".join(map(str, value))


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number is expected here")
    return value


comma_list = BeforeValidator(_split)
"""Reads a tuple from a text with commas."""

Count = Annotated[int, Field(ge=1), BeforeValidator(_no_bool), Written("N")]
"""A whole number from 1 on."""
Whole = Annotated[int, Field(ge=0), BeforeValidator(_no_bool), Written("N")]
"""A whole number from 0 on."""
Several = Annotated[int, Field(ge=2), BeforeValidator(_no_bool), Written("N")]
"""A whole number from 2 on."""
WholeOrNone = Annotated[
    int,
    Field(ge=0),
    BeforeValidator(_no_bool),
    BeforeValidator(lambda value: 0 if value == "none" else value),
    Written("N|none", lambda value: str(value or "none")),
]
"""A whole number; ``none`` is 0."""
Seed = Annotated[int, BeforeValidator(_no_bool), Written("N")]
Lengths = Annotated[tuple[Count, ...], BeforeValidator(_split), Written("N,N", _joined, True)]
"""Token counts: ``128,512``."""
Names = Annotated[tuple[str, ...], BeforeValidator(_split), Written("NAME,NAME", _joined, True)]
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


def _number_or_auto(value: Any) -> Any:
    if isinstance(value, str) and value != "auto" and not value.isdecimal():
        raise ValueError("a whole number or auto is expected here")
    return value


Threads = Annotated[
    Count | None,
    BeforeValidator(lambda value: None if value == "auto" else value),
    BeforeValidator(_number_or_auto),
    Written("N|auto", none="auto"),
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


_AMOUNT = re.compile(r"(?P<number>[+-]?(\d+(\.\d*)?|\.\d+)(e[+-]?\d+)?)\s*(?P<percent>%)?", re.I)
_SIZE = re.compile(r"(?P<number>\d+(\.\d+)?) ?(?P<prefix>[KMGT])?(?P<binary>i)?B?", re.I)
_TIME = re.compile(r"(?P<number>\d+(\.\d+)?) ?(?P<unit>s|m|min|h)?")
_SECONDS = {None: 1, "s": 1, "m": 60, "min": 60, "h": 3600}
_TOKENS = re.compile(r"(?P<number>\d+)\s*(?P<thousands>k)?", re.I)


def amount(text: Any, such: str = "1.1 or 110%") -> float:
    """Reads ``3%`` or ``0.03`` as 0.03; a number passes."""
    if isinstance(text, int | float):
        return float(_no_bool(text))
    match = _AMOUNT.fullmatch(text.strip()) if isinstance(text, str) else None
    if match is None:
        raise ValueError(f"a number or a percentage is expected, such as {such}")
    number = float(match["number"])
    return number / 100 if match["percent"] else number


def share(text: Any) -> float:
    """Reads an amount that is a share; ``3`` is refused, since 3 % is meant and 300 % is not.

    A float passes: it was read before.
    """
    value = amount(text, "0.03 or 3%")
    if isinstance(text, float):
        return value
    if value > 1 and "%" not in str(text):
        raise ValueError(f"that is {100 * value:g} %; write {value:g}% or {value / 100:g}")
    return value


def size(text: Any) -> Any:
    """Reads ``8GB``, ``500 MB``, ``2GiB`` or ``0`` as bytes; a number passes."""
    if not isinstance(text, str):
        return text
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError("write a size as 8GB, 500MB or 2GiB")
    base = 1024 if match["binary"] else 1000
    return int(Fraction(match["number"]) * base ** " KMGT".index((match["prefix"] or " ").upper()))


def _seconds(text: Any) -> Any:
    if not isinstance(text, str):
        return text
    match = _TIME.fullmatch(text.strip())
    if match is None:
        raise ValueError("write a time as 60s or 2m")
    return float(match["number"]) * _SECONDS[match["unit"]]


def _tokens(text: Any) -> Any:
    if not isinstance(text, str):
        return text
    match = _TOKENS.fullmatch(text.strip())
    if match is None:
        raise ValueError("write a number of tokens as 32k or 32768")
    return int(match["number"]) * (1024 if match["thousands"] else 1)


PositiveNumber = Annotated[
    float, Field(gt=0, allow_inf_nan=False), BeforeValidator(_no_bool), Written("X")
]
"""A number above 0."""
Amount = Annotated[float, BeforeValidator(lambda text: amount(text)), Written("NUMBER")]
"""A number, or percent: ``1.1`` or ``110%``."""


def _share_text(value: float) -> str:
    return f"{100 * value:.12g}%" if value > 1 else str(value)


Share = Annotated[float, BeforeValidator(share), Written("SHARE", _share_text)]
"""A share: ``3%`` or ``0.03``, and no ``3``."""
OpenShare = Annotated[float, Field(gt=0, lt=1), BeforeValidator(share), Written("SHARE")]
"""A share between 0 and 1, without the two."""
Size = Annotated[int, Field(ge=0), BeforeValidator(size), Written("SIZE")]
"""Bytes: ``8GB``, ``2GiB``."""
Duration = Annotated[
    float, Field(gt=0, allow_inf_nan=False), BeforeValidator(_seconds), Written("TIME")
]
"""Seconds: ``60s``, ``2m``."""
Tokens = Annotated[int, Field(ge=1), BeforeValidator(_tokens), Written("TOKENS")]
"""A number of tokens: ``32k``."""
