"""The real model: what is cut from the graph equals what is skipped in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from exporter.artifacts import PlannedDeletion, PruneReport

pytestmark = pytest.mark.real_model

# Rounding of 30 layers in float32; DESIGN's limit is 1e-4 of the largest logit, 3e-3 here.
MAX_ERROR = 5e-4
EIGHT = (4, 5, 6, 7, 14, 25, 26, 28)
CUTS = {
    "eight attentions": [("attention", layer) for layer in EIGHT],
    "attention 0": [("attention", 0)],
    "two blocks": [("block", 14), ("block", 25)],
}


def deletions(name: str) -> list[PlannedDeletion]:
    return [PlannedDeletion(layer=layer, kind=kind) for kind, layer in CUTS[name]]  # type: ignore[arg-type]


def nodes(path: Path) -> int:
    return len(ir.load(path).graph)


@pytest.fixture(scope="module")
def cut(
    smollm2_onnx: Callable[[int], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[int, str], tuple[Path, PruneReport]]]:
    """A cut graph, checked against the masked original, removed when the module is done."""
    done: dict[tuple[int, str], tuple[Path, PruneReport]] = {}

    def made(opset: int, name: str) -> tuple[Path, PruneReport]:
        from exporter.surgery import prune_file

        if (opset, name) not in done:
            path = tmp_path_factory.mktemp("cut") / "model.onnx"
            report = prune_file(smollm2_onnx(opset), path, deletions(name), verify="oracle")
            done[opset, name] = path, report
        return done[opset, name]

    yield made
    for path, _ in done.values():
        for file in path.parent.iterdir():
            file.unlink()


@pytest.mark.parametrize(("opset", "expected"), [(20, 2245), (23, 1035)])
def test_the_export_is_lean_and_equals_pytorch(
    smollm2: Any, smollm2_onnx: Callable[[int], Path], opset: int, expected: int
) -> None:
    from exporter.parity import check_export

    path = smollm2_onnx(opset)
    checks = check_export(smollm2, path)
    assert {check.phase for check in checks} == {"prefill", "decode"}
    assert max(check.max_abs_error for check in checks) < MAX_ERROR
    # Versions of the exporter differ a little.
    assert abs(nodes(path) - expected) < expected * 0.05
    # Tied embeddings once: a second table would be another 113 MB.
    assert (path.parent / "model.onnx.data").stat().st_size < 540e6


@pytest.mark.parametrize(
    ("opset", "name"), [*((20, name) for name in CUTS), (23, "eight attentions")]
)
def test_a_cut_equals_pytorch_and_the_masked_original(
    smollm2: Any, cut: Callable[[int, str], tuple[Path, PruneReport]], opset: int, name: str
) -> None:
    from exporter.parity import check_export

    path, report = cut(opset, name)
    assert report.verification.passed is True
    assert report.verification.max_abs_error is not None
    assert report.verification.max_abs_error < MAX_ERROR
    checks = check_export(smollm2, path, deletions=deletions(name))
    assert all(check.passed for check in checks)
    assert max(check.max_abs_error for check in checks) < MAX_ERROR


def test_a_branch_that_is_cut_but_not_skipped_is_noticed(
    smollm2: Any, cut: Callable[[int, str], tuple[Path, PruneReport]]
) -> None:
    """The same caches are gone, so only the values can tell: block 14 against attention 14."""
    from exporter.parity import check_export

    path, _ = cut(20, "two blocks")
    told = [PlannedDeletion(layer=layer, kind="attention") for layer in (14, 25)]
    assert not all(check.passed for check in check_export(smollm2, path, deletions=told))
