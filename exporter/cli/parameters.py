"""Options as click has them, as the words of a command line, and as YAML."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import click

from exporter.errors import OnnxFileError
from exporter.models.model_folder import find_onnx
from exporter.options import Leaf, Options, flag, leaves, values_of
from graph_passes.files.placing import finish_interrupted


def _words(leaf: Leaf, value: Any) -> list[str]:
    """The words on a command line that give an option this value."""
    if leaf.look.argument:
        return list(map(str, value if leaf.is_tuple else [value]))
    if leaf.is_flag:
        yes, _, no = leaf.names[-1].partition("/")
        return [yes if value else no]
    name = flag(leaf.key)
    if value is None:
        return [name, leaf.written.none or "none"]
    if leaf.look.bare is not None:
        return [f"{name}={value}"]
    if leaf.width == 0:
        return [word for each in value for word in (name, str(each))]
    return [name, *(map(str, value) if leaf.is_tuple else [leaf.written.text(value)])]


def words_of(told: Options, keys: Collection[str]) -> list[str]:
    """The words of a command line that say what an object says of some keys."""
    values, arguments, options = values_of(told), list[str](), list[str]()
    for leaf in leaves(type(told)):
        look, value = leaf.look, values[leaf.key]
        # There are no words for a list of nothing, nor for a file's null.
        unsaid = value == () == leaf.default or (value is None and leaf.written.none is None)
        if leaf.key in keys and not look.config_only and not unsaid:
            (arguments if look.argument else options).extend(_words(leaf, value))
    if any(word.startswith("-") for word in arguments):
        return [*options, "--", *arguments]
    return [*arguments, *options]


def plain_values(told: Options) -> dict[str, Any]:
    """The values by their keys as YAML has them, without None where nothing is said."""
    values = values_of(told)
    return {
        leaf.key: _plain(leaf, values[leaf.key])
        for leaf in leaves(type(told))
        if values[leaf.key] is not None or leaf.default is not None
    }


def _plain(leaf: Leaf, value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(leaf, each) for each in value]
    if isinstance(value, float) and value > 1 and leaf.written.metavar == "SHARE":
        return leaf.written.text(value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def parameter(leaf: Leaf) -> click.Parameter:
    """Click's own of an option."""
    look = leaf.look
    if look.argument:
        return click.Argument(
            [leaf.key], type=_type(leaf), required=False, metavar=look.metavar,
            nargs=leaf.width or -1,
        )  # fmt: skip
    names = [*leaf.names, leaf.key]
    if leaf.is_flag:
        return _Flag(names, is_flag=True, default=None, help=help_of(leaf))
    bare: dict[str, Any] = {} if look.bare is None else {"is_flag": False, "flag_value": look.bare}
    return click.Option(
        names, type=_type(leaf), multiple=leaf.width == 0, nargs=leaf.width or 1,
        metavar=look.metavar or (None if leaf.choices else leaf.written.metavar),
        help=help_of(leaf), **bare,
    )  # fmt: skip


def help_of(leaf: Leaf) -> str:
    """What it is for, and in brackets what it is where nothing is said."""
    default = leaf.default
    usual = leaf.look.usual
    if not usual and not leaf.look.required and default not in (None, False, ()):
        usual = "yes" if default is True else " ".join(_words(leaf, default)[1::2])
    return f"{leaf.look.help} [{usual}]" if usual else leaf.look.help


class _Flag(click.Option):
    """A switch; the name that puts it off is told where it isn't off by itself."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """The names and the help."""
        record = super().get_help_record(ctx)
        if record is None or not self.secondary_opts[0].startswith("--no-"):
            return record
        return record[0].partition(" / ")[0], record[1]


def _type(leaf: Leaf) -> click.ParamType[Any]:
    if leaf.place is not None:
        return _PATHS[leaf.place]
    if leaf.choices:
        return click.Choice(leaf.choices)
    return _Text(leaf)


class _Text(click.ParamType[Any]):
    """What an option's type reads."""

    def __init__(self, leaf: Leaf) -> None:
        self._leaf = leaf
        self.name = leaf.written.metavar or "TEXT"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Reads a text; a value from code passes."""
        if not isinstance(value, str):
            return value
        if not value.strip() and (self._leaf.look.metavar or "").startswith("MODEL"):
            self.fail("the name is empty (perhaps a variable is not set)", param, ctx)
        try:
            return self._leaf.read_item(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class TextPath(click.Path):
    """A path whose name is text: reports, ONNX Runtime and the builders take no other."""

    def convert(
        self,
        value: str | os.PathLike[str],
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> Any:
        """Refuses bytes that are no UTF-8, which Python has as lone surrogates.

        What a killed command left half in its place is completed before anybody looks for it.
        """
        name = os.fspath(value)
        if not name:
            self.fail("the name is empty (perhaps a variable is not set)", param, ctx)
        if not name.isascii() and any("\ud800" <= letter <= "\udfff" for letter in name):
            self.fail(f"the name {name!a} is not UTF-8: rename it", param, ctx)
        if self.exists:
            finish_interrupted(Path(name))
        return super().convert(value, param, ctx)


class _OnnxPath(TextPath):
    """An ONNX file, or a folder with one."""

    def convert(
        self,
        value: str | os.PathLike[str],
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> Any:
        """Finds the file in the folder."""
        path = super().convert(value, param, ctx)
        if not path.is_dir():
            return path
        try:
            return find_onnx(path)
        except OnnxFileError as error:
            self.fail(str(error), param, ctx)


_PATHS: dict[str, click.ParamType[Any]] = {
    "file": TextPath(exists=True, dir_okay=False, path_type=Path),
    "folder": TextPath(exists=True, file_okay=False, path_type=Path),
    "any": TextPath(exists=True, path_type=Path),
    "onnx": _OnnxPath(exists=True, path_type=Path),
    "new_file": TextPath(dir_okay=False, path_type=Path),
    "new_folder": TextPath(file_okay=False, path_type=Path),
    "new": TextPath(path_type=Path),
    "arm": TextPath(path_type=str),
}
