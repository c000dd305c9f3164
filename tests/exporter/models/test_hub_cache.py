"""ONNX files in a Hugging Face cache, where files are links: read, cut, verified, run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from exporter.artifacts import PlannedDeletion
from exporter.cut.options import CutOptions
from exporter.cut.surgery import inspect_file, prune_file
from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
from exporter.errors import BackendError, OnnxFileError
from exporter.models.graph_facts import read_facts
from graph_passes import ResidualSite
from graph_passes.files import storage
from graph_passes.files.storage import data_files, load_model, runtime_form, save_model
from tests.raising import raises
from tests.reading import data_of
from tests.tiny_graphs import TinySpec, tiny_feed, tiny_model
from tests.tiny_models import into_cache

CUT = [PlannedDeletion(layer=1, kind="attention")]


@pytest.fixture
def plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The model as plain files."""
    monkeypatch.setattr(storage, "_INLINE_BYTES", 32)  # tiny weights go to the data file too
    path = tmp_path / "plain" / "model.onnx"
    save_model(tiny_model(TinySpec(tied=True)), path)
    return path


@pytest.fixture
def cached(plain: Path, tmp_path: Path) -> Path:
    """The same model in a cache."""
    copy = tmp_path / "download"
    copy.mkdir()
    for file in plain.parent.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return into_cache(copy, tmp_path / "hub") / "model.onnx"


def test_sites_are_found_in_a_cache(cached: Path, plain: Path) -> None:
    assert inspect_file(cached) == inspect_file(plain)
    assert all(isinstance(site, ResidualSite) for site in inspect_file(cached))


@pytest.mark.parametrize("subfolder", ["", "onnx", "onnx/fp32"])
def test_a_snapshot_may_have_folders(plain: Path, tmp_path: Path, subfolder: str) -> None:
    folder = into_cache(plain.parent, tmp_path / "hub", subfolder=subfolder)
    assert data_files(load_model(folder / "model.onnx")) == [data_of(folder / "model.onnx")]


def test_a_model_is_cut_and_verified_in_a_cache(cached: Path, plain: Path, tmp_path: Path) -> None:
    blobs = {file: file.read_bytes() for file in cached.parents[3].joinpath("blobs").iterdir()}
    assert len(blobs) == 2
    report = prune_file(cached, tmp_path / "o" / "m.onnx", CUT)
    again = prune_file(plain, tmp_path / "p" / "m.onnx", CUT)
    assert report.verification == again.verification
    assert report.verification.passed is True
    assert report.made_from == again.made_from
    for name in ("m.onnx", data_of(tmp_path / "p" / "m.onnx").name):
        written = tmp_path / "o" / name
        assert not written.is_symlink()
        assert written.read_bytes() == (tmp_path / "p" / name).read_bytes()
    assert {file: file.read_bytes() for file in blobs} == blobs


@pytest.mark.parametrize("inside", [True, False])
def test_sharing_a_caches_weights_is_refused(cached: Path, tmp_path: Path, inside: bool) -> None:
    target = (cached.parent if inside else tmp_path / "o") / "pruned.onnx"
    with raises(OnnxFileError, "weights-linked" if inside else "other-folder"):
        prune_file(cached, target, CUT, CutOptions(weights="share"))
    assert not target.exists()


def _redirect(cached: Path, target: Path) -> None:
    data = data_of(cached)
    content = data.read_bytes()
    data.unlink()
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)
    data.symlink_to(target)


@pytest.mark.parametrize(
    "elsewhere",
    [
        "outside.data",
        "hub/models--owner--other/blobs/outside",
        "hub/models--owner--name/refs/outside",
        "hub/models--owner--name/blobs/below/outside",
        "hub/models--owner--name/snapshots/other/outside",
    ],
)
def test_a_link_out_of_the_blobs_is_refused(cached: Path, tmp_path: Path, elsewhere: str) -> None:
    _redirect(cached, tmp_path / elsewhere)
    with raises(OnnxFileError, "outside-folder", cached):
        load_model(cached)
    with raises(OnnxFileError, "outside-folder", cached):
        prune_file(cached, tmp_path / "o" / "m.onnx", CUT)


def test_blobs_that_are_a_link_themselves_are_refused(cached: Path, tmp_path: Path) -> None:
    blobs = cached.parents[3] / "blobs"
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    with raises(OnnxFileError, "outside-folder", cached):
        load_model(cached)


@pytest.mark.parametrize("name", ["model--owner--name", "some_folder"])
def test_only_a_caches_layout_counts(cached: Path, tmp_path: Path, name: str) -> None:
    repository = cached.parents[3]
    moved = repository.rename(repository.with_name(name))
    with raises(OnnxFileError, "outside-folder"):
        load_model(moved / cached.relative_to(repository))


def _runner(path: Path) -> OnnxRuntimeRunner:
    return OnnxRuntimeRunner(path, threads=1)


def test_the_runner_takes_a_model_in_a_cache(cached: Path, plain: Path) -> None:
    feed = tiny_feed(tiny_model(TinySpec(tied=True)), seq=4)
    results = []
    for path in (cached, plain):
        with _runner(path) as runner:
            results.append(runner.run(feed, ["logits"])["logits"])
    np.testing.assert_array_equal(results[0], results[1])


def test_the_runner_follows_no_link_out_of_a_cache(cached: Path, tmp_path: Path) -> None:
    _redirect(cached, tmp_path / "outside.data")
    with raises(BackendError, "outside-folder", cached), _runner(cached):
        pass


def test_facts_are_read_in_a_cache(cached: Path, plain: Path) -> None:
    assert read_facts(cached) == read_facts(plain)


def test_without_links_the_runtime_gets_the_model_as_it_is(plain: Path) -> None:
    model = load_model(plain)
    data, folder = runtime_form(model, plain.parent)
    assert folder == plain.parent
    assert data == ir.to_proto(model).SerializeToString(deterministic=True)


def test_the_model_stays_when_its_locations_are_resolved(cached: Path) -> None:
    model = load_model(cached)
    tensors = [value.const_value for value in model.graph.initializers.values()]
    data, folder = runtime_form(model, cached.parent)
    assert folder == (cached.parents[3] / "blobs").resolve()
    assert data_of(cached).name.encode() not in data
    after = [value.const_value for value in model.graph.initializers.values()]
    assert all(a is b for a, b in zip(tensors, after, strict=True))
