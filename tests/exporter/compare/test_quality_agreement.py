"""Perplexity, KL divergence and agreement against a plain computation with scipy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
from scipy.special import log_softmax

from exporter.artifacts.latency import Shape
from exporter.compare.evaluation import random_ids
from exporter.engines.inputs import make_inputs
from exporter.engines.runners.base import Array, BoundCall, Runner
from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
from exporter.engines.tensors import TensorSpec
from exporter.errors import ComparisonError
from graph_passes import Deletion, prune_graph, save_model
from tests.exporter.judged_pairs import compare_pair
from tests.raising import raises
from tests.tiny_graphs import VOCABULARY as TINY_VOCABULARY
from tests.tiny_graphs import TinySpec, tiny_model

VOCABULARY = 50


class TableRunner(Runner):
    """A stub model: the logits after a token are a row of a table."""

    backend, provider, threads = "stub", "stub", 1
    outputs: tuple[TensorSpec, ...] = ()
    inputs = (TensorSpec("input_ids", np.dtype(np.int64), ("batch", "seq")),)

    def __init__(self, table: Array) -> None:
        self.table = table
        self.longest_run = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        return None

    def run(
        self,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None = None,
        *,
        phase: Any = None,
    ) -> dict[str, Array]:
        assert outputs == ["logits"]
        self.longest_run = max(self.longest_run, inputs["input_ids"].size)
        return {"logits": self.table[inputs["input_ids"]]}

    def prepare(self, inputs: Mapping[str, Array], *, phase: Any = None) -> BoundCall:
        raise NotImplementedError


def table(seed: int, size: int = VOCABULARY) -> Array:
    rng = np.random.default_rng(seed)
    return 3 * rng.standard_normal((VOCABULARY, size)).astype(np.float32)


def tokens(samples: int = 3, length: int = 11) -> Any:
    return np.random.default_rng(7).integers(0, VOCABULARY, (samples, length))


def expected(first: Array, second: Array, ids: Any) -> tuple[float, float, float, float]:
    logs = [log_softmax(arm[ids].astype(np.float64), axis=-1) for arm in (first, second)]
    losses = [-np.take_along_axis(log[:, :-1], ids[:, 1:, None], axis=-1).mean() for log in logs]
    kl = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1).mean()
    same = (logs[0].argmax(-1) == logs[1].argmax(-1)).mean()
    return float(np.exp(losses[0])), float(np.exp(losses[1])), float(kl), float(same)


@pytest.mark.parametrize("chunk_bytes", [1, 8 * VOCABULARY * 4, 2**20])
def test_all_three_agree_with_a_plain_computation(
    monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    monkeypatch.setattr("exporter.models.ablation.damage._CHUNK_BYTES", chunk_bytes)
    first, second, ids = table(0), table(0) + table(1) / 3, tokens()
    accuracy = compare_pair(TableRunner(first), TableRunner(second), ids, causal=True)
    want = expected(first, second, ids)
    assert accuracy.perplexity is not None
    assert accuracy.perplexity.baseline == pytest.approx(want[0], rel=1e-10)
    assert accuracy.perplexity.candidate == pytest.approx(want[1], rel=1e-10)
    assert accuracy.kl_divergence == pytest.approx(want[2], rel=1e-10)
    assert accuracy.top1_agreement == pytest.approx(want[3], rel=1e-12)
    assert 0 < accuracy.top1_agreement < 1
    assert accuracy.tokens == ids.size


def test_equal_arms_differ_by_exactly_nothing() -> None:
    arm = TableRunner(table(0))
    accuracy = compare_pair(arm, arm, tokens(), causal=True)
    assert (accuracy.kl_divergence, accuracy.top1_agreement) == (0.0, 1.0)
    assert accuracy.perplexity is not None
    assert accuracy.perplexity.baseline == accuracy.perplexity.candidate


def test_half_precision_and_huge_logits_are_reduced_in_double() -> None:
    big = table(0) * 50
    accuracy = compare_pair(TableRunner(big), TableRunner(big), tokens(), causal=True)
    assert accuracy.perplexity is not None
    assert np.isfinite(accuracy.perplexity.baseline)
    half = table(0).astype(np.float16)
    accuracy = compare_pair(TableRunner(half), TableRunner(half), tokens(), causal=True)
    want = expected(half, half, tokens())
    assert accuracy.perplexity is not None
    assert accuracy.perplexity.baseline == pytest.approx(want[0], rel=1e-10)


def test_samples_run_one_at_a_time() -> None:
    arm = TableRunner(table(0))
    compare_pair(arm, arm, tokens(samples=9, length=4), causal=True)
    assert arm.longest_run == 4


def test_a_model_that_is_not_causal_has_no_perplexity() -> None:
    arms = TableRunner(table(0)), TableRunner(table(1))
    accuracy = compare_pair(*arms, tokens(), causal=False)
    assert accuracy.perplexity is None
    assert accuracy.kl_divergence > 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("arm", [0, 1])
def test_logits_that_are_not_finite_are_refused_by_name(arm: int, bad: float) -> None:
    tables = [table(0), table(1)]
    tables[arm][tokens()[1, 2], 5] = bad
    runners = [TableRunner(entry) for entry in tables]
    name = ("baseline", "candidate")[arm]
    with raises(ComparisonError, "not-finite", name, "sample"):
        compare_pair(runners[0], runners[1], tokens(), causal=True)


def test_tokens_that_both_rule_out_count_nothing() -> None:
    first, second = table(0), table(1)
    first[:, 9] = second[:, 9] = -np.inf
    ids = tokens()
    ids[ids == 9] = 8
    accuracy = compare_pair(TableRunner(first), TableRunner(second), ids, causal=True)
    # The same model without that token: its row and column are gone, later tokens move up by one.
    narrow = [np.delete(np.delete(arm, 9, axis=0), 9, axis=1) for arm in (first, second)]
    want = expected(narrow[0], narrow[1], ids - (ids > 9))
    assert accuracy.perplexity is not None
    assert accuracy.perplexity.baseline == pytest.approx(want[0], rel=1e-10)
    assert accuracy.perplexity.candidate == pytest.approx(want[1], rel=1e-10)
    assert accuracy.kl_divergence == pytest.approx(want[2], rel=1e-10)
    assert accuracy.top1_agreement == pytest.approx(want[3], rel=1e-12)


def test_other_vocabularies_are_refused() -> None:
    with raises(ComparisonError, "other-vocabulary"):
        compare_pair(TableRunner(table(0)), TableRunner(table(0, size=40)), tokens(), causal=True)
    small = TableRunner(table(0, size=10))
    with raises(ComparisonError, "token-out-of-range", 10):
        compare_pair(small, small, tokens(), causal=True)


def test_no_tokens_are_refused() -> None:
    arm = TableRunner(table(0))
    with raises(ComparisonError, "no-tokens"):
        compare_pair(arm, arm, np.zeros((0, 4), np.int64), causal=True)


def test_five_likeliest_tokens_are_sets() -> None:
    first, second, ids = table(0), table(0) + table(1) / 2, tokens(samples=4, length=11)
    accuracy = compare_pair(TableRunner(first), TableRunner(second), ids, causal=True)
    best = [np.argsort(-arm[ids], axis=-1)[..., :5] for arm in (first, second)]
    shared = [len(set(a) & set(b)) / 5 for a, b in zip(*(b.reshape(-1, 5) for b in best))]  # noqa: B905
    assert accuracy.top5_agreement == pytest.approx(np.mean(shared), rel=1e-12)
    assert accuracy.top1_agreement < accuracy.top5_agreement < 1


def test_an_arm_that_is_worse_everywhere_has_an_interval_above_zero() -> None:
    peaked = np.where(np.eye(VOCABULARY, k=1) > 0, 5, 0).astype(np.float32)
    ids = (np.arange(11) + np.arange(4)[:, None]) % VOCABULARY
    arms = TableRunner(peaked), TableRunner(peaked / 2 + table(1) / 50)
    log_perplexity_increase = compare_pair(*arms, ids, causal=True).log_perplexity_increase
    back = compare_pair(*reversed(arms), ids, causal=True).log_perplexity_increase
    assert log_perplexity_increase is not None
    assert back is not None
    assert log_perplexity_increase.ci95[0] > 0 > back.ci95[1]
    alone = compare_pair(*arms, ids[:1], causal=True)
    assert (alone.log_perplexity_increase, alone.kl_interval) == (None, None)


def one_by_one(runner: Runner, samples: Any) -> Array:
    """Log probabilities after each token of each sample, ``[samples, tokens, vocabulary]``."""
    rows = []
    for sample, length in np.ndindex(samples.shape):
        ids = samples[sample : sample + 1, : length + 1]
        inputs = make_inputs(runner.inputs, Shape("prefill", 1, ids.shape[1]), ids)
        rows.append(runner.run(inputs, ["logits"])["logits"][0, -1])
    array: Array = log_softmax(np.array(rows, np.float64), axis=-1)
    return array.reshape(*samples.shape, -1)


def test_each_token_is_predicted_from_what_stands_before_it_in_its_sample(tmp_path: Path) -> None:
    model = tiny_model(TinySpec(layers=2))
    save_model(model, tmp_path / "a.onnx")
    save_model(prune_graph(model, [Deletion(0, "mlp")])[0], tmp_path / "b.onnx")
    samples = random_ids(TINY_VOCABULARY, sequence_length=12, tokens=48).token_ids
    with (
        OnnxRuntimeRunner(tmp_path / "a.onnx", threads=1) as first,
        OnnxRuntimeRunner(tmp_path / "b.onnx", threads=1) as second,
    ):
        accuracy = compare_pair(first, second, samples, causal=True)
        logs = [one_by_one(runner, samples) for runner in (first, second)]
    targets = samples[:, 1:, None]
    losses = [-np.take_along_axis(log[:, :-1], targets, axis=2).mean() for log in logs]
    assert accuracy.perplexity is not None
    assert np.log(accuracy.perplexity.baseline) == pytest.approx(losses[0], rel=1e-5)
    assert np.log(accuracy.perplexity.candidate) == pytest.approx(losses[1], rel=1e-5)
    assert accuracy.log_perplexity_increase is not None
    assert accuracy.log_perplexity_increase.value == pytest.approx(losses[1] - losses[0], rel=1e-3)
    kl = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1).mean()
    assert (accuracy.tokens, accuracy.kl_divergence) == (48, pytest.approx(kl, rel=1e-4))
