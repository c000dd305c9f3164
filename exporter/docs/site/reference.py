"""The references of all commands and of all files, as MyST Markdown, from what defines them."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import click

from exporter.artifacts import Artifact
from exporter.choose.costs.table import CostTable
from exporter.cli import cli
from exporter.cli.command import SchemaCommand, help_of
from exporter.engines.build.engine_set import EngineRecord
from exporter.options import Leaf

_MARKS = r"[\\*_<>\[\]#|]"


def command_reference() -> str:
    """Every command under a heading of its own."""
    return "\n".join(_command(name) for name in cli.list_commands())


def _command(name: str) -> str:
    command = cli.get_command(None, name)
    assert command is not None, name
    context = click.Context(command, info_name=f"depthcut {name}")
    usage = command.get_usage(context).removeprefix("Usage: ")
    lines = [f"## depthcut {name}", "", _words(command.help), "", "```text", usage, "```", ""]
    lines += [f"```{{program}} depthcut {name}", "```", ""]
    if isinstance(command, SchemaCommand):
        lines += _sections(command, context)
    return "\n".join(lines)


def _sections(command: SchemaCommand, context: click.Context) -> Iterable[str]:  # type: ignore[type-arg]
    """The options by their headings, keys of files at the end of each."""
    shown = [leaf for leaf in command.leaves.values() if not leaf.look.argument]
    sections = dict[str, list[Leaf]]()
    for leaf in shown:
        sections.setdefault(leaf.look.section, []).append(leaf)
    params = {param.name: param for param in command.params}
    for title, leaves in sections.items():
        yield f"### {title}\n"
        for leaf in sorted(leaves, key=lambda leaf: leaf.look.config_only):
            yield _option(leaf, params.get(leaf.key), context)


def _option(leaf: Leaf, param: click.Parameter | None, context: click.Context) -> str:
    record = param.get_help_record(context) if param is not None else None
    name = record[0] if record is not None and not leaf.look.config_only else leaf.key
    words = _words(help_of(leaf))
    if leaf.look.config_only:
        words = f"Only in a `--config` file. {words}"
    return "\n".join([f"```{{option}} {name}", words, "```", ""])


def _words(text: str | None) -> str:
    """Words of a help as Markdown: backticks keep their sense, all else has none."""
    pieces = inspect.cleandoc(text or "").split("`")
    marked = zip(pieces, itertools.cycle((False, True)), strict=False)
    return "".join(f"`{p}`" if code else re.sub(_MARKS, r"\\\g<0>", p) for p, code in marked)


Schema = Mapping[str, Any]
_ALONE = (CostTable, EngineRecord)
_NOTHING: Mapping[str, str] = {}
_HEAD = [name for name in Artifact.model_fields if name != "kind"]


def file_reference() -> str:
    """The files, then the records that they are made of, each once."""
    schemas = [model.model_json_schema(mode="serialization") for model in _artifacts()]
    records: dict[str, Schema] = {}
    for schema in schemas:
        records |= schema.get("$defs", {})
    lines = ["## In every file", "", _table(Artifact.model_json_schema(), only=_HEAD)]
    for schema in sorted(schemas, key=_kind):
        lines += _described(f"## {_kind(schema)}", schema)
    lines += ["## Records", "", "The parts of these files, by their names.", ""]
    for name in sorted(records):
        lines += [f"(record-{name.lower()})=", *_described(f"### {name}", records[name])]
    return "\n".join(lines)


def _artifacts() -> list[type[Artifact]]:
    result = [*Artifact.__subclasses__()]
    assert all(item in result for item in _ALONE)
    return [model for model in result if "const" in _kind_field(model.model_json_schema())]


def _kind_field(schema: Schema) -> Schema:
    field: Schema = schema["properties"]["kind"]
    return field


def _kind(schema: Schema) -> str:
    return str(_kind_field(schema)["const"])


def _described(heading: str, schema: Schema) -> list[str]:
    words, _, attributes = inspect.cleandoc(schema.get("description", "")).partition("Attributes:")
    return [heading, "", words.strip(), "", _table(schema, texts=_told(attributes)), ""]


def _told(attributes: str) -> dict[str, str]:
    """What a docstring says of each attribute."""
    matches = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", attributes, flags=re.MULTILINE)
    return {name: " ".join(words.split()) for name, words in matches}


def _table(schema: Schema, only: Sequence[str] = (), texts: Mapping[str, str] = _NOTHING) -> str:
    if "properties" not in schema:
        return f"{_type(schema)}\n"
    head = ["field", "value", "if absent", *(["meaning"] if texts else [])]
    rows = [head, ["---"] * len(head)]
    for name, field in schema["properties"].items():
        if name in only or not (only or name in (*_HEAD, "kind")):
            absent = "refused" if name in schema.get("required", []) else _default(field)
            cells = [f"`{name}`", _type(field), absent, texts.get(name, "")]
            rows.append(cells[: len(head)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _default(field: Schema) -> str:
    value = field.get("default")
    return "" if value is None else f"`{value}`"


def _type(field: Schema) -> str:
    return " or ".join(dict.fromkeys(_alternatives(field)))


def _alternatives(field: Schema) -> Iterator[str]:
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        yield f"[{name}](#record-{name.lower()})"
    elif "anyOf" in field:
        for item in field["anyOf"]:
            yield from _alternatives(item)
    elif "const" in field or "enum" in field:
        yield ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    elif "prefixItems" in field:
        yield f"[{', '.join(_type(item) for item in field['prefixItems'])}]"
    elif field.get("type") == "array":
        yield f"list of {_type(field.get('items', {}))}"
    elif isinstance(field.get("additionalProperties"), Mapping):
        yield f"mapping of names to {_type(field['additionalProperties'])}"
    else:
        yield str(field.get("type", "anything"))
