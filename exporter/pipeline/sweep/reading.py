"""From a sweep's YAML to what it says, or to where in it the mistake is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from exporter.artifacts import json_path
from exporter.artifacts.yaml_file import YamlFile, parse_yaml, read_yaml
from exporter.errors import SweepError
from exporter.files import sha256_bytes
from exporter.option_types import mistake
from exporter.pipeline.sweep.schema import SweepFile

_MOST_TOLD = 5
_HINT = "What may stand there: exporter/docs/sweeps.md."


@dataclass(frozen=True)
class Sweep:
    """A sweep as it was asked for.

    Attributes:
        path: The file.
        text: What it holds, to the letter.
        file: The same, validated.
    """

    path: Path
    text: str
    file: SweepFile

    @property
    def sha256(self) -> str:
        """Of the file."""
        return sha256_bytes(self.text.encode())


def read_sweep(path: Path) -> Sweep:
    """Reads and validates a sweep's file. Names in it are not looked up.

    Raises:
        SweepError: It can't be read, is no YAML, names a key twice, or says what isn't understood;
            with the line and the JSON path.
    """
    return _validated(read_yaml(path, SweepError))


def parse_sweep(text: str, path: Path) -> Sweep:
    """The same of a text that was read before.

    Raises:
        SweepError: As :func:`read_sweep` does.
    """
    return _validated(parse_yaml(text, path, SweepError))


def _validated(found: YamlFile) -> Sweep:
    try:
        return Sweep(found.path, found.text, SweepFile.model_validate(found.data))
    except ValidationError as error:
        raise SweepError("\n".join(_mistakes(error, found)), _HINT) from error


def _mistakes(error: ValidationError, file: YamlFile) -> Iterator[str]:
    found = _deepest(error.errors(include_url=False))
    for one in found[:_MOST_TOLD]:
        words = mistake(one)
        yield f"{file.place(*one['loc'])}: {json_path(one['loc'])}: {words}."
    if len(found) > _MOST_TOLD:
        yield f"And {len(found) - _MOST_TOLD} more."


def _deepest(found: Sequence[ErrorDetails]) -> list[ErrorDetails]:
    """Without what is only said because something within is wrong."""
    places = [one["loc"] for one in found]
    return [
        one
        for one in found
        if not any(len(p) > len(one["loc"]) and p[: len(one["loc"])] == one["loc"] for p in places)
    ]
