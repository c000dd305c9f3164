"""The tests' own kit: decoders of any size, and exports that are made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import pytest

from tests.exports_once import ExportsOnce, key_of
from tests.tiny_graphs import tiny_model
from tests.tiny_models import family_loaded

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
