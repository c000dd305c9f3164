"""A graph with other weights computes what another export of the changed model would."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from tiny_torch import tiny_loaded

from exporter.errors import ExportError
from tests.raising import raises

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("exports_once")]

NORM = "model.layers.1.input_layernorm.weight"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
PRODUCTS = ["model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.q_proj.weight"]


def _loaded(family: str = "llama", **changes: Any) -> Any:
    """With norms that differ from each other, as trained ones do."""
    import torch

    found = tiny_loaded(family, **changes)
    for name, parameter in found.model.named_parameters():
        if "norm" in name:
            parameter.data += 0.1 * torch.rand_like(parameter)
    return found


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., tuple[Any, Path | None]]:
    """Exports a model, changes some weights, and writes the graph with those."""

    def write(
        names: list[str], change: Callable[[Any], Any] = lambda _: None, **how: Any
    ) -> tuple[Any, Path | None]:
        from exporter.export.new_weights import weight_places, write_with_weights
        from exporter.export.torch_export import export_onnx

        loaded = how.pop("loaded", None) or _loaded(**how)
        graph = export_onnx(loaded, tmp_path / "whole")
        model = ir.load(graph)
        change(model)
        ir.save(model, tmp_path / "whole" / "changed.onnx", external_data="changed.data")
        graph = tmp_path / "whole" / "changed.onnx"
        places = weight_places(graph, loaded.model, names)
        for name in names:
            loaded.model.get_parameter(name).data *= 1.5
        if places is None:
            return loaded, None
        return loaded, write_with_weights(graph, tmp_path / "new", loaded.model, places)

    return write


@pytest.mark.parametrize(
    ("names", "how"),
    [
        ([*PRODUCTS, NORM], {}),
        ([HEAD], {}),
        ([EMBEDDING], {"family": "llama_tied"}),
        (["transformer.h.0.mlp.c_fc.weight"], {"family": "gpt2"}),
        (PRODUCTS, {"dtype": "bfloat16"}),
    ],
    ids=["products-and-norm", "head", "tied-embedding", "transposed", "bfloat16"],
)
def test_the_graph_computes_what_the_changed_model_does(
    written: Any, tmp_path: Path, names: list[str], how: dict[str, Any]
) -> None:
    from exporter.export.parity import check_export

    loaded, new = written(names, **how)
    assert new is not None
    assert all(check.passed for check in check_export(loaded, new))
    with raises(ExportError, "wrong-results"):
        check_export(loaded, tmp_path / "whole" / "changed.onnx")


def test_weights_of_equal_values_are_told_by_their_names_or_not_at_all(written: Any) -> None:
    from exporter.export.parity import check_export

    plain = tiny_loaded("llama")  # all its norms are ones, which the exporter keeps once
    assert written([NORM], loaded=plain)[1] is None

    other = _loaded()
    pair = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(2)]
    other.model.get_parameter(pair[0]).data = other.model.get_parameter(pair[1]).data.clone()
    loaded, new = written(pair[:1], loaded=other)
    assert new is None or all(check.passed for check in check_export(loaded, new))


def test_a_bias_of_zeros_may_be_any_constant_and_is_not_found(written: Any) -> None:
    import torch

    bias, others = "transformer.h.0.mlp.c_fc.bias", _loaded("gpt2")
    for name, parameter in others.model.named_parameters():
        if name.endswith("bias") and name != bias:
            parameter.data += torch.rand_like(parameter)
    assert written([bias], loaded=others)[1] is None
    others.model.get_parameter(bias).data += torch.rand(others.model.get_parameter(bias).shape)
    assert written([bias], loaded=others)[1] is not None


def test_a_weight_that_the_graph_has_only_in_another_form_is_not_found(written: Any) -> None:
    def scale(model: ir.Model) -> None:
        value = model.graph.initializers[f"{PRODUCTS[0]}_transposed"]
        value.const_value = ir.tensor(value.const_value.numpy() * 2, name=value.name)

    assert written(PRODUCTS, change=scale)[1] is None
    assert written(PRODUCTS[1:], change=scale)[1] is not None
