"""Commands made from options: click's parameters, the help, configuration files."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import gc
import os
import re
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import click
import yaml

from exporter.artifacts.yaml_file import YamlFile, read_yaml
from exporter.cli.console import (
    CONFIG,
    SHOW_CONFIG,
    ConsoleProgress,
    TextPath,
    echo,
    general_options,
)
from exporter.errors import DepthcutError, OnnxFileError, OptionError, UsageError
from exporter.models.model_folder import find_onnx
from exporter.options import (
    Leaf,
    Options,
    asked_keys,
    build,
    flag,
    leaves,
    running_command,
    values_of,
)


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
        return [word for item in value for word in (name, str(item))]
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
        return [_plain(leaf, item) for item in value]
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
        return _Choice(leaf.choices)
    return _Text(leaf)


class _Choice(click.Choice[Any]):
    """One of some words; one that went is told with what takes its place."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Finds the word."""
        text = f"{param.opts[-1]} {value}" if param is not None else ""
        if ctx is not None and (instead := REMOVED.get(f"{ctx.command.name} {text}")):
            raise click.UsageError(f"{text} was removed. Use {instead}.", ctx)
        return super().convert(value, param, ctx)


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


_S = TypeVar("_S", bound=Options)
Run = Callable[[_S, ConsoleProgress], int | None]
_ALL = "help_all"
_NEW_OBJECTS = 1_000_000
_MOST_LINES, _GENERAL_LINES, _FEW = 60, 4, 3
_GENERAL = "depthcut --help explains them"
_IN_FILES, _OF_FILE = "Only in a --config file", " (of a --config file)"
_COMPARE = "score for each, and then score --compare a.json b.json c.json"
_TASKSET = "taskset -c 2,3 before the command, with --threads 2"
_SERVER = "the server that you deploy to: depthcut generates greedily"
_TRTEXEC = "trtexec for such an engine"
_LONG = "eval_sequence_length in a --config file, or --tasks with lm-eval's tasks, such as ruler"
_PROBES = "--tasks with --task-data; samples/07_ci/probes.py writes the four as such tasks"
_POWER = "--time-budget for a clear verdict, or more --rounds where two sessions are compared"
_ONE_PROCESS = "score --metric kl --ray, whose scores plan takes; searches run in one process"
_VISIBLE = "CUDA_VISIBLE_DEVICES, which names the GPU to all programs"
_AGAIN = "depthcut compare again, and check its report"
REMOVED = {
    "export --search-seconds": "--search greedy",
    "plan --search-seconds": "--search greedy",
    "export --rescore-every": "--search greedy",
    "plan --curve": "depthcut depths, which compares cuts of several sizes",
    "plan --rescore-every": "--search greedy",
    "depths --other-text": "depthcut export, which measures the healed cut on a second text",
    "depths --recommend": "nothing: depths always recommends",
    "compare --stride": "eval_sequence_length in a --config file: longer samples have more context",
    "compare --power": _POWER,
    "compare --smallest": _POWER,
    "export --power": _POWER,
    "export --smallest": _POWER,
    "export --stride": "eval_sequence_length in a --config file: longer samples have more context",
    "compare --pin": _TASKSET,
    "export --pin": _TASKSET,
    "score --checkpoints": _COMPARE,
    "score --revisions": f"{_COMPARE} (a --revision for each)",
    "score --vary-calibration": f"{_COMPARE} (a --calibration for each)",
    "score --vary-samples": f"{_COMPARE} (a number of --samples for each)",
    "build --refittable": "depthcut build again, with the graph that has the new weights",
    "build --strip-weights": "depthcut build again, with the graph that has the weights",
    "costs --rank": "full maps, which healing fits",
    "export --rank": "the key rank of a --config file, for adapters; maps are full",
    "export --states-weight": "nothing: models without next tokens learn from their states, too",
    "export --sequential": "--heal linear or best, which fit each branch on the whole model",
    "heal --rank": "the key rank of a --config file, for adapters; maps are full",
    "heal --states-weight": "nothing: models without next tokens learn from their states, too",
    "heal --sequential": "--heal linear or best, which fit each branch on the whole model",
    "plan --rank": "the key rank of a --config file, for adapters; maps are full",
    "plan --states-weight": "nothing: models without next tokens learn from their states, too",
    "plan --sequential": "--heal linear or best, which fit each branch on the whole model",
    "check --bencher": "--github-benchmark, or the whole check by --output",
    "check --gitlab-metrics": "--junit, which GitLab shows, or the whole check by --output",
    "check --max-cache-read-increase": "--max-memory-increase, which limits the KV cache",
    "check --max-mac-increase": "--max-node-increase and --max-slowdown",
    "check --max-layer-increase": "--max-slowdown",
    "check --max-scratch-increase": "--max-memory-increase",
    "check --max-weight-read-increase": "--max-size-increase",
    "check --max-probe-drop": "--max-task-drop, which limits the tasks of a comparison",
    "check --confirm": _AGAIN,
    "check --models": _AGAIN,
    "check --eval-text": _AGAIN,
    "check --page": "--comment, or --github's summary",
    "check --pytest-benchmark": "--github-benchmark, or report.json, which has all times",
    "build --device": _VISIBLE,
    "compare --device": _VISIBLE,
    "costs --device": _VISIBLE,
    "evaluate --device": _VISIBLE,
    "export --device": _VISIBLE,
    "generate --device": _VISIBLE,
    "build --hardware-compatibility": _TRTEXEC,
    "build --version-compatible": _TRTEXEC,
    "build --tf32": _TRTEXEC,
    "build --timing-cache": _TRTEXEC,
    "generate --seed": _SERVER,
    "generate --temperature": _SERVER,
    "generate --top-k": _SERVER,
    "generate --top-p": _SERVER,
    "package --beside": "tar",
    "package --tarball": "tar, with each engine's .json, tokenizer.json and config.json",
    "compare --long-context": _LONG,
    "export --long-context": _LONG,
    "compare --probes": _PROBES,
    "evaluate --probes": _PROBES,
    "export --probes": _PROBES,
    **{
        f"{command} --{key}": "--objective kl, and --tasks to evaluate the result"
        for command in ("plan", "export")
        for key in ("search-items", "judged-items", "search-seed")
    },
    "plan --ray": _ONE_PROCESS,
    "plan --ray-workers": _ONE_PROCESS,
    "report --format": "-o FILE.md, which is written as Markdown",
    "check-engine --report": "polygraphy inspect capability MODEL",
    "export --quantize mixed": "int4 with quantize_method: hqq in a --config file, without a text",
    "quantize --quantize mixed": "int4 with --quantize-method hqq, which needs no text",
    "quantize --quantize-method gptq": "--quantize-method hqq, which needs no text",
}
"""What takes the place of options that this version doesn't have any more."""


def command(
    schema: type[_S],
    *,
    json: bool = True,
    name: str | None = None,
    check: Callable[[_S], None] = lambda _: None,
) -> Callable[[Run[_S]], SchemaCommand[_S]]:
    """Makes a command of a function."""

    def made(run: Run[_S]) -> SchemaCommand[_S]:
        return SchemaCommand(name or run.__name__, schema, run, json=json, check=check)

    return made


def collecting_rarely(run: Run[_S]) -> Run[_S]:
    """For commands that work on a graph: a million objects, of which hardly any is garbage.

    Python looks for garbage after every 700 new ones, which took a sixth of such a command's time.
    """

    @functools.wraps(run)
    def collected(call: _S, progress: ConsoleProgress) -> int | None:
        before = gc.get_threshold()
        gc.set_threshold(_NEW_OBJECTS, *before[1:])
        try:
            return run(call, progress)
        finally:
            gc.set_threshold(*before)

    return collected


class SchemaCommand(click.Command, Generic[_S]):
    """A command that takes the options of a class."""

    def __init__(
        self,
        name: str,
        schema: type[_S],
        run: Run[_S],  # does it; gives an exit code, or None for 0
        *,
        json: bool,
        check: Callable[[_S], None] = lambda _: None,
    ) -> None:
        self.schema, self.run, self._check = schema, run, check
        every = leaves(schema)
        keys = ((leaf, name) for leaf in every if leaf.look.config_only for name in _flags(leaf))
        self.keys = {name: leaf.key for leaf, name in keys}
        self.leaves = {leaf.key: self._explained(leaf) for leaf in every}
        self._made = {key: parameter(leaf) for key, leaf in self.leaves.items()}
        shown = [self._made[key] for key, leaf in self.leaves.items() if not leaf.look.config_only]
        super().__init__(name, params=shown, help=run.__doc__, add_help_option=True)
        self._json, self._general = json, general_options(_whole_help)
        for general in self._general:
            general.hidden = True  # `depthcut --help` explains them

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click does it; a key, and an option of other commands, is told as what it is."""
        words = tuple(args)
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            option_name = error.option_name
            if instead := REMOVED.get(f"{self.name} {option_name}"):
                raise click.UsageError(f"{option_name} was removed. Use {instead}.", ctx) from None
            if option_name in self.keys:
                line = self._line(option_name, words)
                text = (
                    f"{option_name} is a key of --config files, not an option: put `{line}` into "
                )
                raise click.UsageError(
                    f"{text}a file and give it as --config FILE.yaml.", ctx
                ) from None
            if others := _commands_with(option_name, ctx):
                text = f"{option_name} is not an option of {self.name}, but of {', '.join(others)}."
                raise click.UsageError(text, ctx) from None
            raise

    def _line(self, text: str, words: Sequence[str]) -> str:
        """The line of a file that says what an option would that is a key alone."""
        key = self.keys[text]
        if self.leaves[key].is_flag:
            return f"{key}: {'false' if text in _flags(self.leaves[key])[-2:] else 'true'}"
        given = next((word for word in words if word.partition("=")[0] == text), text)
        behind = [*words[words.index(given) + 1 :], "…"] if given in words else ["…"]
        return f"{key}: {given.partition('=')[2] or behind[0]}"

    def _renamed(self, words: str, suffix: str = "") -> str:
        """A text with keys of configuration files in place of options that others have."""
        return re.sub(
            r"--[a-z][\w-]*",
            lambda name: self.keys[name[0]] + suffix if name[0] in self.keys else name[0],
            words,
        )

    def _explained(self, leaf: Leaf) -> Leaf:
        result, brief, usual = map(
            self._renamed, (leaf.look.help, leaf.look.brief, leaf.look.usual)
        )
        look = dataclasses.replace(leaf.look, help=result, brief=brief, usual=usual)
        return dataclasses.replace(leaf, look=look)

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Its own options, and those of every command, which its help names in one line."""
        return [*super().get_params(ctx), *self._general]

    def get_help_option(self, ctx: click.Context) -> click.Option | None:
        """``--help``, one of the options of every command."""
        if made := super().get_help_option(ctx):
            made.hidden = True
        return made

    def invoke(self, ctx: click.Context) -> int | None:
        """Reads the options, and runs the command or shows what would be run.

        What is wrong with them is told by the names that they have here.
        """
        try:
            return self._invoked(ctx)
        except DepthcutError as error:
            error.message = self._renamed(error.message, _OF_FILE)
            error.hint = self._renamed(error.hint, _OF_FILE)
            raise

    def _invoked(self, ctx: click.Context) -> int | None:
        result, config = self._told(ctx)
        call = self._built(ctx, result, config)
        self._check(call)
        progress = ctx.find_object(ConsoleProgress) or ConsoleProgress()
        if progress.as_json and not self._json:
            raise UsageError(
                f"depthcut {self.name} has no result to print as JSON.", "Leave --json out."
            )
        if ctx.meta.get(SHOW_CONFIG):
            shown = yaml.safe_dump(
                plain_values(call), sort_keys=False, allow_unicode=True, width=1000
            )
            echo(*shown.rstrip("\n").split("\n"))
            return 0
        token = running_command.set(self._words(call, result, config))
        try:
            code = self.run(call, progress)
        finally:
            running_command.reset(token)
        if code:
            ctx.exit(code)
        return code

    def read(self, words: list[str]) -> _S:
        """The options that these words of a command line say; runs nothing."""
        ctx = self.make_context(self.name, list(words), obj=ConsoleProgress())
        return self._built(ctx, *self._told(ctx))

    def _told(self, ctx: click.Context) -> tuple[dict[str, Any], YamlFile | None]:
        path: Path | None = ctx.meta.get(CONFIG)
        config = None if path is None else read_yaml(path)
        result = {} if config is None else self._configured(ctx, config)
        return {**result, **{key: ctx.params[key] for key in self._asked(ctx)}}, config

    def _asked(self, ctx: click.Context) -> list[str]:
        """The keys of the options that stand on the command line."""
        given = click.core.ParameterSource.COMMANDLINE
        return [key for key in self.leaves if ctx.get_parameter_source(key) is given]

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
            if key not in self.leaves:
                raise OptionError(
                    f"{config.place(key)}: {key}: this key is not known here.", self._known(key)
                )
            try:
                read = self.leaves[key].read(value, strict=True)
                if read != self.leaves[key].default:  # --show-config writes defaults as well
                    results[key] = (
                        self._made[key].type_cast_value(ctx, read) if read is not None else None
                    )
            except ValueError as error:
                raise OptionError(f"{config.place(key)}: {key}: {error}.", "", [key]) from None
            except click.BadParameter as error:
                text = f"{config.place(key)}: {key}: {error.message}"
                raise OptionError(text, "", [key]) from None
        return results

    def _known(self, key: object) -> str:
        if instead := REMOVED.get(f"{self.name} {flag(str(key))}"):
            return f"It was removed. Use {instead}."
        near = difflib.get_close_matches(str(key).replace("-", "_"), self.leaves, cutoff=0.75)
        return f"Did you mean {near[0]}?" if near else f"There are: {', '.join(self.leaves)}."

    def _built(self, ctx: click.Context, items: dict[str, Any], config: YamlFile | None) -> _S:
        for key, leaf in self.leaves.items():
            if leaf.look.required and key not in items:
                raise click.MissingParameter(ctx=ctx, param=self._made[key])
        token = asked_keys.set(self._asked(ctx))
        try:
            return build(self.schema, items)
        except OptionError as error:
            keys = [key for key in error.keys if config is not None and key in (config.data or {})]
            if config is None or not keys:
                raise
            told_of = f"{config.place(keys[0])}: {keys[0]}: {error.message}"
            raise OptionError(told_of, error.hint, error.keys, code=error.code) from None
        finally:
            asked_keys.reset(token)

    def _words(self, call: _S, told: Mapping[str, Any], config: YamlFile | None) -> tuple[str, ...]:
        """The command with what is asked of it, wherever it was asked."""
        words = ["depthcut", self.name or "", *words_of(call, told)]
        if config is not None and any(self.leaves[key].look.config_only for key in told):
            words += ["--config", str(config.path)]
        return tuple(words)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the options of each heading, in the order in which the headings come first."""
        every = bool(ctx.meta.get(_ALL))
        shown = [leaf for leaf in self.leaves.values() if _is_shown(leaf, every=every)]
        whole = _by_section(shown, lambda leaf: self._record(leaf, ctx))
        lines = _lines(whole, formatter) + len(formatter.getvalue().splitlines()) + _GENERAL_LINES
        _write(whole if every or lines <= _MOST_LINES else _folded(shown), formatter)
        names = (param.opts[-1] for param in self.get_params(ctx)[len(self.params) :])
        formatter.write_paragraph()
        formatter.write_text(f"Options of every command ({_GENERAL}): {', '.join(names)}.")

    def _record(self, leaf: Leaf, ctx: click.Context) -> tuple[str, str]:
        record = self._made[leaf.key].get_help_record(ctx)
        return (f"{leaf.key}:", help_of(leaf)) if leaf.look.config_only or not record else record


def names_of_options(command: click.Command | None) -> str:
    """All that a command of its own can be told, by names alone; empty where that is nothing."""
    leaves = command.leaves.values() if isinstance(command, SchemaCommand) else ()
    shown = [leaf for leaf in leaves if _is_shown(leaf, every=True)]
    names = [f"{leaf.key}:" if leaf.look.config_only else flag(leaf.key) for leaf in shown]
    if command is None or not names:
        return ""
    words = " ".join([f"depthcut {command.name}", *names])
    return textwrap.fill(words, 80, subsequent_indent="  ", break_on_hyphens=False)


_Sections = dict[str, list[tuple[str, str]]]


def _is_shown(leaf: Leaf, *, every: bool) -> bool:
    look = leaf.look
    return not look.argument and (every or not (look.rare or look.config_only))


def _by_section(shown: list[Leaf], record: Callable[[Leaf], tuple[str, str]]) -> _Sections:
    sections: _Sections = {}
    for leaf in sorted(shown, key=lambda leaf: leaf.look.config_only):
        title = _IN_FILES if leaf.look.config_only else leaf.look.section
        sections.setdefault(title, []).append(record(leaf))
    return sections


def _folded(shown: list[Leaf]) -> _Sections:
    """A line for each option; what stands nearly alone under a heading stands under the first."""
    sections = _by_section(shown, _brief)
    first, *others = sections
    for title in others:
        if len(sections[title]) < _FEW:
            sections[first] += sections.pop(title)
    return sections


def _brief(leaf: Leaf) -> tuple[str, str]:
    words = leaf.look.brief or leaf.look.help.partition(". ")[0].partition("; ")[0]
    if not leaf.look.brief and leaf.choices and not leaf.look.metavar:
        words = f"{words.partition(': ')[0].rstrip('.')}: {', '.join(map(str, leaf.choices))}"
    value = "" if leaf.is_flag else f" {leaf.look.metavar or leaf.written.metavar or 'NAME'}"
    short = [name for name in leaf.names if len(name) == len("-o")]
    return ", ".join([*short, flag(leaf.key)]) + value, words.rstrip(".")


def _write(sections: _Sections, formatter: click.HelpFormatter) -> None:
    for title, records in sections.items():
        with formatter.section(title):
            formatter.write_dl(records)


def _lines(sections: _Sections, formatter: click.HelpFormatter) -> int:
    """How many it takes to write them."""
    tried = click.HelpFormatter(width=formatter.width)
    _write(sections, tried)
    return len(tried.getvalue().splitlines())


def _flags(leaf: Leaf) -> list[str]:
    """All long names of an option; of a switch those that put it off last."""
    long, _, off = leaf.names[-1].partition("/")
    return [long, flag(leaf.key), *([off or long, f"--no-{leaf.key}"] if leaf.is_flag else [])]


def _whole_help(ctx: click.Context) -> str:
    ctx.meta[_ALL] = True
    return ctx.get_help()


def _commands_with(option: str, ctx: click.Context) -> list[str]:
    """The commands beside this one that have an option, by name."""
    group = ctx.parent.command if ctx.parent else None
    if not isinstance(group, click.Group):
        return []
    beside = [(name, group.get_command(ctx, name)) for name in group.list_commands(ctx)]
    return [
        name
        for name, command in beside
        if command and any(option in parameter.opts for parameter in command.params)
    ]
