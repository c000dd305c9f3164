"""What a stage can be told: each option once, with its type, default and help, and the rules."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, ClassVar, Literal, Self, TypeVar, cast, get_type_hints

from pydantic import ConfigDict, ValidationError, model_validator
from pydantic.dataclasses import dataclass as dataclass
from pydantic_core import ArgsKwargs

from exporter.errors import OptionError
from exporter.option_types import OptionType, bare_type, mistake

_LOOK = "depthcut"
_S = TypeVar("_S", bound="Options")
_F = TypeVar("_F", bound=Callable[..., Any])


def _remembered(function: _F) -> _F:
    """As functools.cache, whose type takes no classes of pydantic's for hashable."""
    return cast(_F, functools.cache(function))


asked_keys: ContextVar[Collection[str]] = ContextVar("asked_keys", default=())
"""The options on the command line: given, even with their default's value. A key of a file with
that value is not, since ``--show-config`` writes them all."""

running_command: ContextVar[tuple[str, ...] | None] = ContextVar("running_command", default=None)
"""The command that is running with what was asked of it, as files name it; None: sys.argv's."""


@dataclasses.dataclass(frozen=True)
class Look:
    """How an option is shown."""

    help: str = ""
    names: tuple[str, ...] = ()
    section: str = ""  # its heading; empty: the class's
    rare: bool = False
    config_only: bool = False
    usual: str = ""  # what a default of None stands for
    metavar: str | None = None  # what its value is called; None: as its type says
    bare: str | None = None  # what it is where only its name is given; None: its name wants a value
    argument: bool = False
    required: bool = False
    brief: str = ""


@dataclasses.dataclass(frozen=True)
class Nested:
    """How the options of another stage are taken in."""

    switch: str | None = None  # None: there always is
    off: str | None = None
    optional: bool = False
    without: Collection[str] = ()
    shared: Collection[str] = ()
    config_only: Collection[str] = ()
    rare: Collection[str] = ()
    section: str | None = None  # the heading for all of it; None: their own

    def shows(self, look: Look, name: str) -> Look:
        """How one of them is shown here."""
        return dataclasses.replace(
            look,
            section=self.section or look.section,
            rare=look.rare or name in self.rare,
            config_only=look.config_only or name in self.config_only,
        )


def option(default: Any, help: str, *names: str, **look: Any) -> Any:  # noqa: A002
    """A field of :class:`Options`; see :class:`Look`."""
    return dataclasses.field(default=default, metadata={_LOOK: Look(help, names, **look)})


def required(help: str, *names: str, **look: Any) -> Any:  # noqa: A002
    """A field without a default."""
    return dataclasses.field(metadata={_LOOK: Look(help, names, required=True, **look)})


def argument(metavar: str, **default: Any) -> Any:
    """A field that is a command's argument; with a ``default`` it may be left away."""
    look = Look(metavar=metavar, argument=True, required=not default)
    return dataclasses.field(**default, metadata={_LOOK: look})


def part(default: Any = dataclasses.MISSING, **how: Any) -> Any:
    """A field that holds the options of another stage; see :class:`Nested`."""
    look = Nested(**how)
    if default is dataclasses.MISSING and (look.switch is not None or look.optional):
        default = None
    return dataclasses.field(default=default, metadata={_LOOK: look})


@dataclasses.dataclass(frozen=True)
class Rule:
    """What must hold among the fields of a class; names may lead into parts: ``load.revision``."""

    names: tuple[str, ...]
    broken: Callable[[Any], bool]
    message: str
    hint: str = ""
    code: str = ""

    def check(self, told: Any) -> None:
        """Raises an OptionError where it is broken."""
        if self.broken(told):
            keys = [key_at(type(told), name) for name in self.names]
            words = list(map(flag, keys))
            message, hint = self.message.format(*words), self.hint.format(*words)
            raise OptionError(message, hint, keys, code=self.code)


def only_with(name: str, *others: str, hint: str = "Give both, or neither.") -> Rule:
    """A rule: the first is given only where one of the others is."""
    words = " or ".join(f"{{{index}}}" for index, _ in enumerate(others, 1))
    names = (name, *others)
    return Rule(
        names,
        lambda item: is_given(item, name) and not any(is_given(item, other) for other in others),
        f"{{0}} is for {words}.",
        hint,
    )


def excludes(name: str, other: str, why: str = "") -> Rule:
    """A rule: not both are given."""
    return Rule(
        (name, other),
        lambda item: is_given(item, name) and is_given(item, other),
        f"{{0}} and {{1}} exclude each other{': ' if why else ''}{why}.",
        "Leave one of them out.",
    )


def value_at(told: Any, name: str) -> Any:
    """A field, or one of a part; None where there is no such part."""
    for attribute in name.split("."):
        told = None if told is None else getattr(told, attribute)
    return told


def is_given(told: Any, name: str) -> bool:
    """Whether a field, or one of a part, is asked for, or other than where nothing is said."""
    head, _, rest = name.partition(".")
    value = getattr(told, head)
    if rest:
        return value is not None and is_given(value, rest)
    if key_at(type(told), head) in asked_keys.get():
        return True
    default = next(field.default for field in dataclasses.fields(told) if field.name == head)
    return bool(value != default)


class _BrokenRuleError(ValueError):
    """What pydantic takes for a mistake, so that objects within others tell their place."""

    def __init__(self, told: OptionError) -> None:
        super().__init__(str(told))
        self.told = told


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Options:
    """The base of all options: what is wrong is an OptionError with the options' names."""

    rules: ClassVar[Sequence[Rule]] = ()
    section: ClassVar[str] = "Options"

    @model_validator(mode="after")
    def _holds_rules(self) -> Self:
        try:
            for rule in self.rules:
                rule.check(self)
        except OptionError as error:
            raise _BrokenRuleError(error) from error
        return self

    @model_validator(mode="wrap")
    @classmethod
    def _named_errors(cls, data: Any, handler: Callable[[Any], Any]) -> Any:
        try:
            return handler(data)
        except ValidationError as error:
            if not isinstance(data, ArgsKwargs):  # within another object, which tells the place
                raise
            text = error.errors(include_url=False)[0]
            broken = text.get("ctx", {}).get("error")
            if isinstance(broken, _BrokenRuleError):
                raise broken.told from None
            place = text["loc"][0] if text["loc"] else ""
            own = [field.name for field in dataclasses.fields(cls)]
            name = own[place] if isinstance(place, int) else place  # a value without a name
            keys = [key_at(cls, name)] if name in own else []
            word = flag(keys[0]) if keys else name
            raise OptionError(f"{word}: {mistake(text)}.", "", keys) from None

    @classmethod
    def settle(cls, told: Mapping[str, Any]) -> Mapping[str, Any]:
        """Values by their keys with what follows from them; for :func:`build`."""
        return told


@dataclasses.dataclass(frozen=True)
class Leaf(OptionType):
    """One option of a class or of its parts."""

    path: tuple[str, ...]
    key: str
    default: Any
    look: Look
    off: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """As the command line has them; of a switch, both of its long ones."""
        names = self.look.names or (flag(self.key),)
        if self.is_flag and "/" not in names[-1]:
            return (*names[:-1], f"{names[-1]}/--no-{names[-1][2:]}")
        return names


@_remembered
def leaves(schema: type[Options]) -> tuple[Leaf, ...]:
    """All options of a class and its parts, in their order, each once."""
    by_key: dict[str, Leaf] = {}
    for leaf in _leaves(schema):
        by_key.setdefault(leaf.key, leaf)
    return tuple(by_key.values())


def _leaves(schema: type[Options]) -> Iterator[Leaf]:
    hints = _hints(schema)
    for field in dataclasses.fields(schema):
        look = field.metadata.get(_LOOK)
        if isinstance(look, Look):
            key, section = _key(field.name, look), look.section or schema.section
            look = dataclasses.replace(look, section=section)
            yield Leaf(hints[field.name], (field.name,), key, field.default, look)
        elif isinstance(look, Nested):
            for leaf in _leaves(bare_type(hints[field.name])):
                name = leaf.path[-1]
                if name not in look.without and name not in look.shared:
                    path, shown = (field.name, *leaf.path), look.shows(leaf.look, name)
                    leaf = dataclasses.replace(leaf, path=path, look=shown)
                    yield leaf if look.switch is None else _switched(leaf, look)


def _switched(leaf: Leaf, look: Nested) -> Leaf:
    """An option of a part that there may not be."""
    default = None if leaf.default is dataclasses.MISSING else leaf.default
    shown = dataclasses.replace(leaf.look, required=False)
    if leaf.path[-1] != look.switch:
        return dataclasses.replace(leaf, default=default, look=shown)
    kind = leaf.type if look.off is None else Literal[(look.off, *leaf.choices)]
    return dataclasses.replace(leaf, type=kind, default=None, look=shown, off=look.off)


def build(schema: type[_S], told: Mapping[str, Any]) -> _S:
    """An object of a class with its parts."""
    told, values = schema.settle(told), dict[str, Any]()
    for field in dataclasses.fields(schema):
        look = field.metadata.get(_LOOK)
        if isinstance(look, Look):
            key = _key(field.name, look)
            if key in told:
                values[field.name] = told[key]
        elif isinstance(look, Nested):
            values[field.name] = _built_part(bare_type(_hints(schema)[field.name]), look, told)
    return schema(**values)


def _built_part(schema: type[Options], look: Nested, items: Mapping[str, Any]) -> Options | None:
    own = {leaf.key: leaf for leaf in leaves(schema) if leaf.path[-1] not in look.without}
    value = items.get(switch := key_at(schema, look.switch)) if look.switch is not None else True
    if value is None or value == look.off:
        for key, leaf in own.items():
            mine = key != switch and leaf.path[-1] not in look.shared
            said = key in asked_keys.get() or (key in items and items[key] != leaf.default)
            if mine and said:
                words = f"{flag(key)} is for {flag(switch)}."
                raise OptionError(words, "Give both, or neither.", [key, switch])
        return None
    made = build(schema, {key: items[key] for key in own if key in items})
    asked_for = any(is_given(made, field.name) for field in dataclasses.fields(schema))
    return None if look.optional and not asked_for else made


def values_of(told: Options) -> dict[str, Any]:
    """The values of an object and its parts by their keys; of a part that is None, the defaults."""
    return {leaf.key: _value_at(told, leaf) for leaf in leaves(type(told))}


def _value_at(value: Any, leaf: Leaf) -> Any:
    for name in leaf.path:
        if value is None:
            return leaf.off or (None if leaf.default is dataclasses.MISSING else leaf.default)
        value = getattr(value, name)
    return value


def flag(key: str) -> str:
    """The option of a key: ``--drop-attn``."""
    return f"--{key.replace('_', '-')}"


def _key(name: str, look: Look) -> str:
    long = [item for item in look.names if item.startswith("--")]
    return long[0].partition("/")[0][2:].replace("-", "_") if long else name


def key_at(schema: type[Any], name: str) -> str:
    """The key of a field, or of one of a part; of a part itself, its switch's."""
    head, _, rest = name.partition(".")
    if rest:
        return key_at(bare_type(_hints(schema)[head]), rest)
    look = next(f.metadata.get(_LOOK) for f in dataclasses.fields(schema) if f.name == head)
    if isinstance(look, Nested):
        return key_at(bare_type(_hints(schema)[head]), look.switch) if look.switch else head
    return _key(head, look) if isinstance(look, Look) else head


@_remembered
def _hints(schema: type[Any]) -> dict[str, Any]:
    return get_type_hints(schema, include_extras=True)
