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
from exporter.errors import ComparisonError, DepthcutError, TextSourceError, blaming, first_line
from exporter.files import sha256_bytes
from exporter.models.texts.documents import Content, Units, articles, halves, is_title
from exporter.optional import require
from graph_passes.files.reading import parse_json

TextPair = tuple[str, str]
Line = tuple[Mapping[str, Any], str]
"""An object, and where it stands."""
Part = Literal["calibration", "evaluation"]

PYDOC = "pydoc"
"""The text that every Python carries."""
DOCSTRINGS = "docstrings"
"""Those of the standard library; ten times as much."""
RANDOM = "random"
"""Noise in place of images, recordings or an encoder-decoder's sources."""
JSON_LINES = (".jsonl", ".ndjson")
PARQUET = ".parquet"
TEXTS = (".txt", ".md", ".rst", *JSON_LINES, PARQUET)

SPEC_HINT = (
    "Give a text file in UTF-8, a JSON-lines file (.jsonl), a Parquet file, a folder of such files "
    f"({', '.join(TEXTS)}), 'pydoc', 'docstrings', or 'hf:DATASET[:CONFIG[:SPLIT[:COLUMN]]]'."
)
_HUB_HINT = "Check the name, the config and the split, and that the hub can be reached."
_PAIRS_HINT = (
    'A line of pairs is {"query": TEXT, "passage": TEXT}, {"query": TEXT, "passages": [TEXT, ...]} '
    'or {"sentence1": TEXT, "sentence2": TEXT}.'
)
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data"}
_SHORTEST = 80  # characters of a docstring; shorter ones tell little
_KINDS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_HUB_CHARACTERS = 8_000_000  # a data set is read as far as this: about two million tokens
_SPLITS: Mapping[Part, tuple[str, ...]] = {
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
    if path.is_dir():
        files = (file for file in sorted(path.rglob("*")) if file.suffix.lower() in TEXTS)
        own = (file for file in files if file.is_file() and not file.is_symlink())
        texts = chain.from_iterable(map(_documents_in, own))
        return _source(spec, dict.fromkeys(texts))  # a crawl holds many a text twice
    if path.suffix.lower() == PARQUET:
        return _source(spec, dict.fromkeys(_documents_in(path)))
    if path.suffix.lower() not in JSON_LINES:
        text = read_file(path)
        return replace(_source(spec, articles(text)), sha256=sha256_bytes(text.encode()))
    lines = [*records_in(path)]
    pairs = _pairs_in(lines)
    if pairs is None:
        return _source(spec, (text_of(line, where) for line, where in lines))
    source = _source(spec, ("\n\n".join(dict.fromkeys(chain(*pair))) for pair in pairs))
    return replace(source, line_pairs=tuple(map(tuple, pairs)))


def _documents_in(path: Path) -> Iterable[str]:
    kind = path.suffix.lower()
    if kind in JSON_LINES:
        return (text_of(line, where) for line, where in records_in(path))
    if kind != PARQUET:
        return articles(read_file(path))
    parquet = require("pyarrow.parquet", extra="datasets")  # datasets would ask the hub first
    with blaming(f"{path} can't be read", SPEC_HINT, TextSourceError):
        batches = parquet.ParquetFile(path).iter_batches()
        rows = chain.from_iterable(batch.to_pylist() for batch in batches)
        return [text_of(row, f"{path}, row {n}") for n, row in enumerate(rows, start=1)]


def read_prompts(path: Path) -> TextSource:
    """Reads a file that a user named, a prompt a line."""
    if path.suffix.lower() in JSON_LINES:
        lines = [text_of(record, where, "prompt") for record, where in records_in(path)]
    else:
        lines = [line.strip() for line in read_file(path).split("\n")]
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
    with blaming(f"{path} can't be read", SPEC_HINT, TextSourceError):
        return path.read_bytes().decode("utf-8")


def records_in(path: Path) -> Iterator[Line]:
    """The objects of a JSON-lines file, and where each stands; empty lines don't count."""
    # Not splitlines(): U+2028 and its like may stand unescaped inside a JSON string.
    for number, line in enumerate(read_file(path).split("\n"), start=1):
        where = f"{path}, line {number}"
        if line.strip():
            hint = "A JSON-lines file has one complete JSON object a line."
            try:
                record = parse_json(line, "it")
            except (ValueError, DepthcutError) as error:
                raise TextSourceError(
                    f"{where}: not valid JSON ({first_line(error)}).", hint, code="bad-line"
                ) from None
            if not isinstance(record, dict):
                raise TextSourceError(f"{where}: no JSON object.", hint, code="bad-line")
            yield record, where


def field_of(line: Mapping[str, Any], key: str, where: str, hint: str = _PAIRS_HINT) -> str:
    """A text that a line must have."""
    text = line.get(key)
    if not isinstance(text, str) or not text.strip():
        raise TextSourceError(f'{where}: "{key}" holds no text.', hint, code="bad-line")
    return text


def text_of(record: Mapping[str, Any], where: str, key: str = "text") -> str:
    """A line's text: of the field of that name, else the longest that there is."""
    texts = [value for value in record.values() if isinstance(value, str)]
    if key in record:
        texts = [record[key]] if isinstance(record[key], str) else []
    if not texts:
        raise TextSourceError(
            f'{where}: there is no string, or "{key}" is none.',
            f'Each line must be an object with a string field, best called "{key}".',
            code="bad-line",
        )
    return max(texts, key=len)


def _pairs_in(lines: Sequence[Line]) -> list[list[TextPair]] | None:
    """The pairs of each line; None where the first one, or no query, asks for pairs."""
    first = lines[0][0] if lines else {}
    if "sentence1" in first or "sentence2" in first:
        return [
            [(field_of(line, "sentence1", where), field_of(line, "sentence2", where))]
            for line, where in lines
        ]
    if "query" in first and ("passage" in first or "passages" in first):
        return [_of_query(line, where) for line, where in lines]
    if any("query" in line and "relevant" in line for line, _ in lines):
        return list(_into_corpus(lines))
    return None


def _of_query(line: Mapping[str, Any], where: str) -> list[TextPair]:
    passages, named = line.get("passages"), {"passage": line.get("passage")}
    if passages is not None:
        passages = passages if isinstance(passages, list) else []
        named = {f"passages[{n}]": passage for n, passage in enumerate(passages or [None])}
    query = field_of(line, "query", where)
    return [(query, field_of(named, name, where)) for name in named]


def _into_corpus(lines: Sequence[Line]) -> Iterator[list[TextPair]]:
    """Of each query with its passages, and beside each of them with the next passage."""
    corpus = {
        str(line.get("id")): field_of(line, "text", where)
        for line, where in lines
        if "query" not in line
    }
    names = list(corpus)
    behind = dict(zip(names, [*names[1:], *names[:1]], strict=True))
    for line, where in lines:
        if "query" in line:
            query, relevant = field_of(line, "query", where), line.get("relevant")
            chosen = [*map(str, relevant)] if isinstance(relevant, list) else []
            if not chosen or not {*chosen} <= {*names}:
                raise TextSourceError(
                    f'{where}: "relevant" names no passages.', _PAIRS_HINT, code="bad-line"
                )
            pairs = [(name, behind[name]) for name in chosen]
            yield [(query, corpus[name]) for name in chain(*pairs)]


@cache
def _pythons_own(spec: str, part: Part) -> TextSource:
    half = _halves(spec)[0 if part == "calibration" else 1]
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return _source(f"{spec} ({part} half, Python {version})", half)


@cache
def _halves(spec: str) -> tuple[list[str], list[str]]:
    if spec == DOCSTRINGS:
        return halves(docstrings())
    with blaming("This Python carries no topics", "Name a text file instead.", TextSourceError):
        from pydoc_data.topics import topics
    return halves([topics[name] for name in sorted(topics)])


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


def _read_hub(spec: str, part: Part) -> TextSource:
    """Streams a hub data set; the text label carries config, split and column."""
    label, rows = hub_rows(spec, part, "text")
    with blaming(f"{spec} can't be read", _HUB_HINT, TextSourceError):
        documents = list(_row_texts(rows, spec))
    if any(map(is_title, documents)):  # of a data set of WikiText the rows are lines
        documents = articles("".join(f"{row.strip()}\n" for row in documents))
    return _source(label, documents)


def hub_rows(spec: str, part: Part, column: str) -> tuple[str, Any]:
    """Opens a data set of the hub; its rows come as they are asked for."""
    name, config, split, named = _hub_fields(spec)
    datasets = require("datasets", extra="datasets")
    with blaming(f"{spec} can't be read", _HUB_HINT, TextSourceError):
        if split is None:
            present = datasets.get_dataset_split_names(name, config)
            split = next((item for item in _SPLITS[part] if item in present), None)
            if split is None:
                raise TextSourceError(
                    f"{spec} has no split {' or '.join(_SPLITS[part])}; it has "
                    f"{', '.join(present)}.",
                    "Name the split: hf:DATASET:CONFIG:SPLIT (CONFIG may be empty).",
                    code="no-such-data",
                )
        rows = datasets.load_dataset(name, config, split=split, streaming=True)
    return ":".join(["hf", name, config or "", split, named or column]), rows


def _hub_fields(spec: str) -> tuple[str, str | None, str | None, str | None]:
    fields = [field or None for field in spec.removeprefix("hf:").split(":")]
    if len(fields) > 4 or fields[0] is None:
        raise TextSourceError(f"{spec} does not name a data set.", SPEC_HINT, code="no-such-data")
    config, split, column = (*fields[1:], None, None, None)[:3]
    return fields[0], config, split, column


def _row_texts(rows: Iterable[Any], spec: str) -> Iterator[str]:
    column, length = _hub_fields(spec)[3], 0
    for number, row in enumerate(rows, start=1):
        where = f"{spec}, row {number}"
        text = row.get(column) if column else text_of(dict(row), where)
        if not isinstance(text, str):
            raise column_missing(where, column, row)
        yield text
        length += len(text)
        if length >= _HUB_CHARACTERS:
            return


def column_missing(where: str, column: str | None, row: Iterable[str]) -> TextSourceError:
    """That a data set has nothing to read in a column."""
    return TextSourceError(
        f"{where}: the column {column!r} holds nothing that is read here.",
        f"The columns are {', '.join(row)}. Name one: hf:DATASET:CONFIG:SPLIT:COLUMN.",
        code="no-such-data",
    )
