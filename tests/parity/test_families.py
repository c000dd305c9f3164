"""One exported graph at every size of its inputs, against PyTorch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.tiny_models import family_loaded

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("exports_once")]

TOLERANCE = 1e-5


def test_one_graph_serves_every_size(tmp_path: Path) -> None:
    """Prefill from nothing at batch 1, in chunks, then single tokens: the same logits."""
    import torch

    from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
    from exporter.export.torch_export import export_onnx

    loaded = family_loaded("llama")
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
