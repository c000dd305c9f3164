"""Perplexity, KL divergence and agreement of tokens and of classes, against plain computations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
from scipy.special import log_softmax, rel_entr, softmax

from exporter.artifacts import Accuracy
from exporter.artifacts.latency import Shape
from exporter.compare.agreement import class_rows
from exporter.compare.answers import Classes, Tokens, label_numbers, label_scores
from exporter.compare.evaluation import EvaluationTokens, random_ids
from exporter.compare.options import CompareOptions
from exporter.compare.session import compare
from exporter.engines.runners.base import Array, BoundCall, Runner
from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
from exporter.engines.tensors import TensorSpec, make_inputs
from exporter.errors import ComparisonError
from graph_passes import Deletion, prune_graph, save_model
from tests.present import present
from tests.raising import raises
from tests.tiny_graphs import VOCABULARY as TINY
from tests.tiny_graphs import TinySpec, tiny_model

VOCABULARY = 50
PAIR = ("baseline", "candidate")
IDS = TensorSpec("input_ids", np.dtype(np.int64), ("batch", "seq"))


class TableRunner(Runner):
    """A stub model: the logits after a token are a row of a table."""

    backend, provider, threads = "stub", "stub", 1
    outputs: tuple[TensorSpec, ...] = ()
    inputs = (IDS,)

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


def compare_pair(baseline: Any, candidate: Any, ids: Any, *, causal: bool = True) -> Accuracy:
    """What two arms give that are held against each other."""
    text = EvaluationTokens([*ids], "text", "0" * 64)
    arms = {"baseline": baseline, "candidate": candidate}
    return Tokens(text, causal=causal).hold(arms, [PAIR])[PAIR]


def judged(first: Array, second: Array, ids: Any, *, causal: bool = True) -> Accuracy:
    return compare_pair(TableRunner(first), TableRunner(second), ids, causal=causal)


def expected(first: Array, second: Array, ids: Any) -> list[float]:
    """Both perplexities, the divergence, and the share of tokens that both find likeliest."""
    logs = [log_softmax(arm[ids].astype(np.float64), axis=-1) for arm in (first, second)]
    losses = [-np.take_along_axis(log[:, :-1], ids[:, 1:, None], axis=-1).mean() for log in logs]
    kl = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1).mean()
    same = (logs[0].argmax(-1) == logs[1].argmax(-1)).mean()
    return [*map(float, (*np.exp(losses), kl, same))]


def figures(accuracy: Accuracy) -> list[Any]:
    pair = present(accuracy.perplexity)
    return [pair.baseline, pair.candidate, accuracy.kl_divergence, accuracy.top1_agreement]


@pytest.mark.parametrize("chunk_bytes", [1, 8 * VOCABULARY * 4, 2**20])
def test_all_three_agree_with_a_plain_computation(
    monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    monkeypatch.setattr("exporter.models.ablation.damage._CHUNK_BYTES", chunk_bytes)
    first, second, ids = table(0), table(0) + table(1) / 3, tokens()
    accuracy = judged(first, second, ids)
    assert figures(accuracy) == pytest.approx(expected(first, second, ids), rel=1e-10)
    assert 0 < present(accuracy.top1_agreement) < 1
    assert accuracy.tokens == ids.size
    bare = judged(first, second, ids, causal=False)
    assert (bare.perplexity, bare.kl_divergence) == (None, accuracy.kl_divergence)


def test_equal_arms_differ_by_exactly_nothing_and_run_a_sample_at_a_time() -> None:
    arm = TableRunner(table(0))
    accuracy = compare_pair(arm, arm, tokens(samples=9, length=4))
    baseline, candidate, *same = figures(accuracy)
    assert baseline == candidate
    assert same == [0.0, 1.0]
    assert arm.longest_run == 4


def test_half_precision_and_huge_logits_are_reduced_in_double() -> None:
    big, half = table(0) * 50, table(0).astype(np.float16)
    assert np.isfinite(figures(judged(big, big, tokens()))[0])
    want = expected(half, half, tokens())
    assert figures(judged(half, half, tokens()))[0] == pytest.approx(want[0], rel=1e-10)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("arm", [0, 1])
def test_logits_that_are_not_finite_are_refused_by_name(arm: int, bad: float) -> None:
    tables = [table(0), table(1)]
    tables[arm][tokens()[1, 2], 5] = bad
    with raises(ComparisonError, "not-finite", ("baseline", "candidate")[arm], "sample"):
        judged(*tables, tokens())


def test_tokens_that_both_rule_out_count_nothing() -> None:
    first, second = table(0), table(1)
    first[:, 9] = second[:, 9] = -np.inf
    ids = tokens()
    ids[ids == 9] = 8
    # The same model without that token: its row and column are gone, later tokens move up by one.
    narrow = [np.delete(np.delete(arm, 9, axis=0), 9, axis=1) for arm in (first, second)]
    want = expected(*narrow, ids - (ids > 9))
    assert figures(judged(first, second, ids)) == pytest.approx(want, rel=1e-10)


@pytest.mark.parametrize(
    ("sizes", "ids", "told"),
    [
        ((VOCABULARY, 40), tokens(), ("other-model", 40)),
        ((10, 10), tokens(), ("token-out-of-range", 10)),
        ((VOCABULARY, VOCABULARY), np.zeros((0, 4), np.int64), ("no-tokens",)),
    ],
)
def test_other_vocabularies_and_no_tokens_are_refused(
    sizes: tuple[int, int], ids: Any, told: tuple[Any, ...]
) -> None:
    with raises(ComparisonError, *told):
        judged(*(table(0, size=size) for size in sizes), ids)


def test_an_arm_that_is_worse_everywhere_has_an_interval_above_zero() -> None:
    peaked = np.where(np.eye(VOCABULARY, k=1) > 0, 5, 0).astype(np.float32)
    ids = (np.arange(11) + np.arange(4)[:, None]) % VOCABULARY
    arms = peaked, peaked / 2 + table(1) / 50
    increase, back = (
        judged(*pair, ids).intervals["perplexity"].ci95 for pair in (arms, arms[::-1])
    )
    assert increase[0] > 0 > back[1]
    alone = judged(*arms, ids[:1])
    assert not alone.intervals


def test_each_token_is_predicted_from_what_stands_before_it_in_its_sample(tmp_path: Path) -> None:
    model = tiny_model(TinySpec(layers=2))
    save_model(model, tmp_path / "a.onnx")
    save_model(prune_graph(model, [Deletion(0, "mlp")])[0], tmp_path / "b.onnx")
    samples = np.stack(random_ids(TINY, sequence_length=12, tokens=48).ids)
    with ExitStack() as stack:
        arms = [
            stack.enter_context(OnnxRuntimeRunner(tmp_path / name, threads=1))
            for name in ("a.onnx", "b.onnx")
        ]
        accuracy = compare_pair(*arms, samples)
        logs = [one_by_one(runner, samples) for runner in arms]
    targets = samples[:, 1:, None]
    losses = [-np.take_along_axis(log[:, :-1], targets, axis=2).mean() for log in logs]
    assert np.log(figures(accuracy)[:2]) == pytest.approx(losses, rel=1e-5)
    increase = accuracy.intervals["perplexity"].value
    assert increase == pytest.approx(losses[1] - losses[0], rel=1e-3)
    kl = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1).mean()
    assert (accuracy.tokens, accuracy.kl_divergence) == (48, pytest.approx(kl, rel=1e-4))


def one_by_one(runner: Runner, samples: Any) -> Array:
    """Log probabilities after each token of each sample, ``[samples, tokens, vocabulary]``."""
    rows = []
    for sample, length in np.ndindex(samples.shape):
        ids = samples[sample : sample + 1, : length + 1]
        inputs = make_inputs(runner.inputs, Shape("prefill", 1, ids.shape[1]), ids)
        rows.append(runner.run(inputs, ["logits"])["logits"][0, -1])
    array: Array = log_softmax(np.array(rows, np.float64), axis=-1)
    return array.reshape(*samples.shape, -1)


# Classes, against sums by hand.

RNG = np.random.default_rng(0)
LOGITS = [RNG.normal(size=(rows, 3)) for rows in (1, 4, 2)]
OTHERS = [logit + RNG.normal(scale=0.5, size=logit.shape) for logit in LOGITS]


class Table:
    """Gives the logits of a text by its first token."""

    backend = "table"
    inputs = (IDS,)

    def __init__(self, logits: Sequence[Any]) -> None:
        self._logits = logits

    def run(self, inputs: Mapping[str, Any], outputs: Sequence[str], **_: Any) -> dict[str, Any]:
        return {outputs[0]: self._logits[inputs["input_ids"][0, 0]][None]}


def rows(logits: Any, *, separate: bool = False) -> Any:
    runner: Any = Table([logits])
    return class_rows(runner, np.array([0, 0]), "text 0", separate=separate)


def of_classes(first: Sequence[Any], second: Sequence[Any], **how: Any) -> Accuracy:
    texts = EvaluationTokens([np.array([n, 0]) for n in range(len(first))], "made", "0")
    arms: Any = {"baseline": Table(first), "candidate": Table(second)}
    return Classes(texts, **how).hold(arms, [PAIR])[PAIR]


def test_divergence_and_agreement_over_the_rows_of_all_texts() -> None:
    assert rows(LOGITS[1]) == pytest.approx(log_softmax(LOGITS[1], axis=1))
    accuracy = of_classes(LOGITS, OTHERS)
    whole, cut = np.concatenate(LOGITS), np.concatenate(OTHERS)
    kl = rel_entr(softmax(whole, axis=1), softmax(cut, axis=1)).sum(1)
    assert accuracy.kl_divergence == pytest.approx(kl.mean())
    assert accuracy.top1_agreement == pytest.approx((whole.argmax(1) == cut.argmax(1)).mean())
    assert accuracy.tokens == 7
    low, high = accuracy.intervals["kl_divergence"].ci95
    assert low <= present(accuracy.kl_divergence) <= high
    same = of_classes(LOGITS, LOGITS)
    assert (same.kl_divergence, same.top1_agreement) == (0, 1)


def test_a_single_logit_is_that_of_a_yes_and_separate_labels_are_each_alone() -> None:
    result = rows(np.array([[2.0]]))
    assert np.exp(result[0]) == pytest.approx([1 / (1 + np.exp(2)), 1 / (1 + np.exp(-2))])
    result = rows(np.array([[2.0, -1.0, 0.5]]), separate=True)
    assert np.exp(result[:, 1]) == pytest.approx(1 / (1 + np.exp([-2.0, 1.0, -0.5])))


@pytest.mark.parametrize("bias", [0.0, -50.0])
def test_rerankers_are_compared_by_the_order_of_texts(bias: float) -> None:
    first, second = ([np.array([[z + bias]]) for z in row] for row in ([1, 3, 2], [2, 1, 5]))
    accuracy = of_classes(first, second, orders=True)
    yes = [[1 / (1 + np.exp(-z)) for z in row] for row in ([1 - 3, 2 - 1], [2 - 1, 5 - 2])]
    kls = [rel_entr([p, 1 - p], [q, 1 - q]).sum() for p, q in zip(*yes, strict=True)]
    assert accuracy.kl_divergence == pytest.approx(np.mean(kls))
    assert (accuracy.tokens, accuracy.top1_agreement, accuracy.compared) == (2, 0.5, "order")
    assert of_classes(first[:1], second[:1], orders=True).tokens == 1


def test_answers_that_can_t_be_compared() -> None:
    wider = [np.pad(logit, ((0, 0), (0, 1))) for logit in LOGITS]
    with raises(ComparisonError, "other-model", 3, 4):
        of_classes(LOGITS, wider)
    with raises(ComparisonError, "no-tokens"):
        of_classes([], [])
    with raises(ComparisonError, "not-finite", "candidate", 1):
        of_classes(LOGITS[:2], [LOGITS[0], np.full((4, 3), np.nan)])


NAMES = {"0": "tench, Tinca tinca", "1": "great white shark, man-eater", "2": "cat"}


def log_probabilities(number: int, classes: int) -> list[Any]:
    logits = RNG.normal(size=(number, 1, classes))
    return [*(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))]


def test_shares_of_right_images_among_one_and_five() -> None:
    said, right = log_probabilities(40, 9), RNG.integers(0, 9, 40)
    scores = label_scores(said, right, "made")
    ranks = [sorted(-row[0]).index(-row[0][label]) for row, label in zip(said, right, strict=True)]
    for name, most in (("top1", 1), ("top5", 5)):
        share = np.mean([rank < most for rank in ranks])
        assert scores.metrics[name].mean() == pytest.approx(share)
    few = log_probabilities(3, 5)  # five of five classes tell nothing
    assert set(label_scores(few, np.zeros(3, np.int64), "made").metrics) == {"top1"}
    with raises(ComparisonError, "labels-mismatch", 6, 5):
        label_scores(few, np.array([0, 6, 1]), "made")


@pytest.mark.parametrize(
    ("label", "number"),
    [("cat", 2), ("2", 2), ("tench", 0), ("tench, Tinca tinca", 0), ("great white shark", 1),
     *((label, None) for label in ("dog", "3", "-1", "man-eater", ""))],
)  # fmt: skip
def test_labels_are_names_numbers_or_the_first_of_several_names(
    label: str, number: int | None
) -> None:
    assert label_numbers({"id2label": NAMES}).get(label) == number


def test_a_name_of_two_classes_counts_for_neither_and_their_numbers_do() -> None:
    numbers = label_numbers({"id2label": {"1": "crane, bird", "2": "crane, machine"}})
    assert "crane" not in numbers
    assert numbers["crane, machine"] == 2
    numbers = label_numbers({"id2label": {"134": "crane", "517": "crane", "2": "cat"}})
    assert "crane" not in numbers
    assert (numbers["134"], numbers["517"], numbers["cat"]) == (134, 517, 2)


@pytest.mark.parametrize("told", [None, ["cat"], "cat", {"LABEL_0": "cat"}, {"-1": "cat"}])
def test_what_names_no_classes_by_number_gives_none(told: Any) -> None:
    assert label_numbers({"id2label": told}) == {}


def test_images_have_no_second_text(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["ViTForImageClassification"]}')
    with raises(ComparisonError, "no-perplexity", "--other-text"):
        compare(tmp_path, tmp_path, CompareOptions(other_text="docstrings"))


def test_images_of_no_fixed_size_can_not_be_made() -> None:
    sizes: list[tuple[Any, ...]] = [("batch", 3, 4, 4), ("batch", 3, "height", "width")]
    fixed, free = (TensorSpec("pixel_values", np.dtype(np.float32), size) for size in sizes)
    ids = np.zeros((2, 1), np.int64)
    assert make_inputs([fixed], Shape("encode", 2, 1), ids)["pixel_values"].shape == (2, 3, 4, 4)
    with raises(ComparisonError, "unknown-input", "pixel_values"):
        make_inputs([free], Shape("encode", 2, 1), ids)
