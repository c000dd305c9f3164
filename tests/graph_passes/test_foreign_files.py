"""A result takes the place of files of its own kind alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from exporter import cli
from exporter.artifacts import PlannedDeletion, PruningPlan
from graph_passes.errors import UsageError
from graph_passes.files.kinds import HTML, ONNX, TEXT, kind_of, refuse_foreign
from graph_passes.files.placing import staging
from graph_passes.files.storage import save_model
from tests.raising import raises
from tests.tiny_graphs import TinySpec, tiny_model


def _graph(path: Path) -> None:
    save_model(tiny_model(TinySpec(layers=2)), path)


def _plan(path: Path) -> None:
    PruningPlan(deletions=[PlannedDeletion(layer=0, kind="mlp")]).write(path)


def _holding(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


KINDS: dict[str, Callable[[Path], object]] = {
    ONNX: _graph,
    "pruning_plan": _plan,
    TEXT: _holding("# Notes, größer\n".encode()),
    HTML: _holding(b"<!DOCTYPE html>\n<p>"),
    "JSON": _holding(b'{"model_type": "llama"}'),
    "comparison_report": _holding(b'{"schema_version": 1, "kind": "baseline_set"}'),
    "safetensors file": _holding(b"\x10\0\0\0\0\0\0\0{}"),
    "gzip archive": _holding(b"\x1f\x8b\x08"),
    "binary file": _holding(b"\x08\x00\x01engine"),
    "": _holding(b""),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_told_by_the_beginning(tmp_path: Path, kind: str) -> None:
    KINDS[kind](tmp_path / "file")
    assert kind_of(tmp_path / "file") == kind


def test_a_letter_that_is_cut_in_two_is_text(tmp_path: Path) -> None:
    for size in (4095, 4096):
        (tmp_path / "file").write_bytes(b"x" * size + "é".encode())
        assert kind_of(tmp_path / "file") == TEXT


def test_what_is_no_regular_file_has_no_kind(tmp_path: Path) -> None:
    _graph(tmp_path / "graph")
    (tmp_path / "link").symlink_to(tmp_path / "graph")
    assert [kind_of(tmp_path / name) for name in ("link", ".", "gone")] == ["", "", ""]


@pytest.mark.parametrize("there", KINDS)
@pytest.mark.parametrize("new", KINDS)
def test_the_door_replaces_files_of_the_same_kind_alone(
    tmp_path: Path, there: str, new: str
) -> None:
    target = tmp_path / "target"
    KINDS[there](target)
    before = target.read_bytes()
    with staging(target) as stage:
        KINDS[new](stage.folder / "new")
        made = (stage.folder / "new").read_bytes()
        if there in ("", new) or not new:
            stage.place([(stage.folder / "new", target)])
        else:
            with raises(UsageError, "foreign-file", target):
                stage.place([(stage.folder / "new", target)])
    assert target.read_bytes() == (made if there in ("", new) or not new else before)


def test_what_is_to_be_written_need_not_be_known(tmp_path: Path) -> None:
    _plan(tmp_path / "plan")
    refuse_foreign(tmp_path / "plan", "")
    with raises(UsageError, "foreign-file"):
        refuse_foreign(tmp_path / "plan", ONNX)


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
    _graph(tmp_path / "model.onnx")
    notes = tmp_path / "folder" / "report.json"
    notes.parent.mkdir()
    notes.write_text("notes")
    places = {"GRAPH": tmp_path / "model.onnx", "NOTES": notes, "FOLDER": notes.parent}
    assert cli.run([str(places.get(word, word)) for word in call]) == 2
    assert str(notes) in capsys.readouterr().err
    assert notes.read_text() == "notes"
