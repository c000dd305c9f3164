"""Commands made from options: click's parameters, the help, configuration files."""

from __future__ import annotations

import contextlib
import difflib
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

import click
import yaml

from exporter.artifacts.yaml_file import YamlFile, read_yaml
from exporter.cli.console import (
    CONFIG,
    HELP_ALL,
    SHOW_CONFIG,
    ConsoleProgress,
    TextPath,
    echo,
    general_options,
)
from exporter.errors import DepthcutError, OnnxFileError, OptionError, UsageError
from exporter.models.model_folder import find_onnx
from exporter.options import Leaf, Options, build, flag, leaves, values_of

_S = TypeVar("_S", bound=Options)
Run = Callable[[_S, ConsoleProgress], int | None]  # gives an exit code, or None for 0
_FEW = 3
_IN_FILES = "Only in a --config file"


def plain_values(options: Options) -> dict[str, Any]:
    """The values by their keys as YAML has them, without None where nothing is said."""
    values = values_of(options)
    return {
        leaf.key: _plain(leaf, values[leaf.key])
        for leaf in leaves(type(options))
        if values[leaf.key] is not None or leaf.default is not None
    }


def _plain(leaf: Leaf, value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(leaf, item) for item in value]
    if isinstance(value, float) and value > 1 and leaf.written.metavar == "SHARE":
        return f"{100 * value:.12g}%"
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
        return click.Option(names, is_flag=True, default=None, help=help_of(leaf))
    bare: dict[str, Any] = {} if look.bare is None else {"is_flag": False, "flag_value": look.bare}
    return click.Option(
        names, type=_type(leaf), multiple=leaf.width == 0, nargs=leaf.width or 1,
        metavar=look.metavar or (None if leaf.choices else leaf.written.metavar),
        help=help_of(leaf), **bare,
    )  # fmt: skip


def help_of(leaf: Leaf) -> str:
    """What it is for, and in brackets what it is where nothing is said."""
    usual, default = leaf.look.usual, leaf.default
    if not usual and not leaf.required and default not in (None, False, ()):
        words = default if isinstance(default, tuple) else [default]
        usual = "yes" if default is True else ",".join(map(str, words))
    return f"{leaf.look.help} [{usual}]" if usual else leaf.look.help


def _type(leaf: Leaf) -> click.ParamType[Any]:
    if leaf.place is not None:
        return _PATHS[leaf.place]
    return click.Choice(leaf.choices) if leaf.choices else _Text(leaf)


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


class _OnnxPath(TextPath):
    """An ONNX file, or a folder with one."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Finds the file in the folder."""
        path = super().convert(value, param, ctx)
        try:
            return find_onnx(path) if path.is_dir() else path
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


def command(schema: type[_S], *, name: str | None = None) -> Callable[[Run[_S]], SchemaCommand[_S]]:
    """Makes a command of a function."""
    return lambda run: SchemaCommand(name or run.__name__, schema, run)


class SchemaCommand(click.Command, Generic[_S]):
    """A command that takes the options of a class."""

    def __init__(self, name: str, schema: type[_S], run: Run[_S]) -> None:
        self.schema, self.run = schema, run
        self.leaves = {leaf.key: leaf for leaf in leaves(schema)}
        self._made = {key: parameter(leaf) for key, leaf in self.leaves.items()}
        shown = [self._made[key] for key, leaf in self.leaves.items() if not leaf.look.config_only]
        super().__init__(name, params=shown, help=run.__doc__)
        self.keys = {
            option: key
            for key, leaf in self.leaves.items()
            if leaf.look.config_only
            for option in (*self._made[key].opts, *self._made[key].secondary_opts)
        }
        self._general = general_options()
        for general in self._general:
            general.hidden = True  # `depthcut --help` explains them

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click does it; the error says of a key of --config files what it is."""
        words = [part for word in args for part in word.split("=", 1 if word[:1] == "-" else 0)]
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            name = error.option_name
            if (key := self.keys.get(name)) is None:
                raise
            value = [*words, "…"][words.index(name) + 1]
            if self.leaves[key].is_flag:
                value = str(name not in self._made[key].secondary_opts).lower()
            text = f"{name} is a key of --config files: put `{key}: {value}` into a file, and "
            raise click.UsageError(f"{text}give it as --config FILE.yaml.", ctx) from None

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Its own options, and those of every command, which its help names in one line."""
        return [*super().get_params(ctx), *self._general]

    def get_help_option(self, ctx: click.Context) -> click.Option | None:
        """``--help``, one of the options of every command."""
        if made := super().get_help_option(ctx):
            made.hidden = True
        return made

    def invoke(self, ctx: click.Context) -> int | None:
        """Reads the options, and runs the command or shows what would be run."""
        call = self._call(ctx)
        with self._in_words():
            call.check()
            if not ctx.meta.get(SHOW_CONFIG):
                return self.run(call, ctx.find_object(ConsoleProgress) or ConsoleProgress())
        shown = yaml.safe_dump(plain_values(call), sort_keys=False, allow_unicode=True, width=1000)
        echo(*shown.rstrip("\n").split("\n"))
        return 0

    def read(self, words: list[str]) -> _S:
        """The options that these words of a command line say; runs nothing."""
        return self._call(self.make_context(self.name, list(words), obj=ConsoleProgress()))

    def _call(self, ctx: click.Context) -> _S:
        """What the file and the command line say, which wins."""
        path: Path | None = ctx.meta.get(CONFIG)
        config = None if path is None else read_yaml(path)
        said = {} if config is None else self._configured(ctx, config)
        given = click.core.ParameterSource.COMMANDLINE
        asked_for = [key for key in self.leaves if ctx.get_parameter_source(key) is given]
        said |= {key: ctx.params[key] for key in asked_for}
        for key, leaf in self.leaves.items():
            if leaf.required and key not in said:
                raise click.MissingParameter(ctx=ctx, param=self._made[key])
        with self._in_words(config):
            return build(self.schema, said)

    def _configured(self, ctx: click.Context, config: YamlFile) -> dict[str, Any]:
        data = {} if config.data is None else config.data
        if not isinstance(data, Mapping):
            raise UsageError(
                f"{config.place()}: options and their values are expected here.",
                f"Such as: {next(iter(self.leaves))}: …; depthcut {self.name} --show-config "
                "prints such a file.",
            )
        results = {}
        for key, value in data.items():
            try:
                leaf = self._known(key)
                read = leaf.read(value, strict=True)
                if read != leaf.default:  # --show-config writes defaults as well
                    typed = None if read is None else self._made[key].type_cast_value(ctx, read)
                    results[key] = typed
            except (ValueError, click.BadParameter) as error:
                raise UsageError(
                    f"{config.place(key)}: {key}: {str(error).rstrip('.')}.", code="option-value"
                ) from None
        return results

    def _known(self, key: object) -> Leaf:
        if key in self.leaves:
            return self.leaves[str(key)]
        near = difflib.get_close_matches(str(key).replace("-", "_"), self.leaves, cutoff=0.75)
        other = f"perhaps {near[0]} is meant" if near else f"there are: {', '.join(self.leaves)}"
        raise ValueError(f"this key is not known here; {other}")

    @contextlib.contextmanager
    def _in_words(self, config: YamlFile | None = None) -> Iterator[None]:
        """Errors name options as they are called here, and where a file says them."""
        try:
            yield
        except DepthcutError as error:
            if isinstance(error, OptionError):
                error.say(list(map(self._word, error.keys)))
                for key in error.keys:
                    if config is not None and key in (config.data or {}):
                        error.message = f"{config.place(key)}: {key}: {error.message}"
                        break
            error.message, error.hint = map(self._renamed, (error.message, error.hint))
            raise

    def _word(self, key: str) -> str:
        leaf = self.leaves.get(key)
        return str(leaf.look.metavar) if leaf and leaf.look.argument else flag(key)

    def _renamed(self, text: str) -> str:
        keys = {option: f"{key} (of a --config file)" for option, key in self.keys.items()}
        return re.sub(r"(?<![\w-])--[a-z][\w-]*", lambda name: keys.get(name[0], name[0]), text)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the options of each heading, in the order in which the headings come first."""
        every, sections = bool(ctx.meta.get(HELP_ALL)), dict[str, list[tuple[str, str]]]()
        for leaf in sorted(self.leaves.values(), key=lambda leaf: leaf.look.config_only):
            look = leaf.look
            if look.argument or (not every and (look.rare or look.config_only)):
                continue
            title = _IN_FILES if look.config_only else look.section
            sections.setdefault(title, []).append(self._record(leaf, ctx) if every else brief(leaf))
        first = next(iter(sections), "")
        for title, records in list(sections.items()):
            if not every and title != first and len(records) < _FEW:  # hardly worth a heading
                sections[first] += sections.pop(title)
        for title, records in sections.items():
            room = formatter.width - 6 - max(len(name) for name, _ in records)
            if not every:
                how: Any = {"placeholder": " …", "break_on_hyphens": False}
                records = [(name, textwrap.shorten(text, room, **how)) for name, text in records]
            with formatter.section(title):
                formatter.write_dl(records)
        names = (param.opts[-1] for param in self.get_params(ctx)[len(self.params) :])
        words = f"Options of every command (depthcut --help explains them): {', '.join(names)}."
        formatter.write_paragraph()
        formatter.write_text(words)

    def _record(self, leaf: Leaf, ctx: click.Context) -> tuple[str, str]:
        record = None if leaf.look.config_only else self._made[leaf.key].get_help_record(ctx)
        return record or (f"{leaf.key}:", help_of(leaf))


def brief(leaf: Leaf) -> tuple[str, str]:
    """An option in one line: its name, and the first sentence of its help."""
    words = leaf.look.help.partition(". ")[0].partition("; ")[0]
    if leaf.choices and not leaf.look.metavar:
        words = f"{words.partition(': ')[0].rstrip('.')}: {', '.join(map(str, leaf.choices))}"
    value = "" if leaf.is_flag else f" {leaf.look.metavar or leaf.written.metavar or 'NAME'}"
    short = [name for name in leaf.names if len(name) == len("-o")]
    return ", ".join([*short, flag(leaf.key)]) + value, words.rstrip(".")
