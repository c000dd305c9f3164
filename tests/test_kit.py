"""The tests' own kit: decoders of any size, and exports that are made once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from tests.exports_once import ExportsOnce, key_of
from tests.llama_shaped import LlamaShape, write_llama
from tests.tiny_graphs import tiny_model
from tests.tiny_models import family_loaded

SHAPE = LlamaShape(
    layers=2, hidden=64, heads=4, kv_heads=2, intermediate=128, vocabulary=100,
    dtype=ir.DataType.FLOAT,
)  # fmt: skip


def logits(path: Path, sequence: int, past: int) -> Any:
    import onnxruntime as ort

    session = ort.InferenceSession(str(path))
    rng = np.random.default_rng(0)
    feed = {
        "input_ids": rng.integers(0, 100, (2, sequence)),
        "attention_mask": np.ones((2, past + sequence), np.int64),
        "position_ids": np.tile(np.arange(past, past + sequence), (2, 1)),
    }
    for layer, part in product(range(2), ("key", "value")):
        cache = rng.standard_normal((2, 2, past, 16))
        feed[f"past_key_values.{layer}.{part}"] = cache.astype(np.float32)
    names = {item.name for item in session.get_inputs()}
    assert ("position_ids" in names) == ("positions" in path.stem)
    return session.run(["logits"], {name: feed[name] for name in names})[0]


@pytest.mark.parametrize(("sequence", "past"), [(1, 7), (5, 0)])
def test_positions_and_attention_in_every_form_compute_the_same(
    sequence: int, past: int, tmp_path: Path
) -> None:
    result = []
    for fused, positions in product((False, True), repeat=2):
        shape = replace(SHAPE, fused_attention=fused, positions=positions)
        path = tmp_path / f"{fused}-{'positions' if positions else ''}.onnx"
        result.append(logits(write_llama(path, shape, noise=0.1), sequence, past))
    assert np.abs(result[0]).max() > 0.1
    for item in result[1:]:
        np.testing.assert_allclose(item, result[0], rtol=1e-5, atol=1e-5)


OPTIONS = {"opset_version": 20, "input_names": ["x"], "optimize": False}


@pytest.fixture
def model() -> Any:
    return family_loaded("llama").model


@pytest.mark.torch
def test_it_is_asked_once_and_gives_a_copy(model: Any, tmp_path: Path) -> None:
    made: list[Any] = []

    def export(*_: Any, **__: Any) -> Any:
        made.append(SimpleNamespace(model=tiny_model()))
        return made[-1]

    once = ExportsOnce(export, tmp_path)
    first, second = once(model, **OPTIONS), once(model, **OPTIONS)
    assert len(made) == 1
    assert ir.to_proto(second.model) == ir.to_proto(first.model)
    second.model.graph.name = "changed"
    assert once(model, **OPTIONS).model.graph.name == first.model.graph.name
    once(model, **OPTIONS | {"opset_version": 23})
    assert len(made) == 2
    once(model, "f", **OPTIONS)  # written by PyTorch itself
    once(model, **OPTIONS | {"optimize": True})  # which looks at the numbers
    assert len(made) == 4


@pytest.mark.torch
def test_a_model_of_the_same_form_is_given_its_own_parameters(model: Any, tmp_path: Path) -> None:
    name = "lm_head.weight"
    graph = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["": 20]> g () => (float[1] y) <float[1] w = {1}>'
        "{ y = Neg(w) }"
    )
    graph.graph.initializers["w"].name = name
    once = ExportsOnce(lambda *_, **__: SimpleNamespace(model=graph), tmp_path)
    once(model, **OPTIONS)
    other = family_loaded("llama", seed=1, initializer_range=0.2).model
    assert key_of(other, OPTIONS) == key_of(model, OPTIONS)
    given = once(other, **OPTIONS).model.graph.initializers[name].const_value
    assert (given.numpy() == other.lm_head.weight.numpy()).all()


@pytest.mark.torch
@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.model.rotary_emb.inv_freq.add_(1e-3),
        lambda model: setattr(model.lm_head, "weight", model.model.embed_tokens.weight),
        lambda model: setattr(model.config, "rms_norm_eps", 1e-2),
        lambda model: model.set_attn_implementation("eager"),
        lambda model: setattr(model.model.layers[0].self_attn, "scaling", 0.5),
    ],
)
def test_what_may_change_the_graph_makes_another_key(
    model: Any, change: Callable[[Any], None]
) -> None:
    key = key_of(model, OPTIONS)
    assert key == key_of(family_loaded("llama").model, OPTIONS)
    change(model)
    assert key_of(model, OPTIONS) not in (key, None)


@pytest.mark.torch
def test_a_model_that_was_tampered_with_has_no_key(model: Any) -> None:
    hook = model.lm_head.register_forward_hook(lambda *_: None)
    assert key_of(model, OPTIONS) is None
    hook.remove()
    assert key_of(model, OPTIONS) is not None
    model.model.norm.forward = lambda x: x
    assert key_of(model, OPTIONS) is None
