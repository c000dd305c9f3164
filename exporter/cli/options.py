"""Options that several commands share, and the types that read them."""

from __future__ import annotations

import functools
import gc
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import click

from exporter.cli.console import QUIET, VERBOSE, ConsoleProgress, echo
from exporter.cli.sections import Count, option_in

_F = TypeVar("_F", bound=Callable[..., Any])


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
        if not name.isascii() and any("\ud800" <= letter <= "\udfff" for letter in name):
            self.fail(f"the name {name!a} is not UTF-8: rename it", param, ctx)
        if self.exists:
            from graph_passes.files.placing import finish_interrupted

            finish_interrupted(Path(name))
        return super().convert(value, param, ctx)


class OnnxPath(TextPath):
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
        from exporter.errors import OnnxFileError
        from exporter.models.model_folder import find_onnx

        try:
            return find_onnx(path)
        except OnnxFileError as error:
            self.fail(str(error), param, ctx)


ONNX_FILE = OnnxPath(exists=True, path_type=Path)
EXISTING_FILE = TextPath(exists=True, dir_okay=False, path_type=Path)
EXISTING_PATH = TextPath(exists=True, path_type=Path)
EXISTING_DIRECTORY = TextPath(exists=True, file_okay=False, path_type=Path)
ANY_PATH = TextPath(path_type=Path)
ANY_FILE = TextPath(dir_okay=False, path_type=Path)
AUTO = "auto"
_NEW_OBJECTS = 1_000_000
_SIZE = re.compile(r"(?P<number>\d+(\.\d+)?) ?(?P<prefix>[KMGT])?(?P<binary>i)?B?", re.IGNORECASE)


class Lengths(click.ParamType[tuple[int, ...]]):
    """Token counts, separated by commas: ``128,512``."""

    name = "N,N"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """Reads the list; a value from code passes."""
        if isinstance(value, tuple):
            return value
        try:
            lengths = tuple(int(part) for part in str(value).split(",") if part.strip())
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers such as 128,512", param, ctx)
        if any(length < 1 for length in lengths):
            self.fail("numbers begin at 1", param, ctx)
        return lengths


class Threads(click.ParamType[int | str]):
    """A number of threads, or ``auto``: the fastest, found in a short probe."""

    name = "N|auto"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | str:
        """Reads it."""
        if value == AUTO:
            return AUTO
        if isinstance(value, str) and not value.strip().lstrip("-").isdecimal():
            self.fail(f"{value!r} is neither a number nor {AUTO}", param, ctx)
        return Count().convert(value, param, ctx)


class Size(click.ParamType[int]):
    """A number of bytes: ``8GB``, ``500 MB``, ``2GiB``, ``0``."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Reads the size; a number from code passes."""
        if isinstance(value, int):
            return value
        told = _SIZE.fullmatch(str(value).strip())
        if told is None:
            self.fail(f"{value!r} is not a size such as 8GB, 500MB or 2GiB", param, ctx)
        base = 1024 if told["binary"] else 1000
        return int(float(told["number"]) * base ** " KMGT".index((told["prefix"] or " ").upper()))


def collecting_rarely(function: _F) -> _F:
    """For commands that work on a graph: a million objects, of which hardly any is garbage.

    Python looks for garbage after every 700 new ones, which took a sixth of such a command's time.
    """

    @functools.wraps(function)
    def collected(*arguments: Any, **options: Any) -> Any:
        before = gc.get_threshold()
        gc.set_threshold(_NEW_OBJECTS, *before[1:])
        try:
            return function(*arguments, **options)
        finally:
            gc.set_threshold(*before)

    return cast(_F, collected)


def verbosity_options(function: _F) -> _F:
    """Adds ``-q`` and ``-v``; they set the progress object before the command runs."""
    function = click.option(
        "-q", "--quiet", is_flag=True, expose_value=False, callback=_set_quiet,
        help="Say nothing but results and errors.",
    )(function)  # fmt: skip
    return click.option(
        "-v", "--verbose", is_flag=True, expose_value=False, callback=_set_verbose, is_eager=True,
        help="Tell details; tracebacks on errors.",
    )(function)  # fmt: skip


def _set_quiet(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value:
        ctx.find_object(ConsoleProgress).verbosity = QUIET  # type: ignore[union-attr]


def _set_verbose(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value:
        ctx.find_object(ConsoleProgress).verbosity = VERBOSE  # type: ignore[union-attr]


dropping = option_in("What to drop")
loading = option_in("How MODEL is loaded")
scoring = option_in("How importance is scored")
speed = option_in("Speed")
accuracy = option_in("Accuracy")

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print the result as JSON on standard output."
)


force_option = dropping(
    "--force", is_flag=True,
    help="Drop what is asked for even if that leaves no attention and no MLP at all. Lifts no "
    "other refusal.",
)  # fmt: skip


def drop_options(function: _F) -> _F:
    """Adds the ways of saying how many sublayers to drop."""
    for option in (
        dropping(
            "--drop", "joint", type=Count(),
            help="Drop N sublayers, attention and MLP ranked together.",
        ),
        dropping("--drop-block", "block", type=Count(), help="Drop N blocks."),
        dropping("--drop-mlp", "mlp", type=Count(), help="Drop N MLPs."),
        dropping(
            "--drop-attn", "attention", type=Count(), help="Drop N attentions."
        ),
    ):  # fmt: skip
        function = option(function)
    return function


def danger_options(function: _F) -> _F:
    """Adds what a model may do that others may not."""
    for option in (
        loading(
            "--trust-remote-code", is_flag=True,
            help="Dangerous: run Python code that comes with the model.",
        ),
        loading(
            "--allow-pickle", is_flag=True,
            help="Dangerous: load weights from pickle files (pytorch_model.bin).",
        ),
        loading(
            "--allow-any-model-type", is_flag=True,
            help="Dangerous: run whatever code of transformers the model's config names, also"
            " where nobody looked at it for depthcut.",
        ),
    ):  # fmt: skip
        function = option(function)
    return function


def model_options(function: _F) -> _F:
    """Adds what says how a PyTorch model may be loaded."""
    return danger_options(loading("--revision", help="Revision of a hub model.")(function))


def scoring_options(function: _F) -> _F:
    """Adds what says on which text importance is measured."""
    for option in (
        scoring(
            "--seed", type=int, metavar="N", default=0, show_default=True,
            help="For sampled text.",
        ),
        scoring(
            "--batch-size", type=Count(), default=4, show_default=True,
            help="Samples in one forward pass.",
        ),
        scoring(
            "--sequence-length", type=Count(2), default=512, show_default=True,
            help="Tokens in a sample.",
        ),
        scoring(
            "--samples", type=Count(),
            help="Number of samples; by default about 10,000 tokens.",
        ),
        scoring(
            "--calibration", metavar="SOURCE",
            help="Text to score on: a text or JSONL file, hf:DATASET, pydoc, or self (text that"
            " the model samples; the default for decoders).",
        ),
    ):  # fmt: skip
        function = option(function)
    return function


def measuring_options(function: _F) -> _F:
    """Adds what says how the two models are compared."""
    for option in (
        accuracy(
            "--eval-tokens", type=Count(2), default=8192, show_default=True,
            help="Tokens for perplexity, KL divergence and agreement.",
        ),
        accuracy(
            "--eval-text", metavar="SOURCE", default="pydoc", show_default=True,
            help="Evaluation text: a text or JSONL file, hf:DATASET or pydoc.",
        ),
        speed(
            "--decode-past", type=Lengths(), default=(512,), show_default=True,
            help="Filled cache lengths."
        ),
        speed(
            "--prefill", type=Lengths(), default=(128, 512), show_default=True,
            help="Prompt lengths."
        ),
        speed(
            "--threads", type=Threads(), default=AUTO, show_default=True,
            help="CPU threads of all arms; auto: what makes the baseline's step fastest, found in"
            " a short probe.",
        ),
        speed(
            "--provider", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True,
            help="Where ONNX Runtime runs both models.",
        ),
    ):  # fmt: skip
        function = option(function)
    return function


def show_version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    """Prints the version and ends."""
    if value and not ctx.resilient_parsing:
        from exporter import __version__

        echo(f"depthcut {__version__}")
        ctx.exit()
