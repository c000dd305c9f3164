"""The door for files of strangers: what passes, and what does not, without waiting for ever."""

from __future__ import annotations

import os
import socket
import tracemalloc
from pathlib import Path

import pytest

from graph_passes.errors import UnsafeInputError
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
from tests.tiny_models import into_cache


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text('{"a": 1}')
    (tmp_path / "secret").write_text("secret")
    return made


def _refused(path: Path, folder: Path | None = None) -> None:
    with pytest.raises(UnsafeInputError):
        read_bytes(path, folder)
    with pytest.raises(UnsafeInputError):
        check_file(path, folder)
    target = (folder or path.parent).parent / "copy"
    with pytest.raises(UnsafeInputError):
        copy_file(path, target, folder)
    assert not target.exists()


def test_a_file_of_the_folder_passes(folder: Path, tmp_path: Path) -> None:
    path = folder / "config.json"
    assert read_json(path) == {"a": 1}
    assert read_text(path, folder) == '{"a": 1}'
    check_file(path)
    assert copy_file(path, tmp_path / "copy").read_text() == '{"a": 1}'


def test_links_inside_the_folder_pass(folder: Path) -> None:
    (folder / "other.json").symlink_to("config.json")
    assert read_json(folder / "other.json") == {"a": 1}
    check_file(folder / "other.json")


def test_links_into_the_blobs_of_the_same_repository_pass(folder: Path, tmp_path: Path) -> None:
    snapshot = into_cache(folder, tmp_path / "hub", subfolder="")
    assert read_json(snapshot / "config.json", snapshot) == {"a": 1}


def test_links_into_the_blobs_of_another_repository_do_not(folder: Path, tmp_path: Path) -> None:
    snapshot = into_cache(folder, tmp_path / "hub", subfolder="")
    other = tmp_path / "hub" / "models--owner--other" / "blobs" / "x"
    other.parent.mkdir(parents=True)
    other.write_text("{}")
    (snapshot / "generation_config.json").symlink_to(other)
    _refused(snapshot / "generation_config.json", snapshot)


@pytest.mark.parametrize("target", ["../secret", "/proc/self/environ", "/dev/zero", "/dev/null"])
def test_links_out_of_the_folder_do_not_pass(folder: Path, target: str) -> None:
    (folder / "template").symlink_to(target)
    _refused(folder / "template")


def test_a_folder_that_is_a_link_hides_nothing(folder: Path) -> None:
    (folder / "more").symlink_to(folder.parent)
    _refused(folder / "more" / "secret", folder)


def test_a_circle_of_links_does_not_pass(folder: Path) -> None:
    (folder / "a").symlink_to("b")
    (folder / "b").symlink_to("a")
    _refused(folder / "a")


def test_a_pipe_is_refused_at_once(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    _refused(folder / "pipe")


def test_a_socket_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)  # a socket's path may have only so many letters
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("s")
        _refused(folder / "s")


def test_a_folder_is_no_file(folder: Path) -> None:
    (folder / "sub").mkdir()
    _refused(folder / "sub")


def test_what_the_user_has_named_may_be_a_link(folder: Path) -> None:
    (folder / "plan").symlink_to("../secret")
    assert read_text(folder / "plan", named=True) == "secret"


def test_what_the_user_has_named_is_still_no_pipe(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    with pytest.raises(UnsafeInputError):
        read_text(folder / "pipe", named=True)


def test_what_is_not_there_is_the_callers_matter(folder: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_bytes(folder / "none")
    check_file(folder / "none")


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


def test_a_large_file_is_not_read(folder: Path) -> None:
    with (folder / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UnsafeInputError):
        read_bytes(folder / "sparse")
    with pytest.raises(UnsafeInputError):
        check_file(folder / "sparse", limit=1 << 20)
    check_file(folder / "sparse")  # weights may be so large


def test_a_file_that_grows_is_read_to_the_bound(folder: Path) -> None:
    # The kernel's files say that they are empty, and go on and on.
    assert Path("/proc/self/status").stat().st_size == 0
    with pytest.raises(UnsafeInputError):
        read_bytes(Path("/proc/self/status"), limit=10, named=True)


def test_the_bound_itself_may_be_reached(folder: Path) -> None:
    assert len(read_bytes(folder / "config.json", limit=8)) == 8
    with pytest.raises(UnsafeInputError):
        read_bytes(folder / "config.json", limit=7)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 200_000,
        '{"a":' * 200_000,
        "[" * (DEEPEST + 1) + "]" * (DEEPEST + 1),
        '{"a":' * (DEEPEST + 1) + "1" + "}" * (DEEPEST + 1),
    ],
    ids=["lists", "objects", "one list too many", "one object too many"],
)
def test_json_is_nested_only_so_deep(text: str) -> None:
    with pytest.raises(UnsafeInputError):
        parse_json(text, "it")


def test_json_may_be_nested_so_deep() -> None:
    parse_json("[" * DEEPEST + "]" * DEEPEST, "it")


@pytest.mark.parametrize("digits", [41, 400, 10_000])
def test_a_number_has_only_so_many_digits(digits: int) -> None:
    assert parse_json("1" * 40, "it") == int("1" * 40)
    with pytest.raises(UnsafeInputError):
        parse_json("1" * digits, "it")


@pytest.mark.parametrize("text", ["{", "", b"\xff{}", "[1,]", "\ufeff{}"])
def test_what_is_no_json_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # Python's own, of several kinds
        parse_json(text, "it")


def test_a_large_bound_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "small.json"
    path.write_text("{}")
    tracemalloc.start()
    try:
        assert read_bytes(path, limit=1 << 30) == b"{}"
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("text", [r'"\ud800"', r'{"\uDFFF": 1}', r'["\udc00\ud800"]'])
def test_halves_of_characters_are_refused(text: str) -> None:
    with pytest.raises(UnsafeInputError):
        parse_json(text, "it")


@pytest.mark.parametrize("text", [r'"\ud83d\ude00"', r'"\\ud800"', r'"\ue000"', '"😀"'])
def test_whole_characters_are_not(text: str) -> None:
    assert isinstance(parse_json(text, "it"), str)


def test_numbers_that_json_has_not_do_no_harm() -> None:
    """transformers writes them into configs."""
    assert parse_json("[NaN, Infinity, 1e999]", "it")[1] == float("inf")
