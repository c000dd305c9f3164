"""Options for models that don't fit into memory, or are spread over devices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from exporter.cli.options import TextPath, loading

_F = TypeVar("_F", bound=Callable[..., Any])
_FOLDER = TextPath(file_okay=False, path_type=Path)


def stream_options(function: _F) -> _F:
    """Adds the ways to score what does not fit into memory."""
    spread = loading(
        "--device-map",
        type=click.Choice(["auto"]),
        help="Spread the model over GPUs, memory and disk by accelerate.",
    )
    return layer_options(spread(function))


def layer_options(function: _F) -> _F:
    """Adds the ways to read weights a layer at a time."""
    for option in (
        loading(
            "--stream-dir", type=_FOLDER, metavar="DIR",
            help="With --stream: keep the hidden states in a file there. [in memory where they"
            " fit, else in the system's temporary folder]",
        ),
        loading(
            "--stream", is_flag=True,
            help="Read the weights a layer at a time, for models larger than memory.",
        ),
    ):  # fmt: skip
        function = option(function)
    return function


def streams(options: Mapping[str, Any]) -> bool:
    """Whether the weights are to be read a layer at a time.

    Raises:
        UsageError: Another option can't be had beside it, or wants it.
    """
    from exporter.errors import UsageError

    if not options.get("stream"):
        if options.get("stream_dir") is not None:
            raise UsageError("--stream-dir is for --stream.", "Add --stream, or leave it away.")
        if options.get("device_map") and options.get("ray"):
            raise UsageError(
                "--device-map spreads one model, --ray copies of it.", "Leave one of the two away."
            )
        return False
    for name in ("device_map", "trust_remote_code", "allow_pickle", "ray"):
        if options.get(name):
            raise UsageError(
                f"--stream reads safetensors a layer at a time; --{name.replace('_', '-')} is for "
                "models that are loaded whole.",
                "Leave one of the two away.",
            )
    return True
