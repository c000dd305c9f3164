"""The second witness for replacements: PyTorch with the same maps hooked into it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.artifacts import PlannedDeletion
from exporter.artifacts.loaded_plan import LoadedPlan, Replacements
from exporter.cut.surgery import prune_file
from graph_passes import ReplacementTensors, SublayerRef
from tests.tiny_models import family_loaded

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("exports_once")]

HIDDEN = 96
ATTENTION, MLP = SublayerRef(0, "attention"), SublayerRef(1, "mlp")
PLAN = [
    PlannedDeletion(layer=0, kind="attention", replacement="linear"),
    PlannedDeletion(layer=1, kind="mlp", replacement="bias"),
]


def numbers(seed: int = 0) -> dict[SublayerRef, ReplacementTensors]:
    rng = np.random.default_rng(seed)
    weight = (rng.standard_normal((HIDDEN, HIDDEN)) / HIDDEN).astype(np.float32)
    biases = (rng.standard_normal((2, HIDDEN)) / 10).astype(np.float32)
    return {ATTENTION: ReplacementTensors(biases[0], weight), MLP: ReplacementTensors(biases[1])}


@contextlib.contextmanager
def replaced(model: Any, given: dict[SublayerRef, ReplacementTensors]) -> Iterator[None]:
    """A llama in which the two sublayers return what takes their place."""
    import torch

    tensors = {
        ref: (torch.tensor(one.bias), None if one.weight is None else torch.tensor(one.weight))
        for ref, one in given.items()
    }

    def attention(_module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        bias, weight = tensors[ATTENTION]
        normed = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        return (torch.nn.functional.linear(normed, weight, bias), *output[1:])

    def mlp(_module: Any, _args: Any, output: Any) -> Any:
        return tensors[MLP][0].expand(output.shape)

    layers = model.model.layers
    hooks = [
        layers[0].self_attn.register_forward_hook(attention, with_kwargs=True),
        layers[1].mlp.register_forward_hook(mlp),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def test_prefill_and_decode_equal_pytorch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from exporter.export import parity
    from exporter.export.torch_export import export_onnx

    loaded = family_loaded("llama")
    source, target = export_onnx(loaded, tmp_path / "source", opset=20), tmp_path / "out" / "m.onnx"
    given = Replacements(tmp_path, "0" * 64, numbers())
    report = prune_file(source, target, LoadedPlan.of(PLAN, given))
    assert report.verification.passed
    skipped = [PlannedDeletion(layer=d.layer, kind=d.kind) for d in PLAN]

    def worst(witness: dict[SublayerRef, ReplacementTensors]) -> float:
        monkeypatch.setattr(parity, "branches_replaced", lambda model, _: replaced(model, witness))
        checks = parity.check_export(loaded, target, deletions=skipped)
        assert {check.phase for check in checks} == {"prefill", "decode"}
        return max(check.max_abs_error for check in checks)

    assert worst(numbers()) < 1e-5
    turned = numbers()
    turned[ATTENTION] = ReplacementTensors(
        turned[ATTENTION].bias, np.array(turned[ATTENTION].weight).T
    )
    assert worst(turned) > 1e-4
    assert worst(numbers(seed=1)) > 1e-2
