"""Tiny random models of several families: export, cut, compare with PyTorch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_torch import tiny_loaded

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("exports_once")]

TOLERANCE = 1e-5


@pytest.mark.parametrize(
    ("family", "opset"),
    [("mixtral", 20), ("llama", 23)],
)
def test_export_and_cuts_equal_pytorch(family: str, opset: int, tmp_path: Path) -> None:
    from exporter.artifacts import PlannedDeletion
    from exporter.cut.options import CutOptions
    from exporter.cut.surgery import prune_file
    from exporter.export.parity import check_export
    from exporter.export.torch_export import export_onnx

    loaded = tiny_loaded(family)
    baseline = export_onnx(loaded, tmp_path / "baseline", opset=opset)
    checks = check_export(loaded, baseline)
    for layer, kind in ((0, "attention"), (1, "mlp"), (1, "block")):
        cut = [PlannedDeletion(layer=layer, kind=kind)]
        path = tmp_path / f"{kind}{layer}" / "model.onnx"
        prune_file(baseline, path, cut, CutOptions(verify="oracle"))
        checks += check_export(loaded, path, deletions=cut)
    assert len(checks) == 16
    assert max(check.max_abs_error for check in checks) < TOLERANCE


def test_an_encoder_and_its_cuts_equal_pytorch(tmp_path: Path) -> None:
    from exporter.artifacts import PlannedDeletion
    from exporter.cut.options import CutOptions
    from exporter.cut.surgery import prune_file
    from exporter.export.parity import check_export
    from exporter.export.torch_export import export_onnx

    loaded = tiny_loaded("bert")
    baseline = export_onnx(loaded, tmp_path / "baseline")
    checks = check_export(loaded, baseline)
    for layer, kind in ((0, "attention"), (1, "mlp")):
        cut = [PlannedDeletion(layer=layer, kind=kind)]
        path = tmp_path / f"{kind}{layer}" / "model.onnx"
        prune_file(baseline, path, cut, CutOptions(verify="oracle"))
        checks += check_export(loaded, path, deletions=cut)
    assert [check.phase for check in checks] == ["encode"] * 3
    assert max(check.max_abs_error for check in checks) < TOLERANCE


def test_one_graph_serves_every_size(tmp_path: Path) -> None:
    """Prefill from nothing at batch 1, in chunks, then single tokens: the same logits."""
    import torch

    from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
    from exporter.export.torch_export import export_onnx

    loaded = tiny_loaded("llama")
    path = export_onnx(loaded, tmp_path)
    ids = torch.randint(128, (1, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = loaded.model(input_ids=ids).logits.numpy()
    with OnnxRuntimeRunner(path, threads=1) as runner:
        empty = np.zeros((1, 2, 0, 24), np.float32)
        past = {s.name: empty for s in runner.inputs if s.name.startswith("past_key_values")}
        got = []
        for start, stop in ((0, 5), (5, 9), (9, 10), (10, 11)):
            tokens = {
                "input_ids": ids[:, start:stop].numpy(),
                "attention_mask": np.ones((1, stop), np.int64),
                "position_ids": np.arange(start, stop)[None],
            }
            outputs = runner.run({**tokens, **past})
            got.append(outputs["logits"])
            past = {name: outputs[name.replace("past_key_values", "present")] for name in past}
    assert np.abs(np.concatenate(got, axis=1) - want).max() < TOLERANCE
