"""What a result's weights are named, and what becomes of an earlier result."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_storage import PLAN, _all_weights_external, _rewrite, saved
from written_files import all_data_of, data_of

from graph_passes import prune_graph
from graph_passes.files import storage
from graph_passes.files.hashing import sha256_file
from graph_passes.files.storage import data_files, load_model, save_model

__all__ = ["_all_weights_external", "saved"]  # fixtures


def test_weights_are_named_by_what_is_in_them(saved: Path, tmp_path: Path) -> None:
    data = data_of(saved)
    assert data.name == f"model.onnx.{sha256_file(data)[:16]}.data"
    assert [Path(tensor.path) for tensor in storage.external_tensors(load_model(saved))]
    assert data_files(load_model(saved)) == [data]
    save_model(load_model(saved), tmp_path / "again" / "model.onnx")
    assert data_of(tmp_path / "again" / "model.onnx").name == data.name


@pytest.mark.parametrize("named", ["hash", "plain"])
def test_the_data_of_an_earlier_result_goes(saved: Path, tmp_path: Path, named: str) -> None:
    """Also that of an earlier version, which had no hash in its name."""
    target = tmp_path / "out" / "m.onnx"
    save_model(prune_graph(load_model(saved), PLAN)[0], target)
    earlier = data_of(target)
    if named == "plain":
        _rewrite(target, "location", "m.onnx.data")
        earlier = earlier.rename(target.with_name("m.onnx.data"))
        assert load_model(target)
    mine = target.with_name("m.onnx.0123456789abcdef.data")
    mine.write_bytes(b"mine")
    save_model(prune_graph(load_model(saved), PLAN[:1])[0], target)
    assert not earlier.exists()
    assert mine.read_bytes() == b"mine"
    assert data_files(load_model(target)) == [file for file in all_data_of(target) if file != mine]
