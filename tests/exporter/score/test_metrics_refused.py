"""What can't be scored is refused, with where and what."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.errors import CalibrationError, OptionError, ScoringError, UsageError
from exporter.score import ScoreOptions, calibration_text, score, score_on
from tests.raising import raises
from tests.tiny_models import hook_count, made_text, random_text, tiny_loaded

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")


def test_an_unknown_metric() -> None:
    with raises(OptionError, "", "--metric", "cosin", "cosine, angular"):
        score_on(tiny_loaded("llama"), random_text(), metrics=["cosin"])
    with pytest.raises(UsageError):
        score_on(tiny_loaded("llama"), random_text(), metrics=[])


@pytest.mark.parametrize("metric", ["kl", "perplexity", "taylor"])
def test_a_model_without_predictions(metric: str) -> None:
    with raises(ScoringError, "no-next-token", metric, "BertModel"):
        score(tiny_loaded("bert"), ScoreOptions((metric,)))


@pytest.mark.parametrize("metric", ["relative-l2", "kl", "taylor"])
def test_activations_that_are_not_finite_are_named(metric: str) -> None:
    loaded, text = tiny_loaded("llama"), random_text(5)
    text.input_ids[text.input_ids == 63] = 62
    text.input_ids[3, 4] = 63
    with torch.no_grad():
        loaded.model.model.embed_tokens.weight[63] = float("inf")
    with raises(ScoringError, "not-finite", "attention", 0, 3):
        score_on(loaded, text, metrics=[metric], batch_size=2)
    assert hook_count(loaded.model) == 0


def test_logits_that_are_not_finite_though_the_stream_is() -> None:
    loaded = tiny_loaded("llama")
    with torch.no_grad():
        loaded.model.lm_head.weight[0, 0] = float("nan")
    with raises(ScoringError, "not-finite", 0):
        score_on(loaded, random_text(), metrics=["kl"])
    with raises(ScoringError, "not-finite", "loss", 0):
        score_on(loaded, random_text(), metrics=["taylor"])
    assert score_on(loaded, random_text(), metrics=["cosine"]).scores


def test_a_sample_of_padding_alone() -> None:
    ids = random_text(3).input_ids
    mask = np.ones(ids.shape, dtype=bool)
    mask[1] = False
    with raises(CalibrationError, "padding-only", 1):
        score_on(tiny_loaded("llama"), made_text(ids, mask))
    mask[1, 2] = True
    assert score_on(tiny_loaded("llama"), made_text(ids, mask)).scores


@pytest.mark.parametrize("token", [64, -1])
def test_tokens_that_the_model_does_not_know(token: int) -> None:
    text = random_text(3)
    text.input_ids[2, 5] = token
    with raises(CalibrationError, "token-out-of-range", token, 2, 64):
        score_on(tiny_loaded("llama"), text)


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    from tests.tiny_models import tiny_tokenizer

    path = tmp_path / "words.txt"
    path.write_text(" ".join(f"w{n % 60}" for n in range(100)))
    loaded = tiny_loaded("llama", tiny_tokenizer(), vocab_size=40)
    with raises(CalibrationError, "token-out-of-range", 40, 1):
        calibration_text(loaded, str(path), samples=3, sequence_length=20)


def _int8_weight(model: Any) -> None:
    weight = torch.ones(32, 32, dtype=torch.int8)
    model.model.layers[1].mlp.down_proj.weight = torch.nn.Parameter(weight, requires_grad=False)


def _quantised_by_transformers(model: Any) -> None:
    model.is_quantized = True


def _quantised_by_torch(model: Any) -> None:
    # As PyTorch's own, which can't be made without a warning.
    packed = type("Linear", (torch.nn.Module,), {"__module__": "torch.ao.nn.quantized.dynamic"})
    model.model.layers[1].mlp.down_proj = packed()


@pytest.mark.parametrize(
    ("quantise", "what"),
    [
        (_int8_weight, "model.layers.1.mlp.down_proj.weight"),
        (_quantised_by_transformers, "LlamaForCausalLM"),
        (_quantised_by_torch, "Linear"),
    ],
)
def test_gradients_of_quantised_weights(quantise: Callable[[Any], None], what: str) -> None:
    loaded = tiny_loaded("llama")
    quantise(loaded.model)
    with raises(ScoringError, "not-differentiable", "taylor", what):
        score_on(loaded, random_text(), metrics=["taylor"])


def test_a_branch_that_no_gradient_reaches() -> None:
    loaded = tiny_loaded("llama")
    mlp = loaded.model.model.layers[1].mlp
    plain = mlp.forward
    mlp.forward = lambda x: plain(x).detach()
    with raises(ScoringError, "no-gradient", "mlp", 1):
        score_on(loaded, random_text(), metrics=["taylor"])
    assert hook_count(loaded.model) == 0


@pytest.mark.parametrize("metric", ["kl", "perplexity", "taylor"])
def test_samples_that_predict_nothing(metric: str) -> None:
    loaded, ids = tiny_loaded("llama"), random_text(3).input_ids
    with raises(ScoringError, "no-tokens"):
        score_on(loaded, made_text(ids[:, :1]), metrics=[metric])
    assert score_on(loaded, made_text(ids[:, :2]), metrics=[metric]).scores
