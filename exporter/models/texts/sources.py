"""From what a user names, a file or a data set, to documents."""

from __future__ import annotations

import ast
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from exporter.artifacts import CalibrationRef
from exporter.errors import (
    ComparisonError,
    DepthcutError,
    TextSourceError,
    UnsafeInputError,
    first_line,
)
from exporter.files import sha256_bytes
from exporter.models.texts.documents import Content, Units, articles, halves, is_title
from exporter.optional import require
from graph_passes.files.reading import parse_json

_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data"}
_SHORTEST = 80  # characters; shorter ones tell little
_KINDS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@cache
def docstrings() -> tuple[str, ...]:
    """Each once, in the order of the files' names; those of tests are left out."""
    library, result = Path(sysconfig.get_path("stdlib")), dict[str, None]()
    for file in sorted(library.rglob("*.py")):
        if not _LEFT_OUT & set(file.relative_to(library).parts):
            result.update(dict.fromkeys(_docstrings_in(file)))
    return tuple(item for item in result if len(item) >= _SHORTEST)


def _docstrings_in(file: Path) -> Iterator[str]:
    """Those of one file; none where it is no Python of this version."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, RecursionError, OSError):
        return
    for node in ast.walk(tree):
        if isinstance(node, _KINDS):
            yield ast.get_docstring(node) or ""


TextPair = tuple[str, str]
Line = tuple[Mapping[str, Any], str]
"""An object, and where it stands."""

_SENTENCES = ("sentence1", "sentence2")
_HINT = (
    'Each line is {"query": TEXT, "passage": TEXT}, {"query": TEXT, "passages": [TEXT, ...]} or '
    '{"sentence1": TEXT, "sentence2": TEXT}.'
)


def pairs_in(lines: Sequence[Line]) -> list[list[TextPair]] | None:
    """The pairs of each line; None where the first one, or no query, asks for pairs."""
    first = lines[0][0] if lines else {}
    if any(key in first for key in _SENTENCES):
        return [[_both(line, where, *_SENTENCES)] for line, where in lines]
    if "query" in first and ("passage" in first or "passages" in first):
        return [list(_of_query(line, where)) for line, where in lines]
    if any("query" in line and "relevant" in line for line, _ in lines):
        return list(_into_corpus(lines))
    return None


def _of_query(line: Mapping[str, Any], where: str) -> Iterator[TextPair]:
    passages = line.get("passages")
    if passages is None:
        yield _both(line, where, "query", "passage")
        return
    if not isinstance(passages, list) or not passages:
        raise _one_sided(where, '"passages" is no list of texts')
    for number, passage in enumerate(passages):
        result = {"query": line.get("query"), f"passages[{number}]": passage}
        yield _both(result, where, *result)


def _into_corpus(lines: Sequence[Line]) -> Iterator[list[TextPair]]:
    corpus = {
        str(line.get("id")): _text(line, "text", where)
        for line, where in lines
        if "query" not in line
    }
    names = list(corpus)
    for line, where in lines:
        if "query" not in line:
            continue
        query, relevant = _text(line, "query", where), line.get("relevant")
        if not isinstance(relevant, list) or not relevant or not {*map(str, relevant)} <= {*names}:
            raise _one_sided(where, '"relevant" names no passages')
        result = []
        for name in map(str, relevant):
            behind = names[(names.index(name) + 1) % len(names)]
            result += [(query, corpus[name]), (query, corpus[behind])]
        yield result


def _both(line: Mapping[str, Any], where: str, first: str, second: str) -> TextPair:
    return _text(line, first, where), _text(line, second, where)


def _text(line: Mapping[str, Any], key: str, where: str) -> str:
    text = line.get(key)
    if not isinstance(text, str) or not text.strip():
        raise _one_sided(where, f'"{key}" holds no text')
    return text


def _one_sided(where: str, what: str) -> TextSourceError:
    return TextSourceError(f"{where}: {what}; a pair has two sides.", _HINT, code="one-sided")


Part = Literal["calibration", "evaluation"]

PYDOC = "pydoc"
"""The text that every Python carries."""
DOCSTRINGS = "docstrings"
"""Those of the standard library; ten times as much."""

SPEC_HINT = (
    "Give a text file, a JSON-lines file (.jsonl), 'pydoc', 'docstrings', "
    "or 'hf:DATASET[:CONFIG[:SPLIT[:COLUMN]]]'."
)

_JSONL_SUFFIXES = {".jsonl", ".ndjson"}
_HUB_CHARACTERS = 8_000_000  # a data set is read as far as this: about two million tokens
_DEFAULT_SPLITS: Mapping[Part, tuple[str, ...]] = {
    "calibration": ("train", "validation"),
    "evaluation": ("test", "validation"),
}


@dataclass(frozen=True)
class TextSource:
    """Documents with their origin."""

    source: str
    documents: tuple[str, ...]
    sha256: str  # hex digest of the documents in UTF-8, joined by a zero byte
    line_pairs: tuple[tuple[TextPair, ...], ...] = ()

    @property
    def pairs(self) -> tuple[TextPair, ...]:
        """Those of all lines."""
        return tuple(chain(*self.line_pairs))

    @cached_property
    def content(self) -> Content:
        """What it is known by under whatever name."""
        return Content.of(self.documents)

    def units(self, length: int) -> Units:
        """The parts that serve one end each, where samples have so many tokens."""
        return Units.of(self.documents, length, whole=bool(self.line_pairs))


def read_texts(spec: str, *, part: Part) -> TextSource:
    """Reads the text that a user named."""
    if spec in (PYDOC, DOCSTRINGS):
        return _pythons_own(spec, part)
    if spec.startswith("hf:"):
        return _read_hub(spec, part)
    path = Path(spec)
    text = read_file(path)
    if path.suffix.lower() in _JSONL_SUFFIXES:
        return _of_lines(spec, text, path)
    return replace(_source(spec, articles(text)), sha256=sha256_bytes(text.encode()))


def read_prompts(path: Path) -> TextSource:
    """Reads a file that a user named, a prompt a line."""
    text = read_file(path)
    lines: Iterable[str] = map(str.strip, text.split("\n"))
    if path.suffix.lower() in _JSONL_SUFFIXES:
        lines = _jsonl_documents(text, path, "prompt")
    return _source(str(path), lines, "Write a prompt a line into it.")


def refuse_same_text(
    judged: TextSource | CalibrationRef,
    others: Iterable[TextSource | CalibrationRef],
    what: str,
    hint: str = "Name another text with --eval-text.",
    error: type[DepthcutError] = ComparisonError,
) -> None:
    """Refuses to judge on a text that something was fitted to or chosen by, or a copy of it."""
    for other in others:
        if judged.sha256 == other.sha256 or judged.source == other.source:
            raise error(f"{judged.source} is {what}.", hint, code="same-text")
        if _content(judged).is_shared(_content(other)):
            text = f"{judged.source} has much of its text in common with {other.source}, {what}."
            raise error(text, hint, code="same-text")


def _content(text: TextSource | CalibrationRef) -> Content:
    return text.content if isinstance(text, TextSource) else Content.read(text.content)


def _source(label: str, documents: Iterable[str], hint: str = SPEC_HINT) -> TextSource:
    kept = tuple(document for document in documents if document.strip())
    if not kept:
        raise TextSourceError(f"{label} holds no text.", hint, code="no-text")
    return TextSource(label, kept, sha256_bytes("\0".join(kept).encode()))


def read_file(path: Path) -> str:
    """A UTF-8 file that a user named."""
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise TextSourceError(
            f"The text file {path} does not exist.", SPEC_HINT, code="file-missing"
        ) from None
    except IsADirectoryError:
        raise TextSourceError(
            f"{path} is a folder, and a text is wanted: only classifiers of images and models of "
            "speech read folders.",
            SPEC_HINT,
            code="folder-for-text",
        ) from None
    except UnicodeDecodeError as error:
        raise TextSourceError(
            f"{path} is not UTF-8 text: byte {error.start} can't be decoded.",
            "Convert it, for example with: iconv -t UTF-8",
            code="not-utf-8",
        ) from None
    except OSError as error:
        raise TextSourceError(
            f"{path} can't be read: {error.strerror}.", SPEC_HINT, code="unreadable"
        ) from error


def _of_lines(spec: str, text: str, path: Path) -> TextSource:
    lines = [
        (record, f"{path}, line {number}")
        for record, number in json_lines(text, path)
        if isinstance(record, dict)  # others are told of as documents
    ]
    pairs = pairs_in(lines)
    if pairs is None:
        return _source(spec, _jsonl_documents(text, path))
    source = _source(spec, ("\n\n".join(dict.fromkeys(chain(*pair))) for pair in pairs))
    return replace(source, line_pairs=tuple(map(tuple, pairs)))


def _jsonl_documents(text: str, path: Path, field: str = "text") -> Iterator[str]:
    for record, number in json_lines(text, path):
        yield _record_text(record, f"{path}, line {number}", field)


def json_lines(text: str, path: Path) -> Iterator[tuple[Any, int]]:
    """The values of a JSON-lines file with the numbers of their lines; empty ones don't count."""
    # Not splitlines(): U+2028 and its like may stand unescaped inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _parsed_line(line, path, number), number


def _parsed_line(line: str, path: Path, number: int) -> Any:
    try:
        return parse_json(line, "it")
    except (ValueError, UnsafeInputError) as error:
        raise TextSourceError(
            f"{path}, line {number}: not valid JSON ({first_line(error)}).",
            "A JSON-lines file has one complete JSON object a line.",
            code="not-json",
        ) from None


def _record_text(record: Any, where: str, field: str = "text") -> str:
    hint = f'Each line must be an object with a string field, best called "{field}".'
    if not isinstance(record, dict):
        raise TextSourceError(
            f"{where}: a JSON object is needed, not {_json_type(record)}.",
            hint,
            code="not-an-object",
        )
    named = record.get(field)
    if isinstance(named, str):
        return named
    if field in record:
        raise TextSourceError(
            f'{where}: the field "{field}" is {_json_type(named)}.', hint, code="not-a-string"
        )
    strings = [value for value in record.values() if isinstance(value, str)]
    if not strings:
        raise TextSourceError(f"{where}: no field holds a string.", hint, code="no-string")
    return max(strings, key=len)


def _json_type(value: Any) -> str:
    names = {list: "a list", dict: "an object", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")


@cache
def _pythons_own(spec: str, part: Part) -> TextSource:
    half = _halves(spec)[0 if part == "calibration" else 1]
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return _source(f"{spec} ({part} half, Python {version})", half)


@cache
def _halves(spec: str) -> tuple[list[str], list[str]]:
    if spec == DOCSTRINGS:
        return halves(docstrings())
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise TextSourceError(
            "This Python carries no pydoc_data.topics.", "Name a text file instead."
        ) from None
    return halves([topics[name] for name in sorted(topics)])


def _read_hub(spec: str, part: Part) -> TextSource:
    """Streams a hub data set; the text label carries config, split and column."""
    label, rows = hub_rows(spec, part, "text")
    column = _hub_fields(spec)[3]
    try:
        documents = list(_row_texts(rows, column, spec))
    except TextSourceError:
        raise
    except Exception as error:
        raise _unread(spec, error) from error
    if any(map(is_title, documents)):  # of a data set of WikiText the rows are lines
        documents = articles("".join(f"{row.strip()}\n" for row in documents))
    return _source(label, documents)


def hub_rows(spec: str, part: Part, column: str) -> tuple[str, Any]:
    """Opens a data set of the hub; its rows come as they are asked for."""
    name, config, split, named = _hub_fields(spec)
    datasets = require("datasets", extra="datasets")
    try:
        chosen = split or _default_split(datasets.get_dataset_split_names(name, config), part, spec)
        rows = datasets.load_dataset(name, config, split=chosen, streaming=True)
    except TextSourceError:
        raise
    except Exception as error:
        raise _unread(spec, error) from error
    return ":".join(["hf", name, config or "", chosen, named or column]), rows


def _unread(spec: str, error: Exception) -> TextSourceError:
    """The error for what the library raises: anything from OSError to its own classes."""
    reason = (str(error) or type(error).__name__).strip().splitlines()[0]
    return TextSourceError(
        f"{spec} can't be read: {reason}",
        "Check the name, the config and the split, and that the hub can be reached.",
    )


def _hub_fields(spec: str) -> tuple[str, str | None, str | None, str | None]:
    fields = [field or None for field in spec.removeprefix("hf:").split(":")]
    if len(fields) > 4 or fields[0] is None:
        raise TextSourceError(f"{spec} does not name a data set.", SPEC_HINT, code="no-data-set")
    config, split, column = (*fields[1:], None, None, None)[:3]
    return fields[0], config, split, column


def _default_split(present: list[str], part: Part, spec: str) -> str:
    for name in _DEFAULT_SPLITS[part]:
        if name in present:
            return name
    raise TextSourceError(
        f"{spec} has no split {' or '.join(_DEFAULT_SPLITS[part])}; it has {', '.join(present)}.",
        "Name the split: hf:DATASET:CONFIG:SPLIT (CONFIG may be empty).",
        code="split-missing",
    )


def _row_texts(rows: Iterable[Any], column: str | None, spec: str) -> Iterator[str]:
    length = 0
    for number, row in enumerate(rows, start=1):
        text = row.get(column) if column else _record_text(dict(row), f"{spec}, row {number}")
        if not isinstance(text, str):
            raise TextSourceError(
                f"{spec}, row {number}: no text in column {column!r}.",
                f"The columns are {', '.join(row)}.",
                code="column-missing",
            )
        yield text
        length += len(text)
        if length >= _HUB_CHARACTERS:
            return
