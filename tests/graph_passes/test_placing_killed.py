"""Results whose writing was killed: old or new, or finished by the next who comes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from graph_passes.files.placing import finish_interrupted, staging
from graph_passes.files.storage import load_model, save_model
from tests.killed import contents, every_kill, killed, pending, rests, without_exchange

Write = Callable[[Path, str], None]
"""Writes one version of a result into a folder."""


def several_files(folder: Path, version: str) -> None:
    """As a graph with its weights and its report: the data of the earlier one goes."""
    target = folder / "m"
    with staging(target) as stage:
        names = [f"m.{version}.data", "report", "m"]
        for name in names:
            (stage.folder / name).write_text(f"{name} {version}")
        moves = [(stage.folder / name, folder / name) for name in names]
        stage.place(moves, [file for file in folder.glob("m.*.data") if version not in file.name])


def one_file(folder: Path, version: str) -> None:
    with staging(folder / "m") as stage:
        (stage.folder / "m").write_text(version)
        stage.place([(stage.folder / "m", folder / "m")])


def a_folder(folder: Path, version: str) -> None:
    with staging(folder / "m") as stage:
        for name in ("one", "below/two", f"only-{version}"):
            (stage.folder / name).parent.mkdir(exist_ok=True)
            (stage.folder / name).write_text(version)
        stage.place()


def a_report_elsewhere(folder: Path, version: str) -> None:
    target, report = folder / "m", folder / "reports" / "r"
    with staging(target) as stage, staging(report) as other:
        (stage.folder / "m").write_text(version)
        (other.folder / "r").write_text(version)
        stage.place([(other.folder / "r", report), (stage.folder / "m", target)])


WRITERS: list[Write] = [several_files, one_file, a_folder, a_report_elsewhere]
CASES = [*((write, ("old",)) for write in WRITERS), (several_files, ()), (a_folder, ())]


@pytest.fixture(params=["exchange", "no exchange"], autouse=True)
def file_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "no exchange":
        without_exchange(monkeypatch)


def prepared(root: Path, write: Write, versions: tuple[str, ...] = ("old",)) -> Path:
    root.mkdir(parents=True)
    (root / "mine").write_text("mine")
    for version in versions:
        write(root, version)
    assert rests(root) == []
    return root


@pytest.mark.parametrize(("write", "versions"), CASES)
def test_a_reader_finds_the_old_or_the_new(
    tmp_path: Path, write: Write, versions: tuple[str, ...]
) -> None:
    old = contents(prepared(tmp_path / "old", write, versions))
    new = contents(prepared(tmp_path / "new", write, (*versions, "new")))
    seen = []
    for root in every_kill(
        lambda step: prepared(tmp_path / str(step), write, versions),
        lambda root: write(root, "new"),
    ):
        raw = contents(root)
        assert raw in (old, new) or pending(root), root
        finish_interrupted(root / "m")
        assert pending(root) == []
        seen.append(contents(root))
        assert seen[-1] in (old, new), root
    assert seen[0] == old
    assert seen[-1] == new
    assert seen == sorted(seen, key=lambda state: state == new)


@pytest.mark.parametrize(("write", "versions"), CASES)
def test_the_same_command_again_gives_what_an_undisturbed_one_gives(
    tmp_path: Path, write: Write, versions: tuple[str, ...]
) -> None:
    new = contents(prepared(tmp_path / "new", write, (*versions, "new")))
    for root in every_kill(
        lambda step: prepared(tmp_path / str(step), write, versions),
        lambda root: write(root, "new"),
    ):
        write(root, "new")
        assert contents(root) == new
        assert rests(root) == []


@pytest.mark.parametrize("write", [several_files, a_folder])
def test_another_command_in_the_folder_clears_up(tmp_path: Path, write: Write) -> None:
    old = contents(prepared(tmp_path / "old", write))
    new = contents(prepared(tmp_path / "new", write, ("old", "new")))
    for root in every_kill(
        lambda step: prepared(tmp_path / str(step), write), lambda root: write(root, "new")
    ):
        with staging(root / "other") as stage:
            stage.folder.joinpath("other").write_text("other")
            stage.place([(stage.folder / "other", root / "other")])
        assert contents(root) in ({**old, "other": b"other"}, {**new, "other": b"other"})
        assert [path for path in rests(root) if path.parent == root] == []


@pytest.mark.parametrize("write", [several_files, a_folder])
def test_a_reader_may_be_killed_too(tmp_path: Path, write: Write) -> None:
    new = contents(prepared(tmp_path / "new", write, ("old", "new")))
    readers = 0
    for root in every_kill(
        lambda step: prepared(tmp_path / str(step), write), lambda root: write(root, "new")
    ):
        step = 1
        while pending(root) and killed(lambda: finish_interrupted(root / "m"), step):  # noqa: B023
            readers, step = readers + 1, step + 1
        if step > 1:
            finish_interrupted(root / "m")
            assert contents(root) == new
            write(root, "new")
            assert rests(root) == []
    assert readers > 10 or write is a_folder


def graph(value: float) -> ir.Model:
    made = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["": 20]> '
        "g (float[512] x, float[512] w) => (y) { y = Add(x, w) }"
    )
    weight = made.graph.inputs.pop()
    weight.const_value = ir.tensor(np.full(512, value, np.float32), name="w")
    made.graph.register_initializer(weight)
    made.metadata_props["value"] = str(value)
    return made


def test_no_graph_meets_weights_of_another(tmp_path: Path) -> None:
    def before(step: int) -> Path:
        save_model(graph(1.0), tmp_path / str(step) / "m.onnx")
        return tmp_path / str(step) / "m.onnx"

    for path in every_kill(before, lambda path: save_model(graph(2.0), path)):
        loaded = load_model(path)
        weights = loaded.graph.initializers["w"].const_value
        assert weights is not None
        assert set(map(float, weights.numpy())) == {float(loaded.metadata_props["value"])}
        save_model(graph(2.0), path)
        assert [file.suffix for file in sorted(path.parent.iterdir())] == [".onnx", ".data"]


@pytest.mark.parametrize("past", [True, False])
def test_a_clock_that_was_set_back_changes_nothing(tmp_path: Path, past: bool) -> None:
    """Times tell files apart, but never which is the newer one."""

    def write(root: Path, version: str) -> None:
        with staging(root / "m") as stage:
            for name in ("n", "m"):
                (stage.folder / name).write_text(f"{name} {version}")
                os.utime(stage.folder / name, ns=(0, 0) if past else (1 << 62, 1 << 62))
            stage.place([(stage.folder / name, root / name) for name in ("n", "m")])

    new = contents(prepared(tmp_path / "new", write, ("old", "new")))
    for root in every_kill(
        lambda step: prepared(tmp_path / str(step), write), lambda root: write(root, "new")
    ):
        finish_interrupted(root / "m")
        write(root, "new")
        assert contents(root) == new
        assert rests(root) == []
