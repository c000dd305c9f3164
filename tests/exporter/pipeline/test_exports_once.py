"""What PyTorch's exporter made is given again for the same model, and for no other."""

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

pytestmark = pytest.mark.torch

OPTIONS = {"opset_version": 20, "input_names": ["x"]}


@pytest.fixture
def model() -> Any:
    return family_loaded("llama").model


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
    assert len(made) == 3


def weight(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3


def setting(model: Any) -> None:
    model.config.rms_norm_eps = 1e-2


def attention(model: Any) -> None:
    model.set_attn_implementation("eager")


def attribute(model: Any) -> None:
    model.model.layers[0].self_attn.scaling = 0.5


@pytest.mark.parametrize("change", [weight, setting, attention, attribute])
def test_what_may_change_the_graph_makes_another_key(
    model: Any, change: Callable[[Any], None]
) -> None:
    key = key_of(model, OPTIONS)
    assert key == key_of(family_loaded("llama").model, OPTIONS)
    change(model)
    assert key_of(model, OPTIONS) not in (key, None)


def test_a_model_that_was_tampered_with_has_no_key(model: Any) -> None:
    hook = model.lm_head.register_forward_hook(lambda *_: None)
    assert key_of(model, OPTIONS) is None
    hook.remove()
    assert key_of(model, OPTIONS) is not None
    model.model.norm.forward = lambda x: x
    assert key_of(model, OPTIONS) is None
