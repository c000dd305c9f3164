"""Models larger than memory and disk: cut with a second of work and a hundred megabytes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from exporter.artifacts import PruneReport
from graph_passes import ResidualSite, find_sites
from graph_passes.files.storage import data_files, external_tensors, load_model
from tests.llama_shaped import LlamaShape, write_llama
from tests.measured import depthcut, takes_holes
from tests.raising import tells
from tests.reading import data_of

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's counts")

EVERY_SECOND = [*range(0, 80, 2)]
TERABYTE = 10**12


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    if not takes_holes(tmp_path):
        pytest.skip("this file system writes every zero")
    return tmp_path


def _written(folder: Path) -> int:
    """Bytes on disk, holes left out."""
    return sum(file.stat().st_blocks * 512 for file in folder.rglob("*") if file.is_file())


def _drops(layers: list[int]) -> str:
    return "attention:" + ",".join(map(str, layers))


def test_a_70b_shaped_model_is_cut_without_its_weights(folder: Path) -> None:
    source = write_llama(folder / "model.onnx", LlamaShape())
    size = source.with_name("model.onnx.data").stat().st_size
    assert 130e9 < size < 145e9
    target = folder / "pruned.onnx"
    done = depthcut(
        "prune", source, "-o", target, "--drop", _drops(EVERY_SECOND),
        "--weights", "share", "--verify", "none",
    )  # fmt: skip
    assert done.peak_mb < 300
    assert _written(folder) < 5e6
    pruned = load_model(target)
    assert data_files(pruned) == data_files(load_model(source))
    kept = [site for site in find_sites(pruned) if isinstance(site, ResidualSite)]
    layers = [site.layer for site in kept if site.kind == "attention"]
    assert layers == [layer for layer in range(80) if layer not in EVERY_SECOND]
    assert len(kept) == 80 + 40
    caches = [v.name for v in pruned.graph.inputs if (v.name or "").startswith("past")]
    assert len(caches) == 80
    report = PruneReport.read(folder / "prune.json")
    assert report.before.bytes == pytest.approx(size, rel=1e-4)
    assert report.before.bytes - report.after.bytes == pytest.approx(40 * 302e6, rel=1e-2)
    assert report.verification.method == "none"


def test_memory_is_flat_when_weights_are_written_anew(folder: Path) -> None:
    """The same graph over 50 MB and over 0.5 GB, of which one weight takes 130 MB."""
    peaks = []
    for name, hidden in (("small", 512), ("large", 2048)):
        shape = LlamaShape(
            layers=3, hidden=hidden, heads=16, kv_heads=4, intermediate=4 * hidden,
        )  # fmt: skip
        source = write_llama(folder / name / "model.onnx", shape)
        target = folder / name / "o" / "m.onnx"
        done = depthcut("prune", source, "-o", target, "--drop", _drops([1]), "--verify", "none")
        peaks.append(done.peak_mb)
        before, after = (
            file.stat().st_size for file in (source.with_name("model.onnx.data"), data_of(target))
        )
        assert before > 4e8 or name == "small"
        assert 0 < before - after < 0.1 * before
        assert _written(target.parent) < 1e6  # holes stay holes
        assert max(t.offset + t.nbytes for t in external_tensors(load_model(target))) == after  # type: ignore[operator]
    small, large = peaks
    assert large - small < 30
    assert large < 300


def test_a_large_model_is_listed_without_its_weights(folder: Path) -> None:
    source = write_llama(folder / "model.onnx", LlamaShape(hidden=16384, intermediate=65536))
    assert source.with_name("model.onnx.data").stat().st_size > TERABYTE / 2
    done = depthcut("inspect", source)
    assert tells(done.output, 160)
    assert done.peak_mb < 300
