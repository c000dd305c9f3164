"""Every dialect, found by structure and cut as it is; the table holds more cuts of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from exporter.artifacts import PlannedDeletion
from exporter.cut.surgery import prune_file
from exporter.errors import SurgeryError
from graph_passes import Deletion, find_sites, prune_graph
from graph_passes.files.storage import load_model
from tests.dialects import checks
from tests.dialects.__main__ import PAGE, row
from tests.dialects.checks import Outcome, check
from tests.dialects.registry import BY_NAME, DIALECTS, Dialect, Workshop

TEXT = (Path(__file__).parents[2] / "graph_passes" / "docs" / "dialects.md").read_text()
_TRACED = (f"torch dynamo, llama, {form}" for form in ("opset 20", "opset 24", "bf16"))
_OTHERS = ("transformers OnnxExporter, llama", "dynamic int8, llama", "QDQ int8, llama")
LONG = {name: ["long"] for name in (*_TRACED, *_OTHERS)}
"""Traced again by tests of the export itself, or quantised alike by those of graph_passes."""
FEW = 2  # layers; the table has more, and they are alike
TESTED = [
    pytest.param(
        dialect,
        marks=[getattr(pytest.mark, tier) for tier in (dialect.tier, *LONG.get(dialect.name, ()))],
        id=dialect.name,
    )
    for dialect in DIALECTS
    if dialect.tier
]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("dialects"))


@pytest.mark.parametrize("dialect", TESTED)
def test_sublayers_are_found_and_cut(dialect: Dialect, shop: Workshop) -> None:
    outcome = check(dialect, shop, layers=FEW, depth=not dialect.traced, random_sets=2)
    assert bool(outcome.reason) == dialect.refused


@pytest.mark.torch
@pytest.mark.parametrize("name", ["TorchScript, llama", "onnxruntime optimizer, llama"])
def test_the_wrong_layer_is_caught(
    name: str, shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(model: ir.Model, deletions: list[Deletion]) -> Any:
        return prune_graph(model, [Deletion((d.layer + 1) % FEW, d.kind) for d in deletions])

    monkeypatch.setattr(checks, "prune_graph", wrong)
    with pytest.raises(AssertionError):
        check(BY_NAME[name], shop, layers=FEW, depth=False, random_sets=0)


@pytest.mark.torch
def test_a_sum_that_was_taken_apart_is_caught(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graph_passes import fused_norms

    monkeypatch.setattr(fused_norms, "_can_fuse", lambda *_: False)
    with pytest.raises(AssertionError, match="taken apart"):
        check(BY_NAME["onnxruntime optimizer, llama"], shop, layers=FEW, depth=False, random_sets=0)


@pytest.mark.optimum
def test_a_merged_decoder_is_refused_with_the_way_out(shop: Workshop, tmp_path: Path) -> None:
    dialect = BY_NAME["optimum, merged decoder"]
    merged = shop.make(dialect.name, FEW)
    plan = [PlannedDeletion(layer=1, kind="mlp")]
    with pytest.raises(SurgeryError) as caught:
        prune_file(merged, tmp_path / "o" / "m.onnx", plan)
    assert "if this is a merged decoder, use the unmerged files" in caught.value.hint
    assert not (tmp_path / "o").exists()
    unmerged = merged.with_name("decoder_model.onnx")
    kinds = [str(site) for site in find_sites(load_model(unmerged))]
    assert len(kinds) == 3 * FEW  # self-attention, cross-attention, MLP
    assert prune_file(unmerged, tmp_path / "o" / "m.onnx", plan).verification.passed


def test_the_page_has_every_dialect_once() -> None:
    rows = PAGE.read(TEXT)
    assert {name: len(lines) for name, lines in rows.items()} == dict.fromkeys(BY_NAME, 1)
    assert PAGE.render(rows) == TEXT


def test_rows_of_other_environments_stay() -> None:
    first, second, *_ = DIALECTS
    earlier = PAGE.read(PAGE.render({first.name: [row(first, Outcome(18))]}))
    page = PAGE.render(earlier | {second.name: [row(second, Outcome(20, 1e-6))]})
    assert [*PAGE.read(page)] == [first.name, second.name]
    assert "| exact |" in page
    assert "| 1.0e-06 |" in page
