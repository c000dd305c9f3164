"""The process that renders a chat template: a stranger's program, in bounds."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from datetime import datetime
from itertools import cycle
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from exporter.errors import first_line
from exporter.processes import end_with_parent, limit_itself

_ROLES = ("user", "assistant")
_MOST_CHARACTERS, _OF_A_PROMPT, _TIMES = 1 << 20, 1 << 13, 4  # of all; more a prompt, and its words


def rendered(request: Mapping[str, Any]) -> dict[str, Any]:
    """What a template writes of each user's words, or why it fails."""
    try:
        template, written = _environment().from_string(request["template"]), []
        left = _MOST_CHARACTERS
        for said in request["said"]:
            turns = [said] if isinstance(said, str) else said
            left += _OF_A_PROMPT + _TIMES * sum(map(len, turns))
            messages = [{"role": r, "content": text} for r, text in zip(cycle(_ROLES), turns)]
            result = {**request["variables"], "messages": messages}
            written.append(_bounded(template, result, left))
            left -= len(written[-1])
        return {"written": written}
    except MemoryError:
        return {"error": f"it takes more than {request['nbytes'] >> 20} MB"}
    except Exception as error:  # jinja2's, and whatever the template raises
        return {"error": first_line(error)}


def main() -> None:
    """Reads a request, and writes what came of it."""
    end_with_parent(int(sys.argv[1]))
    request = json.load(sys.stdin)
    limit_itself(request["seconds"], request["nbytes"])
    json.dump(rendered(request), sys.stdout)


def _bounded(template: Template, items: Mapping[str, object], most: int) -> str:
    written = ""
    for piece in template.generate(items):
        written += piece
        if len(written) > most:
            raise TemplateError(f"it writes more than {most:,} characters")
    return written


class _Answers(Extension):
    """The tag that marks a model's own words for training; here it says nothing."""

    tags = {"generation"}  # noqa: RUF012  # as jinja2 has it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """What stands within the tag, as it is."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Names(Namespace):
    """Jinja's own lets a template write attributes of Python's, such as ``__class__``."""

    def __init__(self, /, *given: Any, **named: Any) -> None:
        super().__init__()
        for name, value in dict(*given, **named).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a namespace has no {name!r}")
        super().__setitem__(name, value)


def _environment() -> ImmutableSandboxedEnvironment:
    """What transformers renders chat templates in: its filters, functions and rules of spaces."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Answers, loopcontrols]
    )
    made.filters["tojson"] = _json
    made.globals.update(namespace=_Names, raise_exception=_fail, strftime_now=_now)
    return made


def _json(value: Any, ensure_ascii: bool = False, **how: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **how)


def _fail(message: str) -> None:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


if __name__ == "__main__":
    main()
