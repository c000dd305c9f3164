"""The options of a stage by their fields' names, those of its parts with these before."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import get_args, get_type_hints

from exporter.options import Options


def leaves_of(kind: type, begin: str = "") -> Iterator[str]:
    """The options of a class and of its parts."""
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        result = [hints[field.name], *get_args(hints[field.name])]
        parts = [one for one in result if isinstance(one, type) and issubclass(one, Options)]
        if parts:
            yield from leaves_of(parts[0], f"{begin}{field.name}.")
        else:
            yield begin + field.name
