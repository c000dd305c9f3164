"""What a stage can be asked for: each option once, with type, default and help, and the rules."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from inspect import get_annotations
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


@dataclasses.dataclass(frozen=True)
class Look:
    """How an option is shown; an argument of a command has a metavar and no help."""

    help: str = ""
    names: tuple[str, ...] = ()
    section: str = ""  # its heading; empty: the class's
    rare: bool = False
    config_only: bool = False
    usual: str = ""  # what a default of None stands for
    metavar: str | None = None  # what its value is called; None: as its type says
    bare: str | None = None  # what it is where only its name is given; None: its name wants a value

    @property
    def argument(self) -> bool:
        """Whether it is a command's argument."""
        return not self.help


def option(default: Any, help: str, *names: str, **look: Any) -> Any:  # noqa: A002
    """A field of :class:`Options`; see :class:`Look`."""
    return dataclasses.field(default=default, metadata={_LOOK: Look(help, names, **look)})


def required(help: str, *names: str, **look: Any) -> Any:  # noqa: A002
    """A field without a default."""
    return dataclasses.field(metadata={_LOOK: Look(help, names, **look)})


def argument(metavar: str) -> Any:
    """A field that is a command's argument."""
    return dataclasses.field(metadata={_LOOK: Look(metavar=metavar)})


def part(default: Any = dataclasses.MISSING, *, without: Collection[str] = ()) -> Any:
    """A field that holds the options of another stage, some of them left out.

    One that may be None is None unless one of its options is said, or the one that switches it on.
    """
    return dataclasses.field(default=default, metadata={_LOOK: frozenset(without)})


@dataclasses.dataclass(frozen=True)
class Rule:
    """What must hold among the fields of a class; names may lead into parts: ``load.revision``.

    ``{0}`` in message and hint is the first of them, as the reader calls it.
    """

    names: tuple[str, ...]
    broken: Callable[[Any], bool]
    message: str
    hint: str = ""
    code: str = "options-clash"

    def check(self, given: Any) -> None:
        """Raises an OptionError where it is broken."""
        if self.broken(given):
            raise refusal(given, self.names, self.message, self.hint, self.code)


def refusal(given: Any, names: Sequence[str], message: str, hint: str, code: str) -> OptionError:
    """An error about fields of an object; ``{0}`` is the first of them."""
    return OptionError(message, hint, {n: key_at(type(given), n) for n in names}, code=code)


def idle(names: tuple[str, ...], when: Callable[[Any], bool], message: str, hint: str) -> Rule:
    """A rule: the first is not given where it has no use."""
    return Rule(names, lambda item: is_given(item, names[0]) and when(item), message, hint)


def only_with(name: str, other: str, hint: str = "Give both, or neither.") -> Rule:
    """A rule: the first is given only where the other is."""
    return idle((name, other), lambda item: not is_given(item, other), "{0} is for {1}.", hint)


def excludes(name: str, other: str, why: str) -> Rule:
    """A rule: not both are given."""
    words = f"{{0}} and {{1}} exclude each other: {why}."
    return idle((name, other), lambda item: is_given(item, other), words, "Leave one of them out.")


def value_at(given: Any, name: str) -> Any:
    """A field, or one of a part; None where there is no such part."""
    for attribute in name.split("."):
        given = None if given is None else getattr(given, attribute)
    return given


def is_given(given: Any, name: str) -> bool:
    """Whether a field, or one of a part, is other than where nothing is said."""
    head, _, rest = name.partition(".")
    value = getattr(given, head)
    if rest:
        return value is not None and is_given(value, rest)
    return bool(value != type(given).__dataclass_fields__[head].default)


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Options:
    """The base of all options: what is wrong is an OptionError with the options' names."""

    rules: ClassVar[Sequence[Rule]] = ()
    section: ClassVar[str] = "Options"
    rare: ClassVar[Collection[str]] = ()
    """Keys of its parts that are rare here."""
    config_only: ClassVar[Collection[str]] = ()
    switch: ClassVar[str] = ""
    """The field without which it is None, as an optional part."""
    off: ClassVar[str | None] = None
    """The switch's word for None."""

    @model_validator(mode="after")
    def _holds_rules(self) -> Self:
        for rule in self.rules:
            rule.check(self)
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
            place, own = text["loc"][0] if text["loc"] else "", list(_fields(cls))
            name = own[place] if isinstance(place, int) else place  # a value without a name
            keys = {name: key_at(cls, name)} if name in own else {}
            words = mistake(text).replace("{", "{{").replace("}", "}}")
            message = f"{'{0}' if keys else name}: {words}."
            raise OptionError(message, "", keys, code="option-value") from None

    def check(self) -> None:
        """Refuses, before a command runs, what takes more than its own fields to see."""

    @classmethod
    def usual(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:  # noqa: ARG003
        """What follows from values, by their keys, where nothing else is said."""
        return {}


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
        """As the command line has them; a switch that may be on by itself can be put off."""
        names = self.look.names or (flag(self.key),)
        if self.is_flag and self.default is not False and "/" not in names[-1]:
            return (*names[:-1], f"{names[-1]}/--no-{names[-1][2:]}")
        return names

    @property
    def required(self) -> bool:
        """Whether it has to be said."""
        return self.default is dataclasses.MISSING


@_remembered
def _fields(schema: type[Any]) -> dict[str, tuple[Any, Any, Look | frozenset[str] | None]]:
    """Each field's type, default, and look; of a part, what is left out of it."""
    hints = get_type_hints(schema, include_extras=True)
    return {
        field.name: (hints[field.name], field.default, field.metadata.get(_LOOK))
        for field in dataclasses.fields(schema)
    }


@_remembered
def leaves(schema: type[Options]) -> tuple[Leaf, ...]:
    """All options of a class and its parts, in their order, each once."""
    by_key: dict[str, Leaf] = {}
    for name, (hint, default, look) in _fields(schema).items():
        own: list[Leaf] = []
        if isinstance(look, Look):
            owner: Any = next(kind for kind in schema.__mro__ if name in get_annotations(kind))
            shown = dataclasses.replace(look, section=look.section or owner.section)
            own = [Leaf(hint, (name,), _key(name, look), default, shown)]
        elif look is not None:
            inner = leaves(bare_type(hint))
            own = [_inside(leaf, name, hint) for leaf in inner if leaf.path[-1] not in look]
        for leaf in own:
            rare = leaf.look.rare or leaf.key in schema.rare
            config_only = leaf.look.config_only or leaf.key in schema.config_only
            shown = dataclasses.replace(leaf.look, rare=rare, config_only=config_only)
            by_key.setdefault(leaf.key, dataclasses.replace(leaf, look=shown))
    return tuple(by_key.values())


def _inside(leaf: Leaf, name: str, hint: Any) -> Leaf:
    """An option of a part; of one that there may not be, nothing is required."""
    kind: type[Options] = bare_type(hint)
    changes: dict[str, Any] = {"path": (name, *leaf.path)}
    if kind is not hint and kind.switch:
        changes["default"] = None if leaf.required else leaf.default
        if leaf.path == (kind.switch,):
            type_ = leaf.type if kind.off is None else Literal[(kind.off, *leaf.choices)]
            changes |= {"type": type_, "default": None, "off": kind.off}
    return dataclasses.replace(leaf, **changes)


def build(schema: type[_S], given: Mapping[str, Any]) -> _S:
    """An object of a class with its parts, of values by their keys."""
    given, values = {**schema.usual(given), **given}, dict[str, Any]()
    for name, (_, _, look) in _fields(schema).items():
        if isinstance(look, frozenset):
            values[name] = _built_part(schema, name, look, given)
        elif look is not None and (key := _key(name, look)) in given:
            values[name] = given[key]
    return schema(**values)


def _built_part(
    outer: type[Options], name: str, without: frozenset[str], given: Mapping[str, Any]
) -> Options | None:
    hint, *_ = _fields(outer)[name]
    kind: type[Options] = bare_type(hint)
    own = [leaf for leaf in leaves(outer) if leaf.path[0] == name]
    said = [leaf for leaf in own if leaf.key in given and given[leaf.key] != leaf.default]
    if kind is not hint and kind.switch:
        switch = key_at(kind, kind.switch)
        if given.get(switch) in (None, kind.off):
            for leaf in said:
                if leaf.key != switch:
                    keys = {".".join(leaf.path): leaf.key, f"{name}.{kind.switch}": switch}
                    words = "{0} is for {1}.", "Give both, or neither."
                    raise OptionError(*words, keys, code="options-clash")
            return None
    elif kind is not hint and not said:
        return None
    keys_of_part = [leaf.key for leaf in leaves(kind) if leaf.path[-1] not in without]
    return build(kind, {key: given[key] for key in keys_of_part if key in given})


def values_of(given: Options) -> dict[str, Any]:
    """The values of an object and its parts by their keys; of a part that is None, the defaults."""
    return {leaf.key: _value_at(given, leaf) for leaf in leaves(type(given))}


def _value_at(value: Any, leaf: Leaf) -> Any:
    for name in leaf.path:
        if value is None:
            return leaf.off or (None if leaf.required else leaf.default)
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
    hint, _, look = _fields(schema)[head]
    if isinstance(look, Look):
        return _key(head, look)
    rest = rest or ("" if look is None else bare_type(hint).switch)
    return key_at(bare_type(hint), rest) if rest else head
