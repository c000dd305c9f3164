"""Doors for strangers' files: what is read, how deep and far, and what a result may replace."""

from __future__ import annotations

import json
import os
import socket
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exporter import cli
from exporter.artifacts import PlannedDeletion, PruningPlan
from graph_passes.errors import UnsafeInputError, UsageError
from graph_passes.files.kinds import HTML, ONNX, TEXT, kind_of, refuse_foreign
from graph_passes.files.placing import staging
from graph_passes.files.reading import (
    DEEPEST,
    check_file,
    copy_file,
    opened,
    parse_json,
    read_bytes,
    read_json,
    read_text,
)
from graph_passes.files.storage import save_model
from tests.raising import raises
from tests.tiny_graphs import TinySpec, tiny_model
from tests.tiny_models import into_cache


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text('{"a": 1}')
    (tmp_path / "secret").write_text("secret")
    return made


def refused(path: Path, folder: Path | None = None) -> None:
    target = (folder or path.parent).parent / "copy"
    for call in (read_bytes, check_file, lambda path, folder: copy_file(path, target, folder)):
        with pytest.raises(UnsafeInputError):
            call(path, folder)
    assert not target.exists()


def a_circle(path: Path) -> None:
    path.symlink_to("b")
    path.with_name("b").symlink_to(path.name)


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)  # a socket's path may have only so many letters


NO_FILES: dict[str, Callable[[Path], object]] = {
    "a circle of links": a_circle, "a pipe": os.mkfifo, "a socket": a_socket, "a folder": Path.mkdir
}  # fmt: skip
LINKS = ["../secret", "/proc/self/environ", "/dev/zero", "/dev/null"]


@pytest.mark.parametrize("kind", [*NO_FILES, *LINKS])
def test_no_file_or_one_of_another_folder_is_refused_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(folder)
    path = folder / "x"
    NO_FILES[kind](path) if kind in NO_FILES else path.symlink_to(kind)
    refused(path)
    if kind == "../secret":  # what the user has named may be a link
        assert read_text(path, named=True) == "secret"
    elif kind != "/proc/self/environ":
        with pytest.raises(UnsafeInputError):
            read_text(path, named=True)


def test_a_file_of_the_folder_passes(folder: Path, tmp_path: Path) -> None:
    (folder / "other.json").symlink_to("config.json")
    for path in (folder / "config.json", folder / "other.json"):
        assert read_json(path) == {"a": 1}
        assert read_text(path, folder) == '{"a": 1}'
        check_file(path)
        assert copy_file(path, tmp_path / "copy").read_text() == '{"a": 1}'


def test_links_pass_into_the_blobs_of_the_same_repository_alone(
    folder: Path, tmp_path: Path
) -> None:
    snapshot = into_cache(folder, tmp_path / "hub", subfolder="")
    assert read_json(snapshot / "config.json", snapshot) == {"a": 1}
    other = tmp_path / "hub" / "models--owner--other" / "blobs" / "x"
    other.parent.mkdir(parents=True)
    other.write_text("{}")
    (snapshot / "generation_config.json").symlink_to(other)
    refused(snapshot / "generation_config.json", snapshot)


def test_a_folder_that_is_a_link_hides_nothing(folder: Path) -> None:
    (folder / "more").symlink_to(folder.parent)
    refused(folder / "more" / "secret", folder)


def test_what_is_not_there_is_the_callers_matter(folder: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_bytes(folder / "none")
    check_file(folder / "none")
    beside_a_file = folder / "weights.gguf"
    beside_a_file.write_bytes(b"GGUF")
    check_file(beside_a_file / "tokenizer.json")  # a model that is one file has nothing below it


def test_a_file_is_looked_at_again_once_it_is_open(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link that takes a file's place between the look and the opening."""
    path, really = folder / "config.json", os.open

    def swapped(name: object, flags: int, *args: int) -> int:
        path.unlink()
        path.symlink_to("../secret")
        return really(path, flags, *args)

    monkeypatch.setattr(os, "open", swapped)
    with pytest.raises(UnsafeInputError), opened(path):
        pytest.fail("it was opened")


def test_a_file_is_read_to_its_bound(folder: Path) -> None:
    path, sparse, growing = folder / "config.json", folder / "sparse", Path("/proc/self/status")
    with sparse.open("wb") as file:
        file.truncate(1 << 40)
    assert len(read_bytes(path, limit=8)) == 8
    assert growing.stat().st_size == 0  # the kernel's files say so, and go on and on
    for large, limit in ((path, 7), (sparse, 8 << 20), (growing, 10)):
        with pytest.raises(UnsafeInputError):
            read_bytes(large, limit=limit, named=True)
    with pytest.raises(UnsafeInputError):
        check_file(sparse, limit=1 << 20)
    check_file(sparse)  # weights may be so large


def test_a_large_bound_takes_no_memory(folder: Path) -> None:
    tracemalloc.start()
    try:
        assert read_bytes(folder / "config.json", limit=1 << 30) == b'{"a": 1}'
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("[" * 200_000, "too-many-values"),
        ('{"a":' * 200_000, "too-many-values"),
        ("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), "too-many-values"),
        ('{"a":' * (DEEPEST + 1) + "1" + "}" * (DEEPEST + 1), "too-many-values"),
        *(("1" * digits, "too-many-values") for digits in (41, 400, 10_000)),
        *((text, "") for text in (r'"\ud800"', r'{"\uDFFF": 1}', r'["\udc00\ud800"]')),
    ],
    ids=range(10),
)
def test_json_beyond_all_bounds_is_refused(text: str, code: str) -> None:
    with raises(UnsafeInputError, code, "it"):
        parse_json(text, "it")


@pytest.mark.parametrize(
    "text",
    ["[" * DEEPEST + "]" * DEEPEST, "1" * 40, r'"\ud83d\ude00"', r'"\\ud800"', r'"\ue000"', '"😀"',
     "[1e999, -Infinity]"],  # the last two are what transformers writes into configs
)  # fmt: skip
def test_json_within_them_is_read(text: str) -> None:
    assert parse_json(text, "it") == json.loads(text)


@pytest.mark.parametrize("text", ["{", "", b"\xff{}", "[1,]", "\ufeff{}"])
def test_what_is_no_json_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # Python's own, of several kinds
        parse_json(text, "it")


# What a result may take the place of


def a_graph(path: Path) -> None:
    save_model(tiny_model(TinySpec(layers=2)), path)


def a_plan(path: Path) -> None:
    PruningPlan(deletions=[PlannedDeletion(layer=0, kind="mlp")]).write(path)


KINDS: dict[str, Any] = {
    ONNX: a_graph,
    "pruning_plan": a_plan,
    TEXT: "# Notes, größer\n".encode(),
    HTML: b"<!DOCTYPE html>\n<p>",
    "JSON": b'{"model_type": "llama"}',
    "comparison_report": b'{"schema_version": 1, "kind": "comparison_report"}',
    "safetensors file": b"\x10\0\0\0\0\0\0\0{}",
    "gzip archive": b"\x1f\x8b\x08",
    "binary file": b"\x08\x00\x01engine",
    "": b"",
}


def make(kind: str, path: Path) -> bytes:
    content = KINDS[kind]
    path.write_bytes(content) if isinstance(content, bytes) else content(path)
    return path.read_bytes()


def test_a_letter_that_is_cut_in_two_is_text(tmp_path: Path) -> None:
    for size in (4095, 4096):
        (tmp_path / "file").write_bytes(b"x" * size + "é".encode())
        assert kind_of(tmp_path / "file") == TEXT


def test_what_is_no_regular_file_has_no_kind(tmp_path: Path) -> None:
    a_graph(tmp_path / "graph")
    (tmp_path / "link").symlink_to(tmp_path / "graph")
    assert [kind_of(tmp_path / name) for name in ("link", ".", "gone")] == ["", "", ""]


@pytest.mark.parametrize("there", KINDS)
@pytest.mark.parametrize("new", KINDS)
def test_the_door_replaces_files_of_the_same_kind_alone(
    tmp_path: Path, there: str, new: str
) -> None:
    target = tmp_path / "target"
    before = make(there, target)
    assert kind_of(target) == there
    may = there in ("", new) or not new
    with staging(target) as stage:
        made = make(new, stage.folder / "new")
        if may:
            stage.place([(stage.folder / "new", target)])
        else:
            with raises(UsageError, "foreign-file", target):
                stage.place([(stage.folder / "new", target)])
            with raises(UsageError, "foreign-file"):
                refuse_foreign(target, new)
    assert target.read_bytes() == (made if may else before)
    refuse_foreign(target, "")  # what is to be written need not be known


@pytest.mark.parametrize(
    "call",
    [
        ["prune", "GRAPH", "--drop", "mlp:0", "--verify", "none", "-o", "NOTES"],
        ["quantize", "GRAPH", "-o", "NOTES"],
        ["score", "MODEL", "-o", "NOTES"],
        ["evaluate", "GRAPH", "--tasks", "piqa", "-o", "NOTES"],
        ["compare", "GRAPH", "GRAPH", "-o", "FOLDER"],
    ],
)
def test_a_command_says_so_before_its_work(
    tmp_path: Path, call: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    a_graph(tmp_path / "model.onnx")
    notes = tmp_path / "folder" / "report.json"
    notes.parent.mkdir()
    notes.write_text("notes")
    places = {"GRAPH": tmp_path / "model.onnx", "NOTES": notes, "FOLDER": notes.parent}
    assert cli.run([str(places.get(word, word)) for word in call]) == 2
    assert str(notes) in capsys.readouterr().err
    assert notes.read_text() == "notes"
