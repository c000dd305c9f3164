"""The table of families against tiny random models: the named outputs are what the stream gets."""

from __future__ import annotations

from typing import Any

import pytest

from exporter.errors import UnknownArchitectureError
from exporter.models.architectures import layer_modules, sublayers
from exporter.models.families import FAMILIES
from exporter.models.residual_stream import probe, silenced, tapped
from tests.raising import raises
from tests.tiny_models import hook_count, skipped, tiny_model

pytestmark = pytest.mark.torch


def _ids(model: Any) -> Any:
    import torch

    return (torch.arange(10)[None] * 5 + 3) % model.config.get_text_config().vocab_size


def _run(model: Any) -> Any:
    import torch

    with torch.no_grad():
        return model(_ids(model))[0]


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_branches_of_every_family_add_up_to_the_stream(model_type: str) -> None:
    model = tiny_model(model_type)
    assert probe(model, layer_modules(model)) == "adds_up"
    assert [(s.layer, s.kind) for s in sublayers(model)] == [
        (layer, kind) for layer in range(3) for kind in ("attention", "mlp")
    ]
    assert hook_count(model) == 0


@pytest.mark.parametrize(
    ("model_type", "changes", "form"),
    [
        ("llama", {}, "sequential"),
        ("gemma2", {}, "sequential"),
        ("gpt_neox", {}, "parallel"),
        ("falcon", {}, "parallel"),
        ("bert", {}, "post_norm"),
        ("gpt_neox", {"use_parallel_residual": False}, "sequential"),
        ("stablelm", {"use_parallel_residual": True}, "parallel"),
        ("falcon", {"parallel_attn": False, "new_decoder_architecture": False}, "sequential"),
        ("opt", {"do_layer_norm_before": False}, "post_norm"),
    ],
)
def test_the_config_decides_the_form_of_the_residual(
    model_type: str, changes: dict[str, Any], form: str
) -> None:
    model = tiny_model(model_type, **changes)
    layers = layer_modules(model)
    assert layers[0].form == form
    assert probe(model, layers) == "adds_up"


@pytest.mark.parametrize(
    ("model_type", "changes", "row"),
    [
        ("gemma2", {}, "llama"),
        ("llama", {}, "cohere"),  # another form: the sums alone would hold
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "bloom"),
    ],
)
def test_a_wrong_row_is_found_out(
    monkeypatch: pytest.MonkeyPatch, model_type: str, changes: dict[str, Any], row: str
) -> None:
    model = tiny_model(model_type, **changes)
    monkeypatch.setitem(FAMILIES, model_type, FAMILIES[row])
    assert probe(model, layer_modules(model)) == "differs"


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2", "gpt_neox", "bert"])
def test_an_unknown_type_with_a_known_layout_is_recognised(model_type: str) -> None:
    model = tiny_model(model_type)
    expected = layer_modules(model)
    model.config.model_type = "new_kid"
    modules = layer_modules(model)
    assert [(f.attention, f.mlp, f.form) for f in modules] == [
        (e.attention, e.mlp, e.form) for e in expected
    ]


def test_unknown_layouts_are_refused_and_a_silent_branch_is_none() -> None:
    model = tiny_model("llama")
    layers = layer_modules(model)
    with silenced([layers[2].attention]):
        assert probe(model, layers) == "silent"
    assert probe(model, layers) == "adds_up"
    model.config.model_type = "new_kid"
    # A scale on the whole layer: no sum of branches explains its output.
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _m, _i, output: output * 2)
    with raises(UnknownArchitectureError, "unknown-family", "new_kid", "llama"):
        layer_modules(model)
    model = tiny_model("llama")
    del model.model.layers[1].mlp
    with raises(UnknownArchitectureError, "unknown-family", "llama"):
        layer_modules(model)


@pytest.mark.parametrize(
    ("model_type", "code", "named"),
    [
        ("t5", "two-stacks", "T5Model"),
        ("bart", "two-stacks", "BartModel"),
        ("whisper", "two-stacks", "WhisperModel"),
        ("mamba", "unknown-family", "mamba"),
    ],
)
def test_other_kinds_of_models_are_refused(model_type: str, code: str, named: str) -> None:
    from transformers import AutoConfig, AutoModel

    sizes = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "num_layers": 2}
    sizes |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    sizes |= {"d_ff": 16, "d_kv": 4, "hidden_size": 16, "num_hidden_layers": 2}
    with raises(UnknownArchitectureError, code, named):
        layer_modules(AutoModel.from_config(AutoConfig.for_model(model_type, **sizes)))


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "granite", "bloom", "opt", "gpt_neox"])
def test_skipping_an_attention_keeps_the_residual(model_type: str) -> None:
    model = tiny_model(model_type)
    part = layer_modules(model)[1]
    states: list[Any] = []
    with skipped(model, [(1, "attention")]), tapped([part], states.append):
        skipped_logits = _run(model)
    assert states[0].attended.equal(states[0].entering)
    assert states[0].entering.abs().max() > 0.01
    assert (states[0].leaving - states[0].output).abs().max() <= 1e-5
    assert (skipped_logits - _run(model)).abs().max() > 1e-3
